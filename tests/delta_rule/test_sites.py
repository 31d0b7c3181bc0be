"""The site table is the code's: what runs, with which shapes, read on which axes."""

from __future__ import annotations

import pytest
import torch
from helpers import rule_inputs, run
from torch import Tensor

from qdeltanet.core import Granularity, IntFormat, ObservingArithmetic, RuleScheme, SiteScheme, Term
from qdeltanet.delta_rule import SITES, Dimensions, bind, rule_sites, scale_shape, scale_specs
from qdeltanet.delta_rule.sites import kept_axis, used_sides
from qdeltanet.inverse import Plan, plan

PLANS = [
    plan("block_merge", 16),
    plan("block_merge", 64, radices=[4, 4, 4]),
    plan("neumann", 64),
    plan("neumann", 128),
    plan("neumann", 16, order=2, residual_steps=1),
    plan("forward_substitution", 16),
    plan("block_merge", 2),
]
B, HK, H, K, V = 2, 2, 4, 16, 8


def name(p: Plan) -> str:
    return "-".join([p.method, str(p.chunk_size), *map(str, p.options.values())])


class Watching(ObservingArithmetic):
    """Also remembers which site stands on which side of a product."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.products: set[tuple[str, str]] = set()
        super().__init__(self.see)

    def see(self, site: str, x: Tensor, compact: bool) -> None:
        shape = tuple(x.shape)
        self.shapes[site] = (*shape[:-3], shape[-3] * shape[-2], shape[-3] * shape[-1]) if compact else shape

    def product(self, left, right, **options) -> Term:  # type: ignore[no-untyped-def]
        self.products.add((left.site, right.site))
        return super().product(left, right, **options)


@pytest.mark.parametrize("p", PLANS, ids=name)
def test_every_site_of_the_table_runs_and_no_other(p: Plan) -> None:
    watching = Watching()
    run(rule_inputs(B, 2 * p.chunk_size, HK, H, K, V), p, watching)
    assert set(watching.shapes) == set(rule_sites(p))
    sizes = {"C": p.chunk_size, "K": K, "V": V}
    for site, row in SITES.items():
        expected = tuple(sizes[axis] for axis in row.shape.strip("[]").split(", "))
        assert watching.shapes[site][-2:] == expected, site
        assert watching.shapes[site][-3] == (HK if row.heads == "key" else H), site
    for site in set(watching.shapes) - set(SITES):
        assert watching.shapes[site][-3:] == (H, p.chunk_size, p.chunk_size), site


@pytest.mark.parametrize("p", PLANS, ids=name)
def test_sides_of_products_are_those_that_scales_are_made_for(p: Plan) -> None:
    watching = Watching()
    run(rule_inputs(B, p.chunk_size, HK, H, K, V), p, watching)
    registers = [s for s in rule_sites(p) if s not in SITES]
    for site in ("A", "state", *registers):
        sides = {"left" for left, _ in watching.products if left == site}
        sides |= {"right" for _, right in watching.products if right == site}
        assert sides <= set(used_sides(site, p)), site


def test_the_table_names_what_design_says() -> None:
    assert list(SITES) == [
        "q", "k", "A", "T", "v_beta", "k_beta", "w", "attn", "q_decay", "k_decay", "v_new", "state",
    ]  # fmt: skip
    assert {s for s, row in SITES.items() if row.heads == "key"} == {"q", "k"}
    tokens = {"q", "k", "attn", "T", "w", "q_decay"}
    channels = {"v_beta", "k_beta", "k_decay", "v_new", "state"}
    assert {s for s in SITES if kept_axis(s, plan()) == "token"} == tokens
    assert {s for s in SITES if kept_axis(s, plan()) == "channel"} == channels
    assert kept_axis("A", plan()) is None


@pytest.mark.parametrize("granularity", [Granularity.PER_TENSOR, Granularity.PER_HEAD, Granularity.FINEST])
@pytest.mark.parametrize("p", PLANS, ids=name)
def test_shapes_of_scales_are_known_before_calibration(p: Plan, granularity: Granularity) -> None:
    from helpers import Kind, bound_rule

    carried = granularity is Granularity.FINEST
    inputs = rule_inputs(B, 2 * p.chunk_size, HK, H, K, V)
    scheme, scales = bound_rule(inputs, p, 8, Kind("calibrated", granularity, carried))
    dims = Dimensions(HK, H, K, V, conv_kernel=4)
    specs = scale_specs(scheme, p)
    assert {s.key for s in specs} == set(scales)
    for spec in specs:
        assert tuple(scales[spec.key].shape) == scale_shape(spec, dims, p.chunk_size), spec.key
        assert scales[spec.key].dtype is torch.float32


def test_a_missing_site_is_named() -> None:
    from qdeltanet.core import BindingError

    p = plan("block_merge", 16)
    sites = {s: SiteScheme(IntFormat(8)) for s in rule_sites(p) if s != "inverse.Q16_8"}
    with pytest.raises(BindingError, match=r"site inverse\.Q16_8 has no scheme"):
        bind(RuleScheme(sites), p, 16)

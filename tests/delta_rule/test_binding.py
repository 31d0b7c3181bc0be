"""What is refused before anything runs, and how static scales are made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import INTEGER_KINDS, KINDS, Kind, rule_scheme

from qdeltanet.core import TINY, BindingError, Granularity, IntFormat, SiteScheme
from qdeltanet.delta_rule import bind, make_scales, rule_sites, scale_specs
from qdeltanet.delta_rule.binding import ScaleSpec
from qdeltanet.inverse import Plan, plan

INT4, INT8, INT16 = IntFormat(4), IntFormat(8), IntFormat(16)
RADIX2 = plan("block_merge", 64, radices=[2] * 6)
RADIX4 = plan("block_merge", 64, radices=[4, 4, 4], join="powers")


def refused(message: str, p: Plan = RADIX2, **sites: SiteScheme) -> None:
    with pytest.raises(BindingError, match=message):
        bind(rule_scheme(p, 8, Kind(), **sites), p, 128)


def test_an_axis_that_a_product_contracts_is_refused_by_name() -> None:
    axis = Granularity.PER_CHANNEL
    refused("site T: per_channel keeps an axis that a product contracts; per_token is possible",
            T=SiteScheme(INT8, granularity=axis))  # fmt: skip
    refused(
        "site v_beta: per_token .*; per_channel is possible", v_beta=SiteScheme(INT8, "dynamic", Granularity.PER_TOKEN)
    )
    refused("site A: per_token keeps an axis that a product contracts; use per_head",
            A=SiteScheme(INT8, granularity=Granularity.PER_TOKEN))  # fmt: skip


def test_finest_on_a_register_that_is_read_on_both_sides_needs_a_carry() -> None:
    finest = SiteScheme(INT4, "dynamic", Granularity.FINEST)
    refused(r"site inverse\.L8: its products contract both axes, so finest needs a carried format \(carry: int16\)",
            inverse__L8=finest)  # fmt: skip
    bind(rule_scheme(RADIX2, 8, Kind(), inverse__L8=replace(finest, carry=INT16)), RADIX2, 128)
    bind(rule_scheme(RADIX2, 8, Kind(), inverse__N8=finest), RADIX2, 128)  # read on the left only


def test_carry() -> None:
    refused("site A: carry int4 is narrower than its format int8", A=SiteScheme(INT8, carry=INT4))
    refused("site w: only A, state and registers of the inverse can be carried", w=SiteScheme(INT8, carry=INT16))
    refused("site state: a carried site takes per_tensor, per_head or finest, not per_channel",
            state=SiteScheme(INT8, granularity=Granularity.PER_CHANNEL, carry=INT16))  # fmt: skip


def test_bound_scales_need_a_proof() -> None:
    bound = SiteScheme(INT8, "bound")
    refused("site v_new: no range is proven for it; use scale: calibrated or dynamic", v_new=bound)
    for site in ("inverse.N16^2", "inverse.R16_1"):
        message = (
            f"site {site.replace('^', '.')}: block_merge has no proven range for this register; .*radix 2 throughout"
        )
        refused(message, RADIX4, **{site.replace(".", "__", 1): bound})
    bind(rule_scheme(RADIX4, 8, Kind(), inverse__N16=bound), RADIX4, 128)
    refused("site T: neumann has no proven range", plan("neumann"), T=bound)
    every = {s.replace(".", "__"): bound for s in rule_sites(RADIX2) if s.startswith("inverse.") or s in ("A", "T")}
    bind(rule_scheme(RADIX2, 8, Kind(), **every), RADIX2, 128)


@pytest.mark.parametrize("p", [plan("block_merge", c) for c in (16, 64, 128)], ids=lambda p: str(p.chunk_size))
def test_products_that_overflow_the_accumulator_are_refused_by_step(p: Plan) -> None:
    long = 2**31 // 128**2  # INT16 is split into bytes for 32-bit accumulators
    for bits in (8, 16):
        bind(replace(rule_scheme(p, bits, Kind()), accumulator_bits=32), p, 128)
    bind(rule_scheme(p, 16, Kind()), p, 128)
    with pytest.raises(BindingError, match=r"step A: the accumulator can reach .* limit of 32-bit accumulation"):
        bind(replace(rule_scheme(p, 16, Kind()), accumulator_bits=32), p, long)


def test_a_head_dimension_that_no_accumulator_holds_is_refused() -> None:
    bind(replace(rule_scheme(RADIX2, 8, Kind()), accumulator_bits=32), RADIX2, 2**31 // 127**2)
    with pytest.raises(BindingError, match="step A: "):
        bind(replace(rule_scheme(RADIX2, 8, Kind()), accumulator_bits=32), RADIX2, 2**31 // 127**2 + 1)
    # INT16 at K = 256: the product fits 2^53, the product times its coefficient codes does not
    with pytest.raises(BindingError, match=r"step A \(times its decay\): .*64-bit accumulation"):
        bind(rule_scheme(RADIX2, 16, Kind()), RADIX2, 256)


@pytest.mark.parametrize("kind", [*KINDS, *INTEGER_KINDS])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_finest_is_resolved_and_the_rest_is_kept(kind: str, bits: int) -> None:
    k = (KINDS | INTEGER_KINDS)[kind]
    bound = bind(rule_scheme(RADIX2, bits, k), RADIX2, 128)
    assert list(bound.sites) == rule_sites(RADIX2)
    assert bound.requantize == k.requantize
    for site, s in bound.sites.items():
        assert s.format == IntFormat(bits)
        if k.granularity is not Granularity.FINEST or s.carry:
            assert s.granularity is k.granularity, site
        else:
            assert s.granularity in (Granularity.PER_TOKEN, Granularity.PER_CHANNEL), site


def test_static_scales_cover_the_codes_and_each_use() -> None:
    scheme = bind(rule_scheme(RADIX2, 4, KINDS["finest"]), RADIX2, 128)
    keys = {s.key: s for s in scale_specs(scheme, RADIX2)}
    assert keys["state"].format == INT16
    assert keys["state"].granularity is Granularity.PER_HEAD
    assert keys["state/right"].format == INT4
    assert keys["state/right"].granularity is Granularity.PER_CHANNEL
    assert "state/left" not in keys
    assert keys["inverse.L8/left"].granularity is Granularity.PER_TOKEN
    assert keys["inverse.L8/right"].granularity is Granularity.PER_CHANNEL
    assert "inverse.N8/right" not in keys
    assert keys["T"].granularity is Granularity.PER_TOKEN if scheme.sites["T"].carry is None else True
    assert scale_specs(bind(rule_scheme(RADIX2, 4, KINDS["finest dynamic"]), RADIX2, 128), RADIX2) == []


def spec(key: str, granularity: Granularity = Granularity.PER_HEAD, bound: bool = False) -> ScaleSpec:
    return ScaleSpec(key, key, granularity, INT8, bound)


def test_scales_are_ranges_over_qmax() -> None:
    head = Granularity.PER_HEAD
    amax = {("w", head): torch.tensor([2.0, 0.0]).reshape(2, 1, 1)}
    scale = make_scales([spec("w")], amax)["w"]
    assert torch.equal(scale, torch.tensor([2.0, TINY]).reshape(2, 1, 1) / 127)
    assert make_scales([spec("w")], amax, power_of_two=True)["w"][0].item() == 2.0**-5
    bound = make_scales([spec("T", bound=True)], {}, beta_max=2.0)["T"]
    assert torch.equal(bound, torch.full((1, 1, 1), 2.0) / 127)


def test_a_row_that_calibration_never_saw_takes_the_range_of_its_head() -> None:
    token = Granularity.PER_TOKEN
    amax = {("T", token): torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]])[..., None]}
    scale = make_scales([spec("T", token)], amax)["T"] * 127
    assert scale[..., 0].tolist() == [[1.0, 0.5, 1.0], pytest.approx([TINY] * 3)]


def test_shared_rescale_gives_all_registers_one_range_per_head() -> None:
    head = Granularity.PER_HEAD
    amax = {
        (key, head): torch.tensor(tops).reshape(2, 1, 1)
        for key, tops in {"A": [1.0, 2.0], "T": [3.0, 1.0], "inverse.E": [9.0, 0.5], "w": [7.0, 7.0]}.items()
    }
    scales = make_scales([spec(k) for k, _ in amax], amax, shared=True)
    for key in ("A", "T", "inverse.E"):
        assert torch.equal(scales[key] * 127, torch.tensor([9.0, 2.0]).reshape(2, 1, 1)), key
    assert float(scales["w"][0] * 127) == pytest.approx(7.0)


def test_headroom_widens_the_inverse_up_to_what_is_proven() -> None:
    head = Granularity.PER_HEAD
    specs = [spec(s) for s in ("q", "A", "inverse.L", "inverse.N", "T")]
    tops = {"q": 0.5, "A": 0.4, "inverse.L": 0.9, "inverse.N": 3.0, "T": 0.6}
    amax = {(s, head): torch.full((1, 1, 1), x) for s, x in tops.items()}
    own = make_scales(specs, amax, headroom=1.25, proven={"A", "L", "T"})
    found = {s: round(float(x) * 127, 5) for s, x in own.items()}
    assert found == {"q": 0.5, "A": 0.5, "inverse.L": 1.0, "inverse.N": 3.75, "T": 0.75}


@pytest.mark.parametrize(("proven", "expected"), [({"A", "L", "T"}, 1.0), ({"A"}, 1.125)])
def test_a_shared_range_stays_one_under_headroom(proven: set[str], expected: float) -> None:
    """It is cut at the proven range only where that is proven of all."""
    head = Granularity.PER_HEAD
    specs = [spec(s) for s in ("A", "inverse.L", "T")]
    amax = {(s, head): torch.full((1, 1, 1), x) for s, x in (("A", 0.4), ("inverse.L", 0.9), ("T", 0.6))}
    scales = make_scales(specs, amax, shared=True, headroom=1.25, proven=proven)
    assert {round(float(s) * 127, 5) for s in scales.values()} == {expected}

"""The cost of a whole rule: every product counted, key heads shared, rotations and floats priced."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdeltanet.core import IntFormat, RuleScheme, SiteScheme
from qdeltanet.delta_rule import Dimensions, LayerScheme, rule_cost, rule_sites
from qdeltanet.inverse import Plan, Profile, plan, plan_cost
from qdeltanet.profile import load_profile

DIMS = Dimensions(key_heads=2, value_heads=4, key_dim=32, value_dim=48, conv_kernel=4)
UNIT = Profile("unit", 16, 2, {"int8": 1.0, "float": 0.25}, 100.0, 30.0, 4.0, 2.0, 1.0, 2.0)
INT8 = SiteScheme(IntFormat(8))


def layer(p: Plan, rotate: frozenset[str] = frozenset(), **sites: SiteScheme) -> LayerScheme:
    schemes = dict.fromkeys(rule_sites(p), INT8) | sites
    return LayerScheme(p, RuleScheme(schemes, rotate=rotate))


def test_every_product_is_there() -> None:
    """C = 64, K = 32, V = 48 in tiles of 16: 4 x 2 x 3; the triangle has 10 tiles."""
    p = plan("block_merge", 64)
    parts = rule_cost(layer(p), DIMS, UNIT).parts
    cube = 16**3
    assert parts["A"].matrix == pytest.approx(10 * 2 * cube / 2)  # once for two value heads
    assert parts["attn"].matrix == pytest.approx(10 * 2 * cube / 2)
    assert parts["u"].matrix == pytest.approx(10 * 3 * cube)
    assert parts["w"].matrix == pytest.approx(10 * 2 * cube)
    assert parts["v_new"].matrix == pytest.approx(4 * 2 * 3 * cube)
    assert parts["o"].matrix == pytest.approx((4 * 2 * 3 + 10 * 3) * cube)
    assert parts["state"].matrix == pytest.approx(2 * 4 * 3 * cube)
    assert parts["inverse"] == plan_cost(p, dict.fromkeys(rule_sites(p), INT8), UNIT)
    assert parts["offchip"].memory == pytest.approx(64 * (32 + 2 * 48 + 2) * 2)
    assert parts["rotations"].total == 0


def test_the_total_is_the_sum_and_a_token_its_share() -> None:
    cost = rule_cost(layer(plan("block_merge", 64)), DIMS, UNIT)
    assert cost.chunk.total == pytest.approx(sum(part.total for part in cost.parts.values()))
    assert cost.per_token.total == pytest.approx(cost.chunk.total * 4 / 64)


def test_a_site_in_float_makes_its_products_float() -> None:
    p = plan("block_merge", 64)
    base, other = (rule_cost(x, DIMS, UNIT).parts for x in (layer(p), layer(p, state=SiteScheme(None))))
    assert other["v_new"].matrix == pytest.approx(4 * base["v_new"].matrix)
    assert other["u"] == base["u"]
    floats = rule_cost(LayerScheme(p, None), DIMS, UNIT).parts
    assert floats["A"].matrix == pytest.approx(4 * base["A"].matrix)
    assert floats["inverse"].matrix == pytest.approx(4 * base["inverse"].matrix)


def test_rotations_are_counted() -> None:
    p = plan("block_merge", 64)
    rotated = {r: rule_cost(layer(p, frozenset(r)), DIMS, UNIT) for r in ((), ("qk",), ("v",), ("qk", "v"))}
    qk = 2 * 64 * 32 * (5 + 1) / 2  # q and k, log2 32 additions and a scale, shared by two value heads
    assert rotated["qk",].parts["rotations"].vector == pytest.approx(qk)
    wide = replace(DIMS, value_dim=64)
    assert rule_cost(layer(p, frozenset(("v",))), wide, UNIT).parts["rotations"].vector == pytest.approx(
        2 * 64 * 64 * (6 + 1)  # v, and back on o
    )
    both = rotated["qk", "v"].chunk.total - rotated[()].chunk.total
    assert both == pytest.approx(sum(rotated[r,].chunk.total - rotated[()].chunk.total for r in ("qk", "v")))


def test_what_costs_more() -> None:
    p = plan("block_merge", 64)
    base = rule_cost(layer(p), DIMS, UNIT).chunk.total
    carried = rule_cost(layer(p, state=replace(INT8, carry=IntFormat(16))), DIMS, UNIT)
    # requantized for v_new and for o
    assert carried.parts["o"].vector - rule_cost(layer(p), DIMS, UNIT).parts["o"].vector == pytest.approx(4 * 32 * 48)
    assert carried.chunk.total > base
    assert rule_cost(layer(p, attn=replace(INT8, scale="dynamic")), DIMS, UNIT).chunk.total > base
    assert rule_cost(layer(p, k=SiteScheme(IntFormat(16))), DIMS, UNIT).chunk.total > base


def test_without_an_inverse_its_products_fall_away() -> None:
    for p in (plan("identity", 64), plan("block_merge", 1)):
        cost = rule_cost(layer(p), DIMS, UNIT)
        assert {"inverse", "u"} & cost.parts.keys() == set()
        assert cost.parts["A"].total == 0
        assert cost.parts["w"].matrix == 0
        assert cost.parts["w"].vector > 0


@pytest.mark.parametrize("profile", ["ascend-910b", "hexagon", "h200", "cpu"])
def test_on_machines(profile: str) -> None:
    """A wider format never costs less, and chunks of 64 beat single tokens."""
    dims = Dimensions(16, 32, 128, 128, 4)
    machine = load_profile(profile)
    p = plan("block_merge", 64)
    totals = []
    for bits in (4, 8, 16):
        scheme = RuleScheme(dict.fromkeys(rule_sites(p), SiteScheme(IntFormat(bits))))
        totals.append(rule_cost(LayerScheme(p, scheme), dims, machine).per_token.total)
    assert totals == sorted(totals)
    decode = rule_cost(layer(plan("block_merge", 1)), dims, machine).per_token.total
    assert decode > 2 * totals[1]

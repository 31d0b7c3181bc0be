"""The cost of a plan: exact counts, prices by hand, and the published speed-ups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qdeltanet.core import IntFormat, QDeltaNetError, SiteScheme
from qdeltanet.inverse import (
    METHODS,
    PUBLISHED,
    Plan,
    Profile,
    fit_latency,
    plan,
    plan_cost,
    predicted_speedup,
    tile_products,
)
from qdeltanet.inverse.mask import Mask
from qdeltanet.inverse.plan import Step
from qdeltanet.inverse.speedups import FLOAT, INT8, alike, with_latency
from qdeltanet.inverse.tiles import step_tiles
from qdeltanet.profile import load_profile

# one tile product 10 ns in INT8 and 40 in float; one vector operation of 4 bytes 1 ns; one byte on the chip 0.5 ns
UNIT = Profile("unit", 16, 2, {"int8": 409.6, "float": 102.4}, 100.0, 30.0, 4.0, 2.0, 1.0, 2.0)
TILE = 256
INT16 = SiteScheme(IntFormat(16))


def merged(radices: list[int]) -> Plan:
    return plan("block_merge", 64, radices=radices, join="powers")


@pytest.mark.parametrize(
    ("p", "count"),
    [
        (merged([4, 4, 4]), 44),
        (merged([2, 2, 4, 4]), 44),
        (merged([16, 4]), 44),
        (merged([2] * 6), 40),
        (plan("neumann", 64), 132),
    ],
)
def test_tile_products_as_counted_elsewhere(p: Plan, count: int) -> None:
    assert tile_products(p) == count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("edge", [4, 16])
def test_tiles_are_those_of_numbers_without_cancellation(method: str, edge: int) -> None:
    """Positive registers, all signs positive: what can be non-zero is."""
    p = plan(method, 32)
    n = 32 // edge
    registers = {"A": torch.rand(32, 32, dtype=torch.float64).tril(-1) + torch.eye(32).tril(-1), "I": torch.eye(32)}

    def nonzero(x: torch.Tensor, i: int, j: int) -> bool:
        return bool((x[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge] != 0).any())

    for step, tiles in zip(p.steps, step_tiles(p, edge), strict=True):
        mask = step.mask.matrix(32).double()
        blocks = replace(step.mask, band=None).matrix(32)
        left = registers[step.left].double()
        total = left if step.right is None else left @ registers[step.right].double()
        if step.right is not None:
            right = registers[step.right].double()
            triples = [(i, k, j) for i in range(n) for k in range(n) for j in range(n)]
            met = [
                t for t in triples if nonzero(left, *t[:2]) and nonzero(right, *t[1:]) and nonzero(blocks, t[0], t[2])
            ]
            assert tiles.products == len(met)
            assert tiles.left == len({(i, k) for i, k, _ in met})
            assert tiles.right == len({(k, j) for _, k, j in met})
            assert tiles.accumulators == len({(i, j) for i, _, j in met})
        for register, _ in step.addends:
            total = total + registers[register]
        out = total * mask
        registers[step.out] = (out > 0).double()  # only what is there counts; powers would leave float64
        if not step.is_copy:
            assert tiles.stored == sum(nonzero(out, i, j) for i in range(n) for j in range(n))


def test_one_product_by_hand() -> None:
    p = plan("truncated_neumann", 16, order=3)  # T = A @ A + A
    cost = plan_cost(p, alike(p, INT8), UNIT)
    assert cost.matrix == pytest.approx(10)
    assert cost.vector == pytest.approx(TILE * (4 + 2))  # requantize what is stored, add A
    assert cost.memory == pytest.approx(TILE * (1 + 1 + 4 + 1 + 1) / 2)  # A, A, accumulators, the addend, T
    assert cost.latency == pytest.approx(100 / 2)
    assert cost.total == pytest.approx(cost.matrix + cost.vector + cost.memory + cost.latency)
    floats = plan_cost(p, alike(p, FLOAT), UNIT)
    assert floats.matrix == pytest.approx(40)
    assert floats.vector == pytest.approx(TILE * (1 + 1) / 2)  # two bytes a lane


def test_what_formats_cost() -> None:
    p = plan("truncated_neumann", 16, order=3)
    base = plan_cost(p, alike(p, INT8), UNIT)
    bytewise = plan_cost(p, alike(p, INT16), UNIT)
    assert bytewise.matrix == pytest.approx(4 * base.matrix)
    assert bytewise.vector == pytest.approx(base.vector + 3 * 2 * TILE)  # four accumulators become one
    native = replace(UNIT, macs_per_ns={**UNIT.macs_per_ns, "int16": 204.8})
    assert plan_cost(p, alike(p, INT16), native).matrix == pytest.approx(20)
    int4 = SiteScheme(IntFormat(4))
    assert plan_cost(p, alike(p, int4), UNIT) == base
    packed = plan_cost(p, alike(p, int4), replace(UNIT, macs_per_ns={**UNIT.macs_per_ns, "int4": 819.2}))
    assert packed.matrix == pytest.approx(5)
    assert base.memory - packed.memory == pytest.approx(4 * TILE / 2 / 2)  # half of A, A, the addend and T


def test_dynamic_scales_and_carried_registers_cost_more() -> None:
    p = plan("truncated_neumann", 16, order=3)
    base = plan_cost(p, alike(p, INT8), UNIT)
    dynamic = plan_cost(p, alike(p, SiteScheme(IntFormat(8), "dynamic")), UNIT)
    assert dynamic.vector - base.vector == pytest.approx(2 * TILE)
    assert dynamic.latency - base.latency == pytest.approx(30 / 2)
    carried = plan_cost(p, alike(p, SiteScheme(IntFormat(8), carry=IntFormat(16))), UNIT)
    assert carried.vector - base.vector == pytest.approx(2 * 4 * TILE)  # two uses
    assert carried.latency - base.latency == pytest.approx(30 / 2)
    assert carried.memory - base.memory == pytest.approx((2 * 3 + 2) * TILE / 2)  # read wide, written narrow; A, T wide


def test_copies_are_free_and_sums_are_vector_work() -> None:
    full = Mask(1, 16)
    steps = (Step("B", full, "A", factor=0.5), Step("T", full, "A", None, (("B", -1),)))
    p = Plan("sum", 16, steps)
    cost = plan_cost(p, alike(p, INT8), UNIT)
    by_step = dict(cost.steps)
    assert by_step["B"].total == 0
    assert cost.matrix == 0
    assert cost.vector == pytest.approx(TILE * (4 + 2 * 2))
    assert cost.latency == pytest.approx(30 / 2)
    copy = Plan("copy", 16, (Step("T", full, "A"),))  # T is a site of its own
    assert plan_cost(copy, alike(copy, INT8), UNIT).vector == pytest.approx(TILE * (4 + 2))


@pytest.mark.parametrize(("method", "most"), [("forward_substitution", 2.3), ("column_sweep", 4)])
def test_vector_steps_are_priced_on_vectors(method: str, most: float) -> None:
    p = plan(method, 64)
    lanes = replace(UNIT, vector_bytes_per_ns=2.0)
    cost = plan_cost(p, alike(p, FLOAT), lanes)
    assert cost.matrix == 0
    assert cost.latency == pytest.approx(62 * 30 / 2)
    least = sum(r * (r - 1) // 2 for r in range(64))  # multiply-adds that can be non-zero
    assert least <= cost.vector <= most * least  # rectangles of a row; of rank one, a store and two addends


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("forward_substitution", "column_sweep", "identity")]
)
@pytest.mark.parametrize("size", [32, 128])
def test_every_level_waits_once(method: str, size: int) -> None:
    p = plan(method, size)
    cost = plan_cost(p, alike(p, INT8), replace(UNIT, vector_latency=1e-9))
    assert cost.latency == pytest.approx(p.depth * 100 / 2, rel=1e-6)
    assert sum(c.vector for _, c in cost.steps) == pytest.approx(cost.vector)
    assert [name for name, _ in cost.steps] == [s.out for s in p.steps]


def test_an_empty_plan_costs_nothing() -> None:
    assert plan_cost(plan("identity", 64), {}, UNIT).total == 0


def test_a_register_without_a_scheme_is_named() -> None:
    with pytest.raises(QDeltaNetError, match=r"inverse\.E .*scheme"):
        plan_cost(plan("neumann", 64), {"A": INT8, "T": INT8, "inverse.T0": INT8}, UNIT)


def test_published_speedups_with_one_fitted_number() -> None:
    """Fitted at chunk 64; 32 and 128 are predicted within 25%."""
    profile = load_profile("hexagon")
    latency = fit_latency(profile)
    assert profile.product_latency == pytest.approx(latency, abs=0.005)  # as the file has it, to two digits
    assert profile.vector_latency == profile.product_latency
    assert predicted_speedup(64, profile) == pytest.approx(4.2, rel=1e-3)
    for size in (32, 128):
        assert predicted_speedup(size, profile) == pytest.approx(PUBLISHED[size].speedup, rel=0.25)


@pytest.mark.parametrize("field", ["vector_bytes_per_ns", "onchip_bytes_per_ns"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_prediction_does_not_hang_on_an_assumed_rate(field: str, factor: float) -> None:
    profile = load_profile("hexagon")
    other = replace(profile, **{field: factor * getattr(profile, field)})
    fitted = with_latency(other, fit_latency(other))
    for size in (32, 128):
        assert predicted_speedup(size, fitted) == pytest.approx(PUBLISHED[size].speedup, rel=0.25)


def test_what_cannot_be_fitted_is_said() -> None:
    wide = replace(load_profile("hexagon"), float_bytes=64)  # its forward substitution is slow without any latency
    with pytest.raises(QDeltaNetError, match=r"hexagon: no latency gives a speed-up of 4\.2"):
        fit_latency(wide)
    with pytest.raises(QDeltaNetError, match="published for 32, 64, 128"):
        predicted_speedup(16, wide)


def test_numbers_of_a_profile_are_positive() -> None:
    with pytest.raises(QDeltaNetError, match=r"profile unit: concurrency = 0"):
        replace(UNIT, concurrency=0)
    with pytest.raises(QDeltaNetError, match=r"macs_per_ns\.int8 is missing"):
        replace(UNIT, macs_per_ns={"float": 1.0})
    with pytest.raises(QDeltaNetError, match="unknown operand format of macs_per_ns 'int6'"):
        replace(UNIT, macs_per_ns={**UNIT.macs_per_ns, "int6": 1.0})

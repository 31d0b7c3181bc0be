"""Published tables and failures seen again, bounds that hold, floors that no method sets for itself."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from qdeltanet.backends import get_backend
from qdeltanet.core import Granularity, IntegerArithmetic, IntFormat, QDeltaNetError, SiteScheme
from qdeltanet.delta_rule.error_bound import integer_errors
from qdeltanet.delta_rule.laboratory import InverseScheme, exact_inverse, invert_float, relative_errors
from qdeltanet.delta_rule.measure import Measured, Specimens, Trial, measure
from qdeltanet.inverse import INPUT, METHODS, Plan, plan, run_plan
from qdeltanet.inverse.families import FAMILIES, UNIFORM, Shape
from qdeltanet.inverse.methods.block_merge import radices_of
from qdeltanet.inverse.points import points, published_neumann

METHOD_NAMES = [name for name in METHODS if name != "identity"]
FLOATS = ("fp32", "bf16", "fp16")
INTEGERS = ("int16", "int8", "int4")


@lru_cache(maxsize=8)
def every_family(chunk_size: int, matrices: int) -> Specimens:
    shape = Shape(4, matrices, chunk_size)
    return Specimens.of({name: f.matrices(shape, seed=3) for name, f in FAMILIES.items()})


def uniform(chunk_size: int, matrices: int = 64) -> Tensor:
    """[M, 1, C, C]"""
    return UNIFORM.matrices(Shape(1, matrices, chunk_size), seed=0).transpose(0, 1)


# -- published tables --------------------------------------------------------------------------------------------------

# Mean relative Frobenius errors in float32 of arXiv 2605.21325, entries uniform in [0, 0.5).
PUBLISHED = {
    (64, "cayley_hamilton"): 6.6e-4,
    (64, "bunch_hopcroft"): 8.7e-8,
    (64, "mixed"): 1.2e-7,
    (128, "cayley_hamilton"): 1.8e2,
    (128, "bunch_hopcroft"): 1.8e-7,
    (128, "mixed"): 2.3e-7,
}


@pytest.mark.parametrize(("chunk_size", "method"), PUBLISHED)
def test_published_float32_errors_within_a_factor_of_3(chunk_size: int, method: str) -> None:
    A = uniform(chunk_size)
    found = invert_float(plan(method, chunk_size), A, "fp32").T
    mean = float(relative_errors(found, exact_inverse(A)).mean())
    assert PUBLISHED[chunk_size, method] / 3 < mean < PUBLISHED[chunk_size, method] * 3


def test_cayley_hamilton_is_not_a_number_in_fp16_at_128() -> None:
    found = invert_float(plan("cayley_hamilton", 128), uniform(128, 8), "fp16")
    assert bool(found.T.isnan().flatten(1).any(1).all())
    assert bool(invert_float(plan("bunch_hopcroft", 128), uniform(128, 8), "fp16").T.isfinite().all())
    m = measure(plan("cayley_hamilton", 128), UNIFORM.matrices(Shape(1, 8, 128)), "fp16", limit=None)
    assert m.overflow
    assert m.worst == math.inf
    assert m.theory is None


def test_mixed_loses_everything_on_all_ones_in_bf16() -> None:
    """The paper reports an overflow; with float32 accumulators what we see is finite, and wrong beyond use."""
    ones = FAMILIES["ones"].matrices(Shape(1, 2, 128))
    mixed = measure(plan("mixed", 128), ones, "bf16")
    assert not mixed.overflow
    assert mixed.worst > 1e3
    assert measure(plan("bunch_hopcroft", 128), ones, "bf16").worst == 0


def residual(name: str, order: int, steps: int) -> Measured:
    A = FAMILIES[name].matrices(Shape(4, 16, 64), seed=3)
    return measure(plan("neumann", 64, order=order, band=order, residual_steps=steps), A, "fp64")


@pytest.mark.parametrize("name", ["silu", "repeated", "gates_small"])
def test_too_few_residual_steps_fail(name: str) -> None:
    """The published grid: a step alone fails for every order, four fail less the higher the order, eight mend them."""
    for order in (3, 4, 5):
        assert residual(name, order, 1).worst > 0.1
    four = [residual(name, order, 4).median for order in (3, 4, 5)]
    assert four[0] > 0.1
    assert four[0] > four[1] > four[2]
    assert residual(name, 3, 8).median < four[0] / 5


@pytest.mark.parametrize("name", ["correlated", "repeated", "gates_small", "gates_large"])
def test_a_few_steps_are_worse_than_none(name: str) -> None:
    """The powers of E grow before they vanish: E starts below `order` sub-diagonals, so E^22 is 0 at order 3."""
    assert residual(name, 3, 4).worst > 2 * residual(name, 3, 1).worst
    assert residual(name, 3, 32).worst < 1e-10


def test_eight_steps_diverge_on_correlated_keys() -> None:
    assert residual("correlated", 3, 8).worst > residual("correlated", 3, 4).worst > 1


def test_published_points() -> None:
    assert published_neumann(64) == {"order": 3, "band": 3, "residual_steps": 8}
    assert published_neumann(32) == {"order": 4, "band": 4, "residual_steps": 3}
    assert published_neumann(128) == published_neumann(16) == published_neumann(64)


@pytest.mark.parametrize("chunk_size", [2, 8, 32, 128])
def test_points_fit_every_chunk_size(chunk_size: int) -> None:
    """Each option of a method is taken: none is refused and left out."""
    found = [p.plan.options["radices"] for p in points(chunk_size, ["block_merge"])]
    assert {(2,) * (chunk_size.bit_length() - 1), (chunk_size,)} <= set(found)
    assert all(math.prod(r) == chunk_size for r in found)


def test_radices_are_cut_to_the_chunk() -> None:
    assert radices_of(64, 4) == [4, 4, 4]
    assert radices_of(128, 4) == [4, 4, 4, 2]
    assert radices_of(128, 16, 128) == [16, 8]
    assert radices_of(8, 16, 8) == [8]


# -- the default method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_default_is_within_twice_the_floor_in_every_family(chunk_size: int) -> None:
    trial = Trial(plan(chunk_size=chunk_size), every_family(chunk_size, max(16, 1024 // chunk_size)))
    for name in INTEGERS:
        found = trial.measure(name)
        assert {group: m.worst_to_floor for group, m in found.items() if m.worst_to_floor > 2} == {}, name
        assert not any(m.overflow for m in found.values())


def test_floor_is_that_of_the_default_scale_and_never_0() -> None:
    some = every_family(16, 16)
    for name in INTEGERS:
        fmt = IntFormat.parse(name)
        assert some.floor(name, "orthogonal") == 0.25 / fmt.qmax
        assert some.floor(name, "ones") == 0.25 / fmt.qmax  # -1 is qmax steps, to the bit
        p = plan(chunk_size=16)
        scale = Trial(p, some).bound(fmt)[1][INPUT]
        codes = (some.A.float() / scale).round().clamp(-fmt.qmax, fmt.qmax)
        errors = relative_errors(exact_inverse((codes * scale).double()), some.exact)
        heads = some.groups["correlated"]
        assert some.floor(name, "correlated") == pytest.approx(float(errors[:, heads].max()), rel=1e-5)
    assert some.floor("bf16", "ones") == 0.25 * 2**-7


def test_floor_does_not_depend_on_the_method() -> None:
    some = every_family(16, 16)
    for method in ("neumann", "cayley_hamilton"):
        for m in Trial(plan(method, 16), some).measure("int8").values():
            if m.worst_to_floor:
                assert m.worst / m.worst_to_floor in [pytest.approx(some.floor("int8", g)) for g in some.groups]


def test_schemes_of_the_default_recipes() -> None:
    radix2 = plan("block_merge", 16, radices=[2, 2, 2, 2])
    assert str(InverseScheme.of(IntFormat(16), radix2)) == "bound"
    assert str(InverseScheme.of(IntFormat(8), radix2)) == "calibrated, shared"
    assert InverseScheme.of(IntFormat(8), radix2).headroom == 1.25
    assert InverseScheme.of(IntFormat(4), radix2).headroom == 1.0
    assert str(InverseScheme.of(IntFormat(16), plan("neumann", 16))) == "calibrated, per register"
    assert str(InverseScheme.of(IntFormat(16), radix2, limit=None)) == "calibrated, per register"


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_errors_stay_within_the_proven_bound(method: str) -> None:
    some = every_family(32, 16)
    bounds = 0
    for point in points(32, [method]):
        trial = Trial(point.plan, some)
        for name in (*FLOATS, *INTEGERS):
            for group, m in trial.measure(name).items():
                assert m.theory is None or m.worst <= m.theory, (point.plan.options, name, group)
                bounds += m.theory is not None
    assert bounds > 50


def test_bound_says_something_where_little_cancels() -> None:
    some = every_family(16, 16)
    m = Trial(plan(chunk_size=16), some).measure("int8")["iid"]
    assert m.theory is not None
    assert m.worst <= m.theory < 10 * m.worst


@pytest.mark.parametrize("method", ["bunch_hopcroft", "mixed", "cayley_hamilton"])
def test_bound_of_explicit_diagonals_is_as_tight(method: str) -> None:
    """The identity that they add is exact."""
    some = every_family(16, 16)
    explicit = Trial(plan(method, 16), some).measure("fp32")["iid"].theory
    implicit = Trial(plan(method, 16, diagonal="implicit"), some).measure("fp32")["iid"].theory
    assert explicit is not None
    assert implicit is not None
    assert explicit < 3 * implicit < 1e-4


def test_bound_counts_the_roundings_of_float32() -> None:
    """On the way in, A a hair above the middle of two codes: as float32 it is a tie, and rounded down."""
    p = plan("truncated_neumann", 16, order=4)
    fmt, scale = IntFormat(16), torch.tensor(2.0**-10).reshape(1, 1, 1)
    sites = [INPUT, "T", *(f"inverse.{r}" for r in p.registers)]
    bound = integer_errors(p, dict.fromkeys(sites, fmt), dict.fromkeys(sites, scale))
    x = torch.full((1, 2, 2), (1000.5 + 2.0**-20) * 2.0**-10, dtype=torch.float64)
    entered = bound.quantize(INPUT, x)
    assert (x - 1000 * 2.0**-10).abs().max() <= entered.codes[1].min()
    three = max(len(s.summands) + (s.right is not None) for s in p.steps)
    first = bound.addend(entered).acc[1] - entered.codes[1]
    assert three >= 3
    assert first.min() >= (three + 2) * 2.0**-24 * float(x.max())  # conversion, multiplier, product, sums


def test_bound_holds_where_scales_clip() -> None:
    """Ranges of the calibration half are made too small by a tenth of the truth."""
    A = FAMILIES["correlated"].matrices(Shape(2, 8, 16))
    some = Specimens((A[:, :4] / 10).transpose(0, 1), A[:, 4:].transpose(0, 1), {"A": slice(0, 2)})
    m = Trial(plan(chunk_size=16), some).measure("int8")["A"]
    assert m.saturated > 0
    assert m.theory is not None
    assert 0.1 < m.worst <= m.theory


# -- what a measurement is ---------------------------------------------------------------------------------------------


def on_reference(p: Plan, trial: Trial, fmt: IntFormat, A: Tensor) -> Tensor:
    scheme, scales = trial.bound(fmt)
    arithmetic = IntegerArithmetic(scheme, scales, get_backend("reference"))
    T = run_plan(p, arithmetic.quantize(INPUT, A.float()), arithmetic)
    assert T is not None
    return T.real().double() + torch.eye(p.chunk_size).double()


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("method", ["block_merge", "neumann", "newton_schulz"])
def test_errors_are_those_of_the_reference_integers(method: str, name: str) -> None:
    A = FAMILIES["repeated"].matrices(Shape(2, 4, 16), seed=5)
    some = Specimens.of({"A": A})
    p = plan(method, 16)
    trial = Trial(p, some)
    errors = relative_errors(on_reference(p, trial, IntFormat.parse(name), some.A), some.exact)
    m = trial.measure(name)["A"]
    assert (m.worst, m.median) == (float(errors.max()), float(errors.median()))


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    """Together with matrices on which the method overflows, and alone."""
    shape = Shape(2, 4, 64)
    p = plan("cayley_hamilton", 64)
    steep = 60 * UNIFORM.matrices(shape)
    calm = FAMILIES["iid"].matrices(shape)
    for name in ("fp16", "int8"):
        together = Trial(p, Specimens.of({"steep": steep, "calm": calm}, None)).measure(name)
        assert together["steep"].overflow
        alone = measure(p, calm, name, limit=None)
        assert not alone.overflow
        assert together["calm"].worst == alone.worst
        assert together["calm"].worst_to_floor == alone.worst_to_floor


def test_largest_intermediate_is_that_of_exact_arithmetic() -> None:
    """All ones at 16: entries of A^n are up to C(14, n - 1), and Cayley-Hamilton forms n = 1, 2, 4, 8."""
    ones = FAMILIES["ones"].matrices(Shape(1, 2, 16))
    for name in ("fp64", "bf16", "int8"):
        found = measure(plan("cayley_hamilton", 16), ones, name).max_intermediate
        assert found >= math.comb(14, 7)
        assert measure(plan("block_merge", 16, radices=[2] * 4), ones, name).max_intermediate == 1.0


def test_one_matrix_serves_for_both_halves() -> None:
    A = FAMILIES["iid"].matrices(Shape(2, 1, 16))
    some = Specimens.of({"A": A})
    assert torch.equal(some.calibration, some.A)
    assert measure(plan(chunk_size=16), A, "int8").worst > 0


def test_carried_and_finest_schemes_are_measured_without_a_bound() -> None:
    A = FAMILIES["correlated"].matrices(Shape(2, 8, 16))
    carried = SiteScheme(IntFormat(4), granularity=Granularity.FINEST, carry=IntFormat(16))
    chosen = InverseScheme(carried, {"T": SiteScheme(IntFormat(4), granularity=Granularity.FINEST)})
    fine = measure(plan(chunk_size=16), A, "int4", chosen)
    assert fine.theory is None
    assert fine.worst < measure(plan(chunk_size=16), A, "int4").worst


def test_wrong_requests() -> None:
    A = FAMILIES["iid"].matrices(Shape(1, 2, 16))
    with pytest.raises(QDeltaNetError, match="unknown format 'int1'"):
        measure(plan(chunk_size=16), A, "int1")
    with pytest.raises(QDeltaNetError, match="a plan for chunks of 32 on matrices of 16"):
        measure(plan(chunk_size=32), A, "int8")

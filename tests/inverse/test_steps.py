"""Registers of the methods beside the default, and their kinds of steps (factors, sums, columns) in integers."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    KINDS,
    Recording,
    bound_rule,
    collector,
    differing,
    inverse_scheme,
    lower_codes,
    random_A,
    rule_inputs,
    rule_scheme,
    run,
)

from qdeltanet.conformance.inputs import ALL_KINDS, METHOD_PLANS, Kind
from qdeltanet.core import BindingError, IntFormat, ObservingArithmetic, Operand, relative_error
from qdeltanet.delta_rule import bind, make_scales, scale_specs
from qdeltanet.inverse import (
    IDENTITY,
    METHODS,
    Mask,
    Plan,
    Step,
    check_factors,
    invert,
    plan,
    register_ranges,
    run_plan,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["correlated", "equal", "repeated"])
def test_registers_that_a_plan_calls_bounded_are(method: str, family: str) -> None:
    p = plan(method, 32)
    reached = register_ranges(p, random_A(32, family=family))  # beta below 1
    assert all(reached[r] <= 1 + 1e-6 for r in p.bounded if r in reached)


def test_which_registers_are_bounded() -> None:
    written = {"A", "T", *plan("column_sweep", 16).registers}
    assert plan("column_sweep", 16).bounded == written
    assert plan("bunch_hopcroft", 16).bounded == {"A", "T", "N4", "N8", "N16"}
    assert plan("cayley_hamilton", 16).bounded == {"A", "T", "N16"}
    assert plan("newton_schulz", 16).bounded == {"A"}
    assert plan("newton_schulz", 16, start="identity").bounded == {"A", "T"}
    assert plan("newton_schulz", 16, start="identity", iterations=3).bounded == {"A"}
    assert plan("truncated_neumann", 16).bounded == {"A"}
    assert plan("truncated_neumann", 16, order=16).bounded == {"A", "T"}


def test_copies_count_for_their_source() -> None:
    p = plan("newton_schulz", 16, iterations=3)
    assert str(p).splitlines() == [
        "L1 = 0.015873 A masked 1:16",
        "W2 = A @ L1 + A - L1",
        "rW2 = 0.031738 W2 masked 1:16",
        "L2 = L1 @ rW2 + L1 + rW2",
        "W3 = A @ L2 + A - L2",
        "rW3 = 0.0634122 W3 masked 1:16",
        "T = L2 @ rW3 + L2 + rW3",
    ]
    assert p.registers == ("W2", "L2", "W3")
    assert (p.source("rW2"), p.source("L1"), p.source("W2"), p.source("T")) == ("W2", "A", "W2", "T")
    assert p.uses("W2") == {"right", "addend"}
    assert p.uses("A") == {"left", "right", "addend"}
    q = plan("cayley_hamilton", 16)
    assert str(q).splitlines()[:2] == ["N16 = A masked 1:16", "R16_1 = N16 + I"]
    assert q.registers == ("R16_1", "N16^2", "R16_2", "N16^4", "R16_4", "N16^8")
    assert q.uses(IDENTITY) == {"addend"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"right": "A", "factor": 2.0},
        {"addends": (("A", 1),), "factor": 2.0},
        {"right": IDENTITY},
        {"left": IDENTITY},
        {"left": IDENTITY, "right": "A"},
        {"out": IDENTITY},
    ],
)
def test_steps_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="step"):
        Step(**({"out": "T", "mask": Mask(1, 16), "left": "A"} | wrong))  # type: ignore[arg-type]


# -- integers ----------------------------------------------------------------------------------------------------------


def recorded(p: Plan, kind: Kind, bits: int, pattern: str, backend: str) -> tuple[Recording, Operand]:
    scheme, scales = inverse_scheme(p, bits, kind, p.chunk_size)
    held = scheme.sites["A"].held
    assert held is not None
    codes = lower_codes(pattern, p.chunk_size, held)
    ar = Recording(scheme, scales, backend)
    T = run_plan(p, Operand("A", codes.long() if backend == "reference" else codes, scales["A"], held), ar)
    assert T is not None
    return ar, T


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("p", METHOD_PLANS.values(), ids=METHOD_PLANS)
def test_codes_equal_reference_s_at_every_register(p: Plan, kind: str) -> None:
    if p.method == "newton_schulz" and "power_of_two" in kind and p.options["start"] == "scaled":
        with pytest.raises(BindingError, match=r"newton_schulz: register L1 is A times 0\.015873, which is no power"):
            recorded(p, ALL_KINDS[kind], 8, "random", "cpu")
        return
    for bits, pattern in ((4, "random"), (8, "random"), (8, "minus ones"), (16, "random")):
        judge, expected = recorded(p, ALL_KINDS[kind], bits, pattern, "reference")
        for backend in ("cpu", "fake"):
            other, T = recorded(p, ALL_KINDS[kind], bits, pattern, backend)
            assert differing(judge, other) == {}
            assert torch.equal(T.codes.long(), expected.codes)
            assert other.saturated == judge.saturated
        assert not T.codes.triu().any()
        assert T.codes.any() or bits == 4


@pytest.mark.parametrize("kind", ["per_head", "finest", "finest dynamic", "fixed_point finest"])
@pytest.mark.parametrize("name", ["newton", "bunch_hopcroft", "column_sweep"])
def test_the_whole_rule_in_integers(name: str, kind: str) -> None:
    """Bound and calibrated: the scales of a register that is read through a copy are found."""
    inputs, p = rule_inputs(1, 37, 1, 2, 16, 8), METHOD_PLANS[name]
    scheme, scales = bound_rule(inputs, p, 8, ALL_KINDS[kind])
    judge = Recording(scheme, scales, "reference")
    output, _ = run(inputs, p, judge)
    other = Recording(scheme, scales, "cpu")
    assert torch.equal(run(inputs, p, other)[0], output)
    assert differing(judge, other) == {}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_factor_leaves_the_codes_as_they_are(kind: str) -> None:
    """T = (A / 64) A + A / 64 in a scale 64 times smaller has the codes of T = A A + A, a carried A's operand codes
    included: in the scale of A's operands 1 bit of INT8 would be left of A / 64."""
    mask, k = Mask(1, 16), ALL_KINDS[kind]
    square = Plan("square", 16, (Step("T", mask, "A", "A", (("A", 1),)),))
    small = Plan("small", 16, (Step("H", mask, "A", factor=1 / 64), Step("T", mask, "H", "A", (("H", 1),))))
    scheme, scales = inverse_scheme(square, 8, k, 16)
    held = scheme.sites["A"].held
    assert held is not None
    A = Operand("A", (lower_codes("random", 16, held) / 8).round(), scales["A"], held)
    expected = run_plan(square, A, Recording(scheme, scales, "cpu"))
    found = run_plan(small, A, Recording(scheme, scales | {"T": scales["T"] / 64}, "cpu"))
    assert expected is not None
    assert found is not None
    assert torch.equal(found.codes, expected.codes)
    assert found.codes.any()
    assert torch.equal(found.real(), expected.real() / 64)


def test_scales_of_a_register_that_is_read_through_a_copy() -> None:
    p = plan("newton_schulz", 16)
    scheme = bind(rule_scheme(p, 8, KINDS["finest"]), p, 16)
    specs = [s for s in scale_specs(scheme, p) if s.site in ("A", "T") or s.site.startswith("inverse.")]
    assert {"inverse.W2/right", "inverse.W2", "A/left", "A/right"} <= {s.key for s in specs}
    A = random_A(16, heads=2)[None].float()
    amax, observe = collector(specs)
    observing = ObservingArithmetic(observe)
    run_plan(p, observing.quantize("A", A), observing)
    ar = Recording(scheme, make_scales(specs, amax), "cpu")
    T = run_plan(p, ar.quantize("A", A), ar)
    assert T is not None
    exact = torch.linalg.inv(torch.eye(16).double() - A.double()) - torch.eye(16).double()
    # steps of INT8 are 1/127 of the largest entry of a row, half of that the rounding of each product
    assert float(relative_error(exact, T.real().double()).max()) < 0.01


def test_factors_and_the_mode_power_of_two() -> None:
    p, q = plan("newton_schulz", 16), plan("newton_schulz", 16, start="identity")
    for mode in ("float", "fixed_point"):
        check_factors(p, mode)
    check_factors(q, "power_of_two")
    halves = Plan("halves", 16, (Step("H", Mask(1, 16), "A", factor=0.5), Step("T", Mask(1, 16), "H")))
    check_factors(halves, "power_of_two")
    A = random_A(16)
    assert torch.equal(invert(A, halves), A / 2 + torch.eye(16).double())
    with pytest.raises(BindingError, match="use requantize: float or fixed_point, or another method"):
        bind(rule_scheme(p, 8, ALL_KINDS["power_of_two"]), p, 16)


def test_the_identity_is_added_with_its_own_scale() -> None:
    """A + I in codes: 1 / scale on the diagonal."""
    mask = Mask(1, 16, diagonal=True)
    p = Plan("shifted", 16, (Step("R", mask, "A", None, ((IDENTITY, 1),)), Step("T", Mask(1, 16), "R", "R")))
    scheme, scales = inverse_scheme(p, 8, Kind(), 16)
    scales |= {"inverse.R": torch.full((1, 1, 1), 1 / 64)}
    ar = Recording(scheme, scales, "reference")
    run_plan(p, Operand("A", lower_codes("zero", 16, IntFormat(8)).long(), scales["A"], IntFormat(8)), ar)
    codes = next(codes for site, codes, _ in ar.seen if site == "inverse.R")
    assert torch.equal(codes.long().flatten(0, -3)[0], 64 * torch.eye(16).long())

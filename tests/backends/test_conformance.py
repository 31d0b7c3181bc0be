"""The law: same codes, scales and plan, same output codes on every backend, every element, at every site."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    FORMATS,
    INTEGER_KINDS,
    KINDS,
    PATTERNS,
    PLANS,
    Inputs,
    Recording,
    adversarial_inputs,
    bound_rule,
    differing,
    float_rule,
    inverse_scheme,
    lower_codes,
    rule_inputs,
    run,
)
from torch import Tensor

from qdeltanet.core import (
    IntFormat,
    NonFiniteError,
    Operand,
    RuleScheme,
    SiteScheme,
    relative_error,
    sqnr,
)
from qdeltanet.inverse import Plan, plan, run_plan, site_of

FAST = ("cpu", "fake")
CASES = [(name, bits) for name in KINDS for bits in FORMATS]
CASES += [(name, bits) for name in INTEGER_KINDS for bits in FORMATS]


def compare(inputs: Inputs, p: Plan, scheme: RuleScheme, scales: dict[str, Tensor], normalise: bool = True) -> Tensor:
    """Reference output; every fast backend must agree with it at every site."""
    judge = Recording(scheme, scales, "reference")
    output, state = run(inputs, p, judge, normalise=normalise)
    for backend in FAST:
        other = Recording(scheme, scales, backend)
        got, got_state = run(inputs, p, other, normalise=normalise)
        assert differing(judge, other) == {}
        assert torch.equal(got, output)
        assert torch.equal(got_state.codes.long(), state.codes)
        assert other.saturated == judge.saturated
    return output


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", PLANS.values(), ids=PLANS)
def test_whole_rule_on_random_inputs(p: Plan, kind: str, bits: int) -> None:
    inputs = rule_inputs(2, 2 * p.chunk_size + 5, 1, 2, 16, 8, seed=bits)
    scheme, scales = bound_rule(inputs, p, bits, KINDS[kind])
    output = compare(inputs, p, scheme, scales)
    if bits >= 8 and p is PLANS["radix 2"]:
        assert sqnr(float_rule(inputs), output) > 25  # and it is the right thing that agrees


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("p", PLANS.values(), ids=PLANS)
def test_whole_rule_in_fixed_point_and_powers_of_two(p: Plan, kind: str, bits: int) -> None:
    inputs = rule_inputs(2, 2 * p.chunk_size + 5, 1, 2, 16, 8, seed=bits)
    scheme, scales = bound_rule(inputs, p, bits, INTEGER_KINDS[kind])
    compare(inputs, p, scheme, scales)


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_whole_rule_on_adversarial_inputs(kind: str, bits: int) -> None:
    k = (KINDS | INTEGER_KINDS)[kind]
    p = PLANS["radix 2"]
    # static scales come from other data: most of these inputs saturate somewhere
    scheme, scales = bound_rule(rule_inputs(2, 64, 1, 2, 16, 8), p, bits, k)
    clipped = 0
    for name, inputs in adversarial_inputs().items():
        if name == "all max" and k.scale == "dynamic":
            continue
        output = compare(inputs, p, scheme, scales, normalise=False)
        assert output.isfinite().all()
        judge = Recording(scheme, scales, "reference")
        run(inputs, p, judge, normalise=False)
        clipped += sum(judge.saturated.values())
    assert (clipped > 0) == (k.scale != "dynamic")


@pytest.mark.parametrize("kind", [k for k in KINDS if "dynamic" in k])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_numbers_that_leave_float32_are_refused(backend: str, kind: str) -> None:
    inputs = adversarial_inputs()["all max"]
    p = PLANS["radix 2"]
    scheme, scales = bound_rule(inputs, p, 8, KINDS[kind])
    with pytest.raises(NonFiniteError, match=r"site \w+: NaN or Inf"):
        run(inputs, p, Recording(scheme, scales, backend), normalise=False)


@pytest.mark.parametrize(("kind", "bits"), CASES)
@pytest.mark.parametrize("p", PLANS.values(), ids=PLANS)
def test_inverse_plans_on_adversarial_codes(p: Plan, kind: str, bits: int) -> None:
    k = (KINDS | INTEGER_KINDS)[kind]
    size = p.chunk_size
    scheme, scales = inverse_scheme(p, bits, k, size)
    held = scheme.sites["A"].held
    assert held is not None
    for pattern in PATTERNS:
        A = Operand("A", lower_codes(pattern, size, held), torch.full((1, 1, 1), 1.0) / held.qmax, held)
        judge = Recording(scheme, scales, "reference")
        expected = run_plan(p, A, judge)
        assert expected is not None
        assert not expected.codes.triu().any()
        for backend in FAST:
            other = Recording(scheme, scales, backend)
            got = run_plan(p, A, other)
            assert got is not None
            assert differing(judge, other) == {}, (pattern, backend)
            assert torch.equal(got.codes.long(), expected.codes)


def test_the_inverse_of_minus_ones_is_exact_in_int8() -> None:
    """Radix 2 keeps A = -ones exact: T - I has -1 on the first sub-diagonal and nothing else."""
    p = plan("block_merge", 64)
    sites = {s: SiteScheme(IntFormat(8), "bound") for s in ["A", "T", *(site_of(r) for r in p.registers)]}
    one = torch.ones(1, 1, 1) / 127
    A = Operand("A", lower_codes("minus ones", 64, IntFormat(8)), one, IntFormat(8))
    T = run_plan(p, A, Recording(RuleScheme(sites), dict.fromkeys(sites, one), "cpu"))
    assert T is not None
    assert torch.equal(T.codes[0, 0], torch.diag(torch.full((63,), -127.0), -1))


def test_a_wrong_backend_would_be_caught() -> None:
    """The comparison feels one code in one site."""
    p = PLANS["radix 2"]
    inputs = rule_inputs(1, 64)
    scheme, scales = bound_rule(inputs, p, 8, KINDS["per_head"])
    a, b = Recording(scheme, scales, "reference"), Recording(scheme, scales, "cpu")
    run(inputs, p, a)
    nudged = tuple(x.clone() for x in inputs)
    nudged[2][0, 3, 0, 0] += 0.2
    run(nudged, p, b)  # type: ignore[arg-type]
    found = differing(a, b)
    assert found["v_beta"] > 0
    assert "A" not in found


def test_relative_error_of_the_int8_inverse_is_near_its_floor() -> None:
    """With A as the codes say, what is left is the rounding of registers: a few steps of 1/127."""
    p = plan("block_merge", 64)
    from helpers import random_A

    A = random_A(64, family="correlated", heads=2).float()
    scale = A.abs().amax((-1, -2), keepdim=True) / 127
    codes = torch.round(A / scale)
    sites = {s: SiteScheme(IntFormat(8), "dynamic") for s in ["A", "T", *(site_of(r) for r in p.registers)]}
    T = run_plan(p, Operand("A", codes, scale, IntFormat(8)), Recording(RuleScheme(sites), {}, "cpu"))
    assert T is not None
    eye = torch.eye(64, dtype=torch.float64)
    exact = torch.linalg.inv(eye - (codes * scale).double())
    assert float(relative_error(exact, T.real().double() + eye).max()) < 0.03

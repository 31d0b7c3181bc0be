"""Backend `triton` in Triton's interpreter: every element equals `reference`. `test_triton.py` runs this file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_A
from torch import Tensor

from qdeltanet.backends.reference import ReferenceBackend
from qdeltanet.backends.triton import triton_status
from qdeltanet.backends.triton.backend import TritonBackend, declines, float_inverse
from qdeltanet.backends.triton.float_form import TYPES
from qdeltanet.conformance.inputs import (
    ALL_KINDS,
    FORMATS,
    PATTERNS,
    PLANS,
    Inputs,
    Kind,
    adversarial_inputs,
    bound_rule,
    inverse_scheme,
    lower_codes,
    rule_inputs,
    run,
)
from qdeltanet.core import (
    Granularity,
    IntegerArithmetic,
    IntFormat,
    NonFiniteError,
    Operand,
    QDeltaNetError,
    RuleScheme,
    SiteScheme,
    exact_matmul,
    relative_error,
)
from qdeltanet.inverse import Plan, invert, plan, run_plan

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts"

FUSED = {"front", "back"}
DECLINED = "per_tensor dynamic"
# Each kind meets every format, each plan every kind; wide formats without a kernel are slow here.
CASES = [
    (p, kind, 8 if kind == DECLINED else FORMATS[(n + m) % len(FORMATS)])
    for n, p in enumerate(PLANS)
    for m, kind in enumerate(ALL_KINDS)
]


class Watched(IntegerArithmetic):
    """Remembers which fused kernels ran."""

    def __init__(self, scheme: RuleScheme, scales: dict[str, Tensor]) -> None:
        super().__init__(scheme, scales, TritonBackend())
        self.ran: set[str] = set()

    def fused(self, kernel: str, *arguments: Any) -> Any:
        result = super().fused(kernel, *arguments)
        self.ran |= set() if result is None else {kernel}
        return result


def check_rule(
    p: Plan, scheme: RuleScheme, scales: dict[str, Tensor], inputs: Inputs, normalise: bool = True
) -> Watched:
    """Output, state, its scale and every count equal reference's."""
    judge, ours = IntegerArithmetic(scheme, scales, ReferenceBackend()), Watched(scheme, scales)
    expected, state = run(inputs, p, judge, normalise=normalise)
    output, got = run(inputs, p, ours, normalise=normalise)
    assert torch.equal(output, expected)
    assert torch.equal(got.codes.long(), state.codes)
    assert got.scale is not None
    assert state.scale is not None
    assert torch.equal(got.scale, state.scale)
    assert ours.saturated == judge.saturated
    return ours


def check_plan(p: Plan, scheme: RuleScheme, scales: dict[str, Tensor], A: Operand) -> Watched:
    """T, its scale and every count equal reference's."""
    judge, ours = IntegerArithmetic(scheme, scales, ReferenceBackend()), Watched(scheme, scales)
    expected, got = run_plan(p, replace(A, codes=A.codes.long()), judge), run_plan(p, A, ours)
    assert expected is not None
    assert got is not None
    assert torch.equal(got.codes.long(), expected.codes)
    assert got.scale is not None
    assert expected.scale is not None
    assert torch.equal(got.scale, expected.scale)
    assert ours.saturated == judge.saturated
    return ours


def test_it_is_available_here() -> None:
    available, reason = triton_status()
    assert available
    assert "interpreter" in reason


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", FORMATS)
@pytest.mark.parametrize("left", FORMATS)
def test_products_are_exact(left: int, right: int) -> None:
    a, b = IntFormat(left), IntFormat(right)
    make = torch.Generator().manual_seed(left * 16 + right)
    x = torch.randint(-a.qmax, a.qmax + 1, (2, 1, 33, 20), generator=make)
    y = torch.randint(-b.qmax, b.qmax + 1, (3, 5, 20), generator=make)
    x[0, 0, 0], y[0, 0] = a.qmax, -b.qmax
    container = (torch.int64, torch.float32, torch.float64)[left // 2 % 3]
    got = TritonBackend().matmul(x.to(container), y.to(container).mT, a.qmax, b.qmax)
    assert got.dtype == (torch.float32 if 20 * a.qmax * b.qmax <= 2**24 else torch.float64)
    assert torch.equal(got.long(), exact_matmul(x, y.mT))


def test_products_of_odd_views() -> None:
    x = torch.randint(-127, 128, (4, 40, 130)).float()
    backend = TritonBackend()
    assert torch.equal(
        backend.matmul(x[:, ::3, 1::2], x[:, 5:6, 1::2].mT, 127, 127), x[:, ::3, 1::2] @ x[:, 5:6, 1::2].mT
    )
    assert backend.matmul(x[:, :0], x.mT, 127, 127).shape == (4, 0, 40)
    assert not backend.matmul(x[:, :, :0], x[:, :, :0].mT, 127, 127).any()
    assert backend.matmul(x[0], x[1].mT, 127, 127).shape == (40, 40)


def test_a_product_longer_than_an_int32_accumulator() -> None:
    inner = 2**31 // 127**2 + 10
    x = torch.full((1, inner), 127.0)
    assert float(TritonBackend().matmul(x, -x.mT, 127, 127)) == -inner * 127**2


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "bits"), CASES)
def test_plans_on_adversarial_codes(name: str, kind: str, bits: int) -> None:
    p = PLANS[name]
    scheme, scales = inverse_scheme(p, bits, ALL_KINDS[kind], p.chunk_size)
    held = scheme.sites["A"].held
    assert held is not None
    first = list(ALL_KINDS).index(kind)
    patterns = [PATTERNS[(first + n) % len(PATTERNS)] for n in (0, 2, 4)]
    codes = torch.cat([lower_codes(pattern, p.chunk_size, held) for pattern in patterns])
    ours = check_plan(p, scheme, scales, Operand("A", codes, torch.full((1, 1, 1), 1.0) / held.qmax, held))
    assert ours.ran == (set() if kind == DECLINED else {"run_plan"})


def test_static_scales_of_rows_and_columns() -> None:
    """Registers that are not carried but keep an axis, and T with a scale per channel."""
    p = PLANS["radix 2"]
    make = torch.Generator().manual_seed(1)
    sites, scales = {}, {}
    for site in ("A", "T", *(f"inverse.{r}" for r in p.registers)):
        rows = p.uses(site.removeprefix("inverse.")) == {"left"}
        granularity = (
            Granularity.PER_TOKEN if rows else Granularity.PER_CHANNEL if site == "T" else Granularity.PER_HEAD
        )
        shape = {Granularity.PER_TOKEN: (2, 32, 1), Granularity.PER_CHANNEL: (2, 1, 32)}.get(granularity, (2, 1, 1))
        sites[site] = SiteScheme(IntFormat(8), "calibrated", granularity)
        scales[site] = (0.5 + torch.rand(shape, generator=make)) / 127
    A = Operand("A", lower_codes("random", 32, IntFormat(8)), scales["A"], IntFormat(8))
    assert check_plan(p, RuleScheme(sites), scales, A).ran == {"run_plan"}


@pytest.mark.parametrize("mixed", ["A", "T", "inverse.N8", "inverse.L16"])
def test_a_dynamic_scale_among_static_ones(mixed: str) -> None:
    p = PLANS["radix 2"]
    scheme, scales = inverse_scheme(p, 8, ALL_KINDS["per_head"], 32)
    sites = dict(scheme.sites) | {mixed: SiteScheme(IntFormat(8), "dynamic")}
    codes = torch.cat([lower_codes(pattern, 32, IntFormat(8)) for pattern in ("random", "sub-diagonal")])
    scale = 0.1 + torch.rand(2, 2, 1, 1) / 127 if mixed == "A" else torch.full((1, 1, 1), 1 / 127)
    assert check_plan(p, replace(scheme, sites=sites), scales, Operand("A", codes, scale, IntFormat(8))).ran


@pytest.mark.parametrize("kind", ["per_head", "finest dynamic"])
def test_a_plan_of_64_tokens(kind: str) -> None:
    p = plan("block_merge", 64)
    scheme, scales = inverse_scheme(p, 8, ALL_KINDS[kind], 64)
    held = scheme.sites["A"].held
    assert held is not None
    A = Operand("A", lower_codes("random", 64, held), torch.full((1, 1, 1), 1.0) / held.qmax, held)
    assert check_plan(p, scheme, scales, A).ran == {"run_plan"}


def test_scales_that_change_in_place_are_seen() -> None:
    p = PLANS["cayley"]
    scheme, scales = inverse_scheme(p, 8, ALL_KINDS["per_head"], 16)
    A = Operand("A", lower_codes("random", 16, IntFormat(8)), scales["A"], IntFormat(8))
    ours = Watched(scheme, scales)
    before = run_plan(p, A, ours)
    scales["T"].mul_(2)
    after = run_plan(p, A, ours)
    expected = run_plan(p, A, IntegerArithmetic(scheme, scales, ReferenceBackend()))
    assert before is not None
    assert after is not None
    assert expected is not None
    assert not torch.equal(before.codes, after.codes)
    assert torch.equal(after.codes.long(), expected.codes.long())


# -- the whole rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "bits"), CASES)
def test_whole_rule(name: str, kind: str, bits: int) -> None:
    p = PLANS[name]
    # one padded chunk, and one plan over two
    inputs = rule_inputs(1, p.chunk_size + (5 if name == "radix 2" else -3), 1, 2, 16, 8, seed=bits)
    scheme, scales = bound_rule(inputs, p, bits, ALL_KINDS[kind])
    assert check_rule(p, scheme, scales, inputs).ran == (set() if kind == DECLINED else FUSED)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_whole_rule_on_adversarial_inputs(kind: str) -> None:
    k, p = ALL_KINDS[kind], PLANS["radix 2"]
    scheme, scales = bound_rule(rule_inputs(2, 64, 1, 2, 16, 8), p, 8, k)
    several = [x for name, x in adversarial_inputs(32).items() if name != "all max" or k.scale != "dynamic"]
    inputs: Any = tuple(torch.cat(x) for x in zip(*several, strict=True))
    ours = check_rule(p, scheme, scales, inputs, normalise=False)
    assert bool(ours.saturated) == (k.scale != "dynamic")


@pytest.mark.parametrize("kind", ["per_head", "finest", "finest dynamic", "fixed_point"])
def test_grouped_heads_of_odd_sizes(kind: str) -> None:
    inputs = rule_inputs(2, 13, 2, 4, 20, 5)
    p = PLANS["cayley"]
    scheme, scales = bound_rule(inputs, p, 8, ALL_KINDS[kind])
    assert check_rule(p, scheme, scales, inputs).ran == FUSED


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if "dynamic" in k])
def test_numbers_that_leave_float32_are_refused_as_by_reference(kind: str) -> None:
    inputs, p = adversarial_inputs()["all max"], PLANS["radix 2"]
    scheme, scales = bound_rule(inputs, p, 8, ALL_KINDS[kind])
    sites = []
    for backend in (ReferenceBackend(), TritonBackend()):
        with pytest.raises(NonFiniteError) as e:
            run(inputs, p, IntegerArithmetic(scheme, scales, backend), normalise=False)
        sites.append(e.value.site)
    assert sites[0] == sites[1]


@pytest.mark.parametrize(("spoil", "message"), [(lambda x: x * 3, "beta reaches"), (lambda x: x * torch.nan, "NaN")])
def test_a_write_decay_out_of_range_is_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    q, k, v, g, _ = inputs = rule_inputs(1, 32, 1, 2, 16, 8)
    scheme, scales = bound_rule(inputs, PLANS["radix 2"], 8, ALL_KINDS["per_head"])
    spoiled = (q, k, v, g, spoil(torch.ones_like(g)))
    with pytest.raises(QDeltaNetError, match=message):
        run(spoiled, PLANS["radix 2"], IntegerArithmetic(scheme, scales, TritonBackend()))


def test_the_comparison_feels_one_code() -> None:
    p = PLANS["radix 2"]
    scheme, scales = inverse_scheme(p, 8, ALL_KINDS["per_head"], 32)
    codes = lower_codes("random", 32, IntFormat(8))
    A = Operand("A", codes, scales["A"], IntFormat(8))
    judge = run_plan(p, A, IntegerArithmetic(scheme, scales, ReferenceBackend()))
    nudged = codes.clone()
    nudged[0, 0, 20, 10] += 1
    got = run_plan(p, replace(A, codes=nudged), Watched(scheme, scales))
    assert judge is not None
    assert got is not None
    assert not torch.equal(judge.codes.long(), got.codes.long())


# -- what declines -----------------------------------------------------------------------------------------------------


def test_reasons_to_decline() -> None:
    p = PLANS["radix 2"]
    scheme, _ = bound_rule(rule_inputs(1, 32), p, 8, ALL_KINDS["per_head"])

    def reason(q: Plan = p, **sites: SiteScheme) -> str | None:
        known = {s: SiteScheme(IntFormat(8)) for r in q.registers for s in [f"inverse.{r}"]}
        return declines(q, replace(scheme, sites=known | dict(scheme.sites) | sites))

    assert reason() is None
    assert "chunk size 8" in str(reason(plan("block_merge", 8)))
    assert "63 steps" in str(reason(plan("forward_substitution", 64)))
    assert "without steps" in str(reason(plan("identity", 32)))
    for q in (
        plan("bunch_hopcroft", 16),
        plan("cayley_hamilton", 16),
        plan("newton_schulz", 16),
        plan("column_sweep", 16),
    ):
        assert "a kernel takes products, and copies without a factor" in str(reason(q))
    assert reason(plan("newton_schulz", 16, start="identity")) is None
    assert reason(plan("truncated_neumann", 16, order=6)) is None
    assert "spans heads" in str(reason(A=SiteScheme(IntFormat(8), "dynamic", Granularity.PER_TENSOR)))
    assert "no integer format" in str(reason(T=SiteScheme(None)))
    assert "carried T" in str(reason(T=SiteScheme(IntFormat(8), carry=IntFormat(16))))


def test_gradients_and_empty_tensors_are_left_to_the_steps() -> None:
    p = PLANS["cayley"]
    scheme, scales = inverse_scheme(p, 8, Kind(), 16)
    kernel = TritonBackend.kernels["run_plan"]
    for codes in (lower_codes("random", 16, IntFormat(8)).requires_grad_(), torch.zeros(0, 2, 16, 16)):
        assert kernel(Watched(scheme, scales), p, Operand("A", codes, scales["A"], IntFormat(8))) is None


# -- the float form ----------------------------------------------------------------------------------------------------

# A few times the unit roundoff: registers are rounded after each of a plan's products, and powers stay small.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["radix 2", "radix 4, 8", "substitution"])
def test_float_form(name: str, dtype: torch.dtype) -> None:
    p = PLANS[name]
    A = random_A(p.chunk_size).float()
    T = float_inverse(A, p, dtype)
    exact = invert(A.double(), p)
    assert T.dtype == torch.float32
    assert float(relative_error(exact, T.double()).max()) < TOLERANCES[dtype]
    assert torch.equal(T.triu(), torch.eye(p.chunk_size).expand_as(T))
    half = float_inverse(A.to(torch.bfloat16), p)
    assert half.dtype == torch.bfloat16
    assert float(relative_error(exact, half.double()).max()) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("name", ["cayley", "neumann", "neumann 9"])
def test_float_form_of_plans_whose_powers_grow(name: str) -> None:
    """Of a small A, in float32: the dataflow is right."""
    p = PLANS[name]
    A = random_A(p.chunk_size).float() / 4
    assert float(relative_error(invert(A.double(), p), float_inverse(A, p, torch.float32).double()).max()) < 1e-6


def test_float_form_refuses() -> None:
    A = torch.zeros(2, 32, 32)
    for arguments, message in [
        ((A, plan("block_merge", 8)), "the plan takes"),
        ((A.long(), PLANS["radix 2"]), "in floats"),
        ((A, PLANS["radix 2"], torch.float64), "held in bfloat16"),
        ((torch.zeros(2, 64, 64), plan("forward_substitution", 64)), "63 steps"),
    ]:
        with pytest.raises(QDeltaNetError, match=message):
            float_inverse(*arguments)

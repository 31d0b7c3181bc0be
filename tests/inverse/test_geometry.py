"""Skipping what is exactly zero changes nothing: plans against a naive runner on full matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import random_A
from torch import Tensor

from qdeltanet.backends import get_backend
from qdeltanet.core import (
    IntegerArithmetic,
    IntFormat,
    Mode,
    Operand,
    RuleScheme,
    SiteScheme,
    Target,
    Term,
    power_of_two_ceil,
    product_bound,
    requantize,
)
from qdeltanet.inverse import Plan, invert, plan, run_plan, site_of
from qdeltanet.inverse.geometry import geometry

HEADS = 2
PLANS = [
    plan("block_merge", 16),
    plan("block_merge", 64),
    plan("block_merge", 128),
    plan("block_merge", 64, radices=[2] * 6),
    plan("block_merge", 64, radices=[4, 4, 4], join="powers"),
    plan("block_merge", 64, radices=[2, 8, 4], join="powers"),
    plan("block_merge", 64, radices=[64], join="powers"),
    plan("block_merge", 32, radices=[8, 4], join="powers"),
    plan("block_merge", 64, radices=[2, 8, 4]),
    plan("block_merge", 64, radices=[64]),
    plan("neumann", 16),
    plan("neumann", 64),
    plan("neumann", 64, order=5, band=2, residual_steps=7),
    plan("neumann", 64, order=2, band=1, residual_steps=1),
    plan("neumann", 64, residual_steps=9),
    plan("neumann", 128),
    plan("neumann", 128, residual_steps=1),
    plan("forward_substitution", 16),
    plan("bunch_hopcroft", 16),
    plan("block_merge", 64, radices=[4, 2, 8], join="powers", diagonal="explicit"),
    plan("cayley_hamilton", 16),
    plan("mixed", 32, leaf=8),
    plan("bunch_hopcroft", 128),
    plan("neumann", 32, band="none", residual_sum="linear", residual_steps=4, block=16),
    plan("truncated_neumann", 16, order=6),
    plan("newton_schulz", 16),
    plan("newton_schulz", 16, start="identity"),
    plan("column_sweep", 16),
]
# what rescales by numbers that are no powers of two has no place in the mode power_of_two
SCALED = plan("newton_schulz", 16)


def name(p: Plan) -> str:
    return "-".join([p.method, str(p.chunk_size), *map(str, p.options.values())])


def naive_float(p: Plan, A: Tensor) -> Tensor:
    registers = {"A": A, "I": torch.eye(p.chunk_size, dtype=A.dtype)}
    for step in p.steps:
        mask = step.mask.matrix(p.chunk_size).to(A.dtype)
        total = registers[step.left] if step.right is None else registers[step.left] @ registers[step.right]
        for register, sign in step.addends:
            total = total + sign * registers[register]
        registers[step.out] = total * mask * step.factor
    return registers["T"]


@pytest.mark.parametrize("p", PLANS, ids=name)
def test_in_floating_point(p: Plan) -> None:
    A = random_A(p.chunk_size, heads=HEADS, width=64)
    eye = torch.eye(p.chunk_size, dtype=A.dtype)
    expected = naive_float(p, A)
    assert float((invert(A, p) - eye - expected).abs().max()) <= 1e-13 * max(1.0, float(expected.abs().max()))


def naive_integer(p: Plan, A: Tensor, fmt: IntFormat, scales: dict[str, Tensor], mode: Mode) -> dict[str, Tensor]:
    """Full int64 products, masks on full matrices. A copy inherits codes and scale, except into T. Codes by name."""
    eye = torch.eye(p.chunk_size).long()
    registers = {"A": (A, scales["A"]), "I": (eye.expand_as(A), torch.ones(1, 1, 1))}

    def term(register: str, sign: int = 1) -> Term:
        codes, scale = registers[register]
        return Term(codes, (scale,), sign, 1 if register == "I" else fmt.qmax)

    for step in p.steps:
        mask = step.mask.matrix(p.chunk_size)
        codes, scale = registers[step.left]
        if step.is_copy:
            scale = scale * torch.tensor(step.factor, dtype=torch.float32)
            registers[step.out] = codes * mask.long(), scale
            if step.out != "T":
                continue
            terms = [Term(codes, (scale,), 1, fmt.qmax)]
        elif step.right is None:
            terms = [term(r, sign) for r, sign in ((step.left, 1), *step.addends)]
        else:
            right, right_scale = registers[step.right]
            terms = [Term(codes @ right, (scale, right_scale), bound=product_bound(p.chunk_size, fmt, fmt))]
            terms += [term(r, sign) for r, sign in step.addends]
        out_scale = scales[site_of(step.out)]
        result = requantize(terms, Target(fmt, out_scale, mode, mask=mask))
        registers[step.out] = result.codes.long(), out_scale
    return {k: v[0] for k, v in registers.items()}


FORMATS: tuple[tuple[int, Mode], ...] = (
    (4, "float"), (8, "float"), (16, "float"), (8, "fixed_point"), (16, "fixed_point"), (6, "power_of_two"),
)  # fmt: skip
# at 128 the slow side of the comparison takes seconds
CASES = [
    pytest.param(p, bits, mode, id=f"{name(p)}-int{bits}-{mode}")
    for p in PLANS
    for bits, mode in FORMATS
    if (p.chunk_size < 128 or bits == 8) and not (mode == "power_of_two" and p == SCALED)
]


@pytest.mark.parametrize(("p", "bits", "mode"), CASES)
def test_in_integers_to_the_bit(p: Plan, bits: int, mode: Mode) -> None:
    fmt = IntFormat(bits)
    make = torch.Generator().manual_seed(bits)
    # codes all over the grid, unequal scales per head: most registers use their range, some saturate
    A = torch.randint(-fmt.qmax, fmt.qmax + 1, (HEADS, p.chunk_size, p.chunk_size), generator=make).tril(-1)
    sites = ["A", "T", *(site_of(r) for r in p.registers)]
    scales = {s: (0.2 + torch.rand(HEADS, 1, 1, generator=make)) / fmt.qmax for s in sites}
    if mode == "power_of_two":
        scales = {s: power_of_two_ceil(x) for s, x in scales.items()}
    expected = naive_integer(p, A, fmt, scales, mode)["T"]

    scheme = RuleScheme({s: SiteScheme(fmt) for s in sites}, requantize=mode)
    ar = IntegerArithmetic(scheme, scales, get_backend("reference"))
    T = run_plan(p, Operand("A", A.float(), scales["A"], fmt), ar)
    assert T is not None
    assert int((T.codes != expected).sum()) == 0
    assert torch.equal(T.scale, scales["T"])
    assert expected.abs().max() > 0
    assert int((expected * ~torch.ones(p.chunk_size, p.chunk_size).bool().tril(-1)).abs().max()) == 0


def test_parts_are_what_can_meet_something() -> None:
    """A definition, not an optimisation: the dynamic scale of a carried operand is that of its part."""
    first, second = geometry(plan("block_merge", 4, radices=[2, 2]))[1:]
    assert first is not None
    assert second is not None
    # N4 = L2 @ A: L2 has one entry, (3, 2), which meets row 2 of A alone
    assert first.left == (slice(3, 4), slice(2, 3))
    assert first.right == (slice(2, 3), slice(0, 2))
    # L4 = N4 @ L2: of L2 the entry (1, 0)
    assert second.left == (slice(2, 4), slice(1, 2))
    assert second.right == (slice(1, 2), slice(0, 1))

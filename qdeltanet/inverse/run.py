"""Run a plan over an arithmetic: the float, fake-quantized, integer and observing runner are this one loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core import (
    Arithmetic,
    FloatArithmetic,
    ObservingArithmetic,
    Operand,
    Region,
    Term,
    check_codes,
    diagonal_blocks,
    whole,
)
from .geometry import StepGeometry, geometry
from .joins import head_length, joined
from .plan import INPUT, OUTPUT, Mask, Plan, Step, cached_mask


def site_of(register: str) -> str:
    """Site name of a register: A and T are sites of the rule, the others `inverse.<register>`."""
    return register if register in (INPUT, OUTPUT) else f"inverse.{register}"


def run_plan(plan: Plan, A: Operand, arithmetic: Arithmetic) -> Operand | None:
    """T - I for the strictly lower A, both [..., H, C, C]; None for the empty plan (T = I).

    Registers are held as their blocks on the diagonal, and a product takes only the rows and columns that can be
    non-zero; what is skipped is exact zeros, so the codes equal those of full products.
    """
    check_codes(A)
    return run_steps(plan, A, arithmetic)


def run_steps(plan: Plan, A: Operand, arithmetic: Arithmetic) -> Operand | None:
    """`run_plan` for codes that a site has just been given."""
    fused: Operand | None = arithmetic.fused("run_plan", plan, A) if plan.steps else None
    if fused is not None:
        return fused
    if type(arithmetic) is FloatArithmetic and _joins(plan, A.codes):
        T = _run_joined(plan, A.codes)
        T.diagonal(dim1=-2, dim2=-1).zero_()
        return Operand(OUTPUT, T)
    registers = _run_steps(plan, len(plan.steps), A, arithmetic)
    return whole(registers[OUTPUT]) if plan.steps else None


def _run_steps(plan: Plan, steps: int, A: Operand, arithmetic: Arithmetic) -> dict[str, Operand]:
    """Registers after the first `steps` steps."""
    registers = {INPUT: A}
    for step, where in list(zip(plan.steps, geometry(plan), strict=True))[:steps]:
        run = (
            _copy(step, registers, arithmetic) if where is None else _multiply(plan, step, where, registers, arithmetic)
        )
        registers[step.out] = run
    return registers


def _run_joined(plan: Plan, A: Tensor) -> Tensor:
    """T with its diagonal: the steps before the joins as ever, then the joins."""
    head, size = head_length(plan), plan.chunk_size
    last = plan.steps[head - 1]
    merged: Tensor | None = None
    if head > 1 or not last.is_copy:
        register = _run_steps(plan, head, Operand(INPUT, A), FloatArithmetic())[last.out]
        blocks = diagonal_blocks(register, last.mask.outer).codes
        merged = blocks.reshape(-1, *blocks.shape[-3:])
    return joined(A.reshape(-1, size, size), merged, last.mask.outer).view(A.shape)


def _joins(plan: Plan, A: Tensor) -> bool:
    """Whether the float reader of joins takes a plan; it writes in place, which autograd would not survive."""
    return 0 < head_length(plan) < len(plan.steps) and not A.requires_grad


def invert(A: Tensor, plan: Plan) -> Tensor:
    """(I - A)^-1 in floating point by a plan. A: [..., C, C], strictly lower; returns T with its diagonal."""
    if _joins(plan, A):
        return _run_joined(plan, A)
    T = run_plan(plan, Operand(INPUT, A), FloatArithmetic())
    if T is None:
        return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    own = T.codes.untyped_storage().data_ptr() != A.untyped_storage().data_ptr()  # a plan of copies hands A on
    result = T.codes if own and not T.codes.requires_grad else T.codes.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def register_ranges(plan: Plan, A: Tensor) -> dict[str, float]:
    """Range analysis: the largest |entry| that each register reaches for A [..., C, C], in A's dtype.

    Non-finite entries (a method that overflows) are reported as they are.
    """
    reached: dict[str, float] = {INPUT: float(A.abs().amax())}

    def observe(site: str, x: Tensor, compact: bool) -> None:
        name = site.removeprefix("inverse.")
        top = float(x.abs().amax())
        reached[name] = top if top != top else max(top, reached.get(name, 0.0))

    run_plan(plan, Operand(INPUT, A), ObservingArithmetic(observe))
    return reached


def _copy(step: Step, registers: dict[str, Operand], arithmetic: Arithmetic) -> Operand:
    """Codes and scale of the source, masked. Blocks of the strictly lower triangle need no mask.

    T is a site of its own: a copy into it is stored like a sum, with the scale of T.
    """
    source = diagonal_blocks(registers[step.left], step.mask.outer)
    triangle = step.mask.inner == 1 and step.mask.band is None and step.mask.rows is None
    mask = None if triangle else cached_mask(step.mask, step.mask.outer, source.codes.device)
    if step.out == OUTPUT:
        return arithmetic.store(OUTPUT, [arithmetic.addend(source)], mask=mask, compact=True)
    return source if mask is None else replace(source, codes=source.codes * mask.to(source.codes.dtype))


def _multiply(
    plan: Plan, step: Step, where: StepGeometry, registers: dict[str, Operand], arithmetic: Arithmetic
) -> Operand:
    assert step.right is not None
    outer = step.mask.outer
    left, right = registers[step.left], registers[step.right]
    parts = where.left, where.right
    terms = [arithmetic.product(left, right, region=where.product, parts=parts, size=outer)]
    keeps_all = step.mask == Mask(1, outer)
    terms += [
        _addend(registers[register], sign, outer, region, arithmetic, keeps_all)
        for (register, sign), region in zip(step.addends, where.addends, strict=True)
    ]
    mask = cached_mask(step.mask, outer, left.codes.device) if where.masked else None
    lead = left.codes.shape[: -3 if left.compact else -2]
    shape = (*lead, plan.chunk_size // outer, outer, outer)
    return arithmetic.store(site_of(step.out), terms, shape=shape, mask=mask, compact=True)


def _addend(x: Operand, sign: int, outer: int, region: Region, arithmetic: Arithmetic, whole_blocks: bool) -> Term:
    """whole_blocks: the step keeps every entry below the diagonal, so smaller blocks are taken as they are."""
    if x.compact and x.codes.shape[-1] < outer and whole_blocks:
        return arithmetic.addend(x, sign=sign, size=outer)
    part = diagonal_blocks(x, outer).part(*region)
    return arithmetic.addend(part, sign=sign, region=region)

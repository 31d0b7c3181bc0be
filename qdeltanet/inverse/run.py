"""Run a plan over an arithmetic: the float, fake-quantized, integer and observing runner are this one loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core import Arithmetic, FloatArithmetic, ObservingArithmetic, Operand, Region, Term, diagonal_blocks, whole
from .geometry import StepGeometry, geometry
from .plan import INPUT, OUTPUT, Plan, Step, cached_mask


def site_of(register: str) -> str:
    """Site name of a register: A and T are sites of the rule, the others `inverse.<register>`."""
    return register if register in (INPUT, OUTPUT) else f"inverse.{register}"


def run_plan(plan: Plan, A: Operand, arithmetic: Arithmetic) -> Operand | None:
    """T - I for the strictly lower A, both [..., H, C, C]; None for the empty plan (T = I).

    Registers are held as their blocks on the diagonal, and a product takes only the rows and columns that can be
    non-zero; what is skipped is exact zeros, so the codes equal those of full products.
    """
    fused: Operand | None = arithmetic.fused("run_plan", plan, A) if plan.steps else None
    if fused is not None:
        return fused
    registers = {INPUT: A}
    for step, where in zip(plan.steps, geometry(plan), strict=True):
        run = _copy(step, registers, arithmetic) if where is None else _multiply(step, where, registers, arithmetic)
        registers[step.out] = run
    return whole(registers[OUTPUT]) if plan.steps else None


def invert(A: Tensor, plan: Plan) -> Tensor:
    """(I - A)^-1 in floating point by a plan. A: [..., C, C], strictly lower; returns T with its diagonal."""
    T = run_plan(plan, Operand(INPUT, A), FloatArithmetic())
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return eye.expand_as(A) if T is None else T.codes + eye


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


def _multiply(step: Step, where: StepGeometry, registers: dict[str, Operand], arithmetic: Arithmetic) -> Operand:
    assert step.right is not None
    outer = step.mask.outer
    left, right = diagonal_blocks(registers[step.left], outer), diagonal_blocks(registers[step.right], outer)
    terms = [arithmetic.product(left, right, region=where.product, parts=(where.left, where.right))]
    terms += [_addend(registers[r], sign, outer, where.addends, arithmetic) for r, sign in step.addends]
    mask = cached_mask(step.mask, outer, left.codes.device) if where.masked else None
    return arithmetic.store(site_of(step.out), terms, shape=left.codes.shape, mask=mask, compact=True)


def _addend(x: Operand, sign: int, outer: int, region: Region, arithmetic: Arithmetic) -> Term:
    part = diagonal_blocks(x, outer).part(*region)
    return arithmetic.addend(part, sign=sign, region=region)

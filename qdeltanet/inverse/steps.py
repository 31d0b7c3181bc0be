"""One step of a plan over an arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..core import Arithmetic, IntFormat, Operand, Region, Term, diagonal_blocks
from .geometry import StepGeometry
from .mask import cached_mask
from .plan import IDENTITY, INPUT, OUTPUT, Step


def site_of(register: str) -> str:
    """Site name of a register: A and T are sites of the rule, the others `inverse.<register>`."""
    return register if register in (INPUT, OUTPUT) else f"inverse.{register}"


@dataclass(frozen=True)
class Register:
    """What a name of a plan holds: an operand, and the factor of the copies that led to it.

    The factor is multiplied into the terms that read the register, not into the operand's scale: a carried register's
    operand codes are then those of its source, with all their bits.
    """

    operand: Operand
    factor: float = 1.0

    def scaled(self, term: Term) -> Term:
        """A term that reads the operand, times the factor."""
        if self.factor == 1:
            return term
        if not term.scales:  # real numbers
            return replace(term, acc=term.acc * self.factor)
        first, *others = term.scales
        return replace(term, scales=(first * first.new_full((), self.factor), *others))


def run_step(
    step: Step, where: StepGeometry | None, registers: dict[str, Register], arithmetic: Arithmetic
) -> Register:
    """What a step makes of the registers; `where` is None for copies."""
    if where is None:
        return _copy(step, registers[step.left], arithmetic)
    return Register(_sum(step, where, registers, arithmetic))


def identity_of(A: Operand) -> Operand:
    """The identity in A's container, codes 1 with scale 1."""
    codes = torch.eye(A.codes.shape[-1], dtype=A.codes.dtype, device=A.codes.device).expand(A.codes.shape)
    if A.scale is None:
        return Operand(IDENTITY, codes)
    return Operand(IDENTITY, codes, torch.ones(1, 1, 1, device=A.codes.device), IntFormat(2))


def _copy(step: Step, source: Register, arithmetic: Arithmetic) -> Register:
    """Codes and scale of the source, masked. Blocks of the strictly lower triangle need no mask.

    T is a site of its own: a copy into it is stored like a sum, with the scale of T.
    """
    blocks = diagonal_blocks(source.operand, step.mask.outer)
    mask = None if step.mask.is_triangle else cached_mask(step.mask, step.mask.outer, blocks.codes.device)
    copy = Register(blocks, source.factor * step.factor)
    if step.out == OUTPUT:
        term = copy.scaled(arithmetic.addend(blocks))
        return Register(arithmetic.store(OUTPUT, [term], mask=mask, compact=True))
    if mask is None:
        return copy
    return replace(copy, operand=replace(blocks, codes=blocks.codes * mask.to(blocks.codes.dtype)))


def _sum(step: Step, where: StepGeometry, registers: dict[str, Register], arithmetic: Arithmetic) -> Operand:
    """What a product with addends, or a sum, stores."""
    outer, A = step.mask.outer, registers[INPUT].operand.codes
    terms = []
    if step.right is not None:
        left, right = registers[step.left], registers[step.right]
        parts = where.left, where.right
        term = arithmetic.product(left.operand, right.operand, region=where.product, parts=parts, size=outer)
        terms.append(left.scaled(right.scaled(term)))
    # smaller blocks are taken as they are where the step keeps all of them
    whole_blocks = replace(step.mask, diagonal=False).is_triangle
    for (register, sign), region in zip(step.summands, where.addends, strict=True):
        x = registers[register]
        terms.append(x.scaled(_addend(x.operand, sign, outer, region, arithmetic, whole_blocks)))
    mask = cached_mask(step.mask, outer, A.device) if where.masked else None
    shape = (*A.shape[:-2], A.shape[-1] // outer, outer, outer)
    return arithmetic.store(site_of(step.out), terms, shape=shape, mask=mask, compact=True)


def _addend(x: Operand, sign: int, outer: int, region: Region, arithmetic: Arithmetic, whole_blocks: bool) -> Term:
    """whole_blocks: the step keeps every entry below the diagonal, so smaller blocks are taken as they are."""
    if x.compact and x.codes.shape[-1] < outer and whole_blocks:
        return arithmetic.addend(x, sign=sign, size=outer)
    part = diagonal_blocks(x, outer).part(*region)
    return arithmetic.addend(part, sign=sign, region=region)

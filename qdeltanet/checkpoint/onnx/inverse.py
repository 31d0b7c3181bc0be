"""A plan read over whole [C, C] matrices: one product and one mask per step, as a graph for matrix units wants them.

The other readers skip what is known to be zero; the codes are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...core import Arithmetic, Operand
from ...inverse import IDENTITY, INPUT, OUTPUT, Plan, Step, site_of
from ...inverse.plan import constant_masks
from ...inverse.steps import Register


def run_whole(plan: Plan, A: Operand, *, arithmetic: Arithmetic) -> Operand:
    """T - I for the strictly lower A, both [..., H, C, C], by a plan that has steps."""
    size = plan.chunk_size
    registers = {INPUT: Register(A), IDENTITY: Register(Operand(IDENTITY, torch.eye(size)))}
    patterns = {name: mask.matrix(size) > 0 for name, mask in constant_masks(size).items()}
    for step in plan.steps:
        keep, reach = step.mask.matrix(size), _reach(step, patterns)
        outside = bool((reach & (keep == 0)).any())
        registers[step.out] = _run(step, registers, keep if outside else None, arithmetic)
        patterns[step.out] = reach & (keep > 0)
    return registers[OUTPUT].operand


def _reach(step: Step, patterns: dict[str, Tensor]) -> Tensor:
    """Entries that can be non-zero before the mask."""
    reach = patterns[step.left]
    if step.right is not None:
        reach = reach.float() @ patterns[step.right].float() > 0
    for register, _ in step.summands:
        reach = reach | patterns[register]
    return reach


def _run(step: Step, registers: dict[str, Register], mask: Tensor | None, ar: Arithmetic) -> Register:
    source = registers[step.left]
    if step.is_copy:
        return _copy(step, replace(source, factor=source.factor * step.factor), mask, ar)
    terms = []
    if step.right is not None:
        right = registers[step.right]
        terms.append(source.scaled(right.scaled(ar.product(source.operand, right.operand))))
    for register, sign in step.summands:
        x = registers[register]
        terms.append(x.scaled(ar.addend(x.operand, sign=sign)))
    return Register(ar.store(site_of(step.out), terms, mask=mask))


def _copy(step: Step, source: Register, mask: Tensor | None, ar: Arithmetic) -> Register:
    """T is a site of its own, so a copy into it is stored."""
    if step.out == OUTPUT:
        return Register(ar.store(OUTPUT, [source.scaled(ar.addend(source.operand))], mask=mask))
    if mask is None:
        return source
    return replace(source, operand=replace(source.operand, codes=source.operand.codes * mask))

"""Which rows and columns each step of a plan has to touch: what is skipped is exact zeros, for every method alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..core import Region
from .mask import Mask
from .plan import Plan, Step, constant_masks

Range = tuple[int, int]
NOTHING = (slice(0, 0), slice(0, 0))


@dataclass(frozen=True)
class StepGeometry:
    """Rectangles inside one diagonal block of the step, and whether the sum has to be masked.

    left, right: parts of the operands that take part; product: what of the output they cover (all three empty for a
    sum); addends: the rectangle that each summand covers.
    """

    left: Region
    right: Region
    product: Region
    addends: tuple[Region, ...]
    masked: bool


@lru_cache(maxsize=256)
def geometry(plan: Plan) -> tuple[StepGeometry | None, ...]:
    """One entry per step, None for copies."""
    masks = constant_masks(plan.chunk_size)
    result: list[StepGeometry | None] = []
    for step in plan.steps:
        result.append(None if step.is_copy else _step_geometry(step, masks))
        masks[step.out] = step.mask
    return tuple(result)


def _step_geometry(step: Step, masks: dict[str, Mask]) -> StepGeometry:
    left, right, product = NOTHING, NOTHING, NOTHING
    if step.right is not None:
        left, right, product = _product(step.mask, masks[step.left], masks[step.right])
    addends = tuple(_addend(masks[register], step.mask) for register, _ in step.summands)
    return StepGeometry(left, right, product, addends, masked=_needs_mask(step, masks))


def _product(out: Mask, left: Mask, right: Mask) -> tuple[Region, Region, Region]:
    rows = _meet(out.row_range, _span(left.row_range, left, out))
    columns = _meet(out.column_range, _span(right.column_range, right, out))
    inner = _meet(left.columns_of(rows), right.rows_of(columns))
    rows = _meet(rows, left.rows_of(inner))
    columns = _meet(columns, right.columns_of(inner))
    r, k, c = slice(*rows), slice(*inner), slice(*columns)
    return (r, k), (k, c), (r, c)


def _addend(mask: Mask, out: Mask) -> Region:
    rows, columns = out.row_range, out.column_range
    if mask.outer == out.outer:
        rows, columns = _meet(rows, mask.row_range), _meet(columns, mask.column_range)
    return slice(*rows), slice(*columns)


def _needs_mask(step: Step, masks: dict[str, Mask]) -> bool:
    """Whether the sum can hold anything outside of the step's mask, in the rectangles that are touched."""
    size = step.mask.outer
    reach = torch.zeros(size, size)
    if step.right is not None:
        reach = masks[step.left].matrix(size) @ masks[step.right].matrix(size)
    for register, _ in step.summands:
        reach = reach + masks[register].matrix(size)
    rows, columns = step.mask.row_range, step.mask.column_range
    touched = torch.zeros(size, size)
    touched[rows[0] : rows[1], columns[0] : columns[1]] = 1
    return bool(((reach * touched > 0) & (step.mask.matrix(size) == 0)).any())


def _span(own: Range, mask: Mask, out: Mask) -> Range:
    """A register of smaller blocks than the step's repeats: any row or column of the larger block can be non-zero."""
    return own if mask.outer >= out.outer else (0, out.outer)


def _meet(a: Range, b: Range) -> Range:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))

"""Which rows and columns each step of a plan has to touch: what is skipped is exact zeros, for every method alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..core import Region
from .plan import INPUT, Mask, Plan, Step

Range = tuple[int, int]


@dataclass(frozen=True)
class StepGeometry:
    """Rectangles inside one diagonal block of the step, and whether the sum has to be masked.

    left, right: parts of the operands that take part; product: what of the output they cover; addends: the rectangle
    that each addend covers.
    """

    left: Region
    right: Region
    product: Region
    addends: tuple[Region, ...]
    masked: bool


@lru_cache(maxsize=256)
def geometry(plan: Plan) -> tuple[StepGeometry | None, ...]:
    """One entry per step, None for copies."""
    masks = {INPUT: Mask(1, plan.chunk_size)}
    result: list[StepGeometry | None] = []
    for step in plan.steps:
        result.append(None if step.is_copy else _step_geometry(step, masks))
        masks[step.out] = step.mask
    return tuple(result)


def _step_geometry(step: Step, masks: dict[str, Mask]) -> StepGeometry:
    assert step.right is not None
    out, left, right = step.mask, masks[step.left], masks[step.right]
    rows = _meet(out.row_range, _span(left.row_range, left, out))
    columns = _meet(out.column_range, _span(right.column_range, right, out))
    inner = _meet(left.columns_of(rows), right.rows_of(columns))
    rows = _meet(rows, left.rows_of(inner))
    columns = _meet(columns, right.columns_of(inner))
    return StepGeometry(
        left=(slice(*rows), slice(*inner)),
        right=(slice(*inner), slice(*columns)),
        product=(slice(*rows), slice(*columns)),
        addends=tuple(_addend(masks[register], out) for register, _ in step.addends),
        masked=_needs_mask(step, masks),
    )


def _addend(mask: Mask, out: Mask) -> Region:
    rows, columns = out.row_range, out.column_range
    if mask.outer == out.outer:
        rows, columns = _meet(rows, mask.row_range), _meet(columns, mask.column_range)
    return slice(*rows), slice(*columns)


def _needs_mask(step: Step, masks: dict[str, Mask]) -> bool:
    """Whether the sum can hold anything outside of the step's mask, in the rectangles that are touched."""
    assert step.right is not None
    size = step.mask.outer
    reach = _block(masks[step.left], size) @ _block(masks[step.right], size)
    for register, _ in step.addends:
        reach = reach + _block(masks[register], size)
    rows, columns = step.mask.row_range, step.mask.column_range
    touched = torch.zeros(size, size)
    touched[rows[0] : rows[1], columns[0] : columns[1]] = 1
    return bool(((reach * touched > 0) & (step.mask.matrix(size) == 0)).any())


def _block(mask: Mask, size: int) -> Tensor:
    return mask.matrix(size)


def _span(own: Range, mask: Mask, out: Mask) -> Range:
    """A register of smaller blocks than the step's repeats: any row or column of the larger block can be non-zero."""
    return own if mask.outer >= out.outer else (0, out.outer)


def _meet(a: Range, b: Range) -> Range:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))

"""Forward substitution, row by row: the reference."""

from __future__ import annotations

from ..mask import Mask
from ..plan import INPUT, OUTPUT, Plan, Step


def forward_substitution(chunk_size: int) -> Plan:
    """Forward substitution: L_(i) = rows up to i of A + A L_(i-1); row i needs only the rows above it.

    The recurrence of transformers' row loop, n - 2 products of one row, as many deep; `column_sweep` is the same by
    columns. One register is written again and again; rows already done come out the same.
    """
    before = "a"  # a copy of A, with A's scale
    steps = [Step(before, Mask(1, chunk_size, rows=2), INPUT)]
    for row in range(2, chunk_size):
        out = OUTPUT if row == chunk_size - 1 else "L"
        steps.append(Step(out, Mask(1, chunk_size, rows=row + 1), INPUT, before, ((INPUT, 1),), unit="vector"))
        before = out
    if chunk_size == 2:
        steps = [Step(OUTPUT, Mask(1, 2), INPUT)]
    return Plan("forward_substitution", chunk_size, tuple(steps), {}, frozenset((INPUT, "L", OUTPUT)))

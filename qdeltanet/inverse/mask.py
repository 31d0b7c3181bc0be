"""Which entries of a chunk's matrix a step keeps: block structure, and the rectangles that hold it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Entries (i, j), i > j, of the same `outer`-block and of different `inner`-blocks.

    Mask(1, C) is the strictly lower triangle, Mask(1, b) the diagonal blocks of size b, Mask(b, 2b) what radix 2 joins.
    band keeps i - j <= band; rows the first rows of each outer block, column one column of it. diagonal keeps i == j
    too: Mask(b, b, diagonal=True) is the diagonal alone.
    """

    inner: int
    outer: int
    band: int | None = None
    rows: int | None = None
    column: int | None = None
    diagonal: bool = False

    def matrix(self, size: int) -> Tensor:
        """{0, 1} float32 [size, size]."""
        i = torch.arange(size)[:, None]
        j = torch.arange(size)[None, :]
        keep = (i > j) & (i // self.outer == j // self.outer) & (i // self.inner != j // self.inner)
        if self.band is not None:
            keep &= i - j <= self.band
        if self.diagonal:
            keep |= i == j
        if self.rows is not None:
            keep &= i % self.outer < self.rows
        if self.column is not None:
            keep &= j % self.outer == self.column
        return keep.to(torch.float32)

    @property
    def is_triangle(self) -> bool:
        """Whether it keeps all of the strictly lower triangle of each outer block, and nothing else."""
        return self == Mask(1, self.outer)

    @property
    def row_range(self) -> tuple[int, int]:
        """Rows of an outer block that can hold anything."""
        stop = self.outer if self.rows is None else min(self.outer, self.rows)
        return self._below(self.column or 0), stop

    @property
    def column_range(self) -> tuple[int, int]:
        if self.column is not None:
            return self.column, self.column + 1
        return 0, self._left_of(self.row_range[1])

    def columns_of(self, rows: tuple[int, int]) -> tuple[int, int]:
        """Columns that the given rows of a larger block can reach."""
        first, last = rows[0] // self.outer * self.outer, (rows[1] - 1) // self.outer * self.outer
        if self.column is not None and first == last:
            return first + self.column, first + self.column + 1
        return first, self._left_of(rows[1])

    def rows_of(self, columns: tuple[int, int]) -> tuple[int, int]:
        """Rows that the given columns of a larger block can reach."""
        start, stop = columns
        return self._below(start), -(-stop // self.outer) * self.outer

    def _below(self, column: int) -> int:
        """First row that a column, and those right of it, can reach."""
        return column if self.diagonal else (column // self.inner + 1) * self.inner

    def _left_of(self, row: int) -> int:
        """End of the columns that the rows before `row` can reach."""
        return row if self.diagonal else (row - 1) // self.inner * self.inner


@lru_cache(maxsize=1024)
def cached_mask(mask: Mask, size: int, device: torch.device) -> Tensor:
    """`mask.matrix(size)` on a device, built once."""
    return mask.matrix(size).to(device)

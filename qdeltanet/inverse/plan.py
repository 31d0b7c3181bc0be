"""The plan language: the triangular inverse as a short immutable sequence of steps over named registers.

A register holds the strictly lower part of a [C, C] matrix (the identity is implicit): register `T` stands for T - I.
Two kinds of step exist: a masked matmul with addends, and a masked copy, which hands a register's codes on unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

INPUT, OUTPUT = "A", "T"


@dataclass(frozen=True)
class Mask:
    """Entries (i, j), i > j, of the same `outer`-block and of different `inner`-blocks.

    Mask(1, C) is the strictly lower triangle, Mask(1, b) the diagonal blocks of size b, Mask(b, 2b) what radix 2 joins.
    band keeps i - j <= band; rows keeps i < rows.
    """

    inner: int
    outer: int
    band: int | None = None
    rows: int | None = None

    def matrix(self, size: int) -> Tensor:
        """{0, 1} float32 [size, size]."""
        i = torch.arange(size)[:, None]
        j = torch.arange(size)[None, :]
        keep = (i > j) & (i // self.outer == j // self.outer) & (i // self.inner != j // self.inner)
        if self.band is not None:
            keep &= i - j <= self.band
        if self.rows is not None:
            keep &= i < self.rows
        return keep.to(torch.float32)

    @property
    def row_range(self) -> tuple[int, int]:
        """Rows of an outer block that can hold anything."""
        stop = self.outer if self.rows is None else min(self.outer, self.rows)
        return self.inner, stop

    @property
    def column_range(self) -> tuple[int, int]:
        return 0, (self.row_range[1] - 1) // self.inner * self.inner

    def columns_of(self, rows: tuple[int, int]) -> tuple[int, int]:
        """Columns that the given rows of a larger block can reach."""
        start, stop = rows
        return start // self.outer * self.outer, (stop - 1) // self.inner * self.inner

    def rows_of(self, columns: tuple[int, int]) -> tuple[int, int]:
        """Rows that the given columns of a larger block can reach."""
        start, stop = columns
        return (start // self.inner + 1) * self.inner, -(-stop // self.outer) * self.outer


@lru_cache(maxsize=1024)
def cached_mask(mask: Mask, size: int, device: torch.device) -> Tensor:
    """`mask.matrix(size)` on a device, built once."""
    return mask.matrix(size).to(device)


@dataclass(frozen=True)
class Step:
    """out = mask * (left @ right + sum of sign * addend), or a masked copy of `left` where right is None.

    A copy has no addends: the register inherits codes and scale.
    """

    out: str
    mask: Mask
    left: str
    right: str | None = None
    addends: tuple[tuple[str, int], ...] = ()

    @property
    def is_copy(self) -> bool:
        return self.right is None

    def __str__(self) -> str:
        if self.is_copy:
            return f"{self.out} = {self.left} masked {self.mask.inner}:{self.mask.outer}"
        signs = "".join(f" {'+' if s > 0 else '-'} {r}" for r, s in self.addends)
        return f"{self.out} = {self.left} @ {self.right}{signs}"


@dataclass(frozen=True)
class Plan:
    """A bound-free program that turns register A into register T.

    method, options: what `plan()` was asked for. bounded: registers (A and T included) whose entries provably stay
    within max(beta) for unit keys. An empty plan (no steps) stands for T = I.
    """

    method: str
    chunk_size: int
    steps: tuple[Step, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), compare=False)
    bounded: frozenset[str] = frozenset((INPUT, OUTPUT))

    @cached_property
    def registers(self) -> tuple[str, ...]:
        """Intermediate registers in order of first write, without A, T and mere copies of A."""
        return tuple(dict.fromkeys(s.out for s in self.steps if not s.is_copy and s.out not in (INPUT, OUTPUT)))

    @cached_property
    def masks(self) -> Mapping[str, Mask]:
        """The mask of each register as last written."""
        return MappingProxyType({INPUT: Mask(1, self.chunk_size)} | {s.out: s.mask for s in self.steps})

    @property
    def matmuls(self) -> int:
        return sum(not s.is_copy for s in self.steps)

    @cached_property
    def depth(self) -> int:
        """Longest chain of dependent products."""
        level: dict[str, int] = {INPUT: 0}
        for s in self.steps:
            sources = [s.left, *([s.right] if s.right else [])]
            before = max(level[r] for r in [*sources, *(r for r, _ in s.addends)])
            level[s.out] = before + (0 if s.is_copy else 1)
        return max(level.values())

    def uses(self, register: str) -> set[str]:
        """How a register is read: any of `left`, `right`, `addend`. A copy's uses count for its source."""
        found: set[str] = set()
        names = {register} | {s.out for s in self.steps if s.is_copy and s.left == register}
        for s in self.steps:
            if s.is_copy:
                continue
            found |= {"left"} if s.left in names else set()
            found |= {"right"} if s.right in names else set()
            found |= {"addend"} if any(r in names for r, _ in s.addends) else set()
        return found

    def __str__(self) -> str:
        return "\n".join(str(s) for s in self.steps) or "T = I"

"""The plan language: the triangular inverse as a short immutable sequence of steps over named registers.

A register holds the strictly lower part of a [C, C] matrix (the identity is implicit): register `T` stands for T - I. A
mask with its diagonal makes a register that holds I + L instead. Three kinds of step exist: a masked matmul with
addends, a masked sum, and a masked copy, which hands a register's codes on unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from .mask import Mask

INPUT, OUTPUT = "A", "T"
IDENTITY = "I"  # a constant: codes are the identity, scale 1
Unit = Literal["matrix", "vector"]


def constant_masks(chunk_size: int) -> dict[str, Mask]:
    """Masks of what a plan starts from."""
    return {INPUT: Mask(1, chunk_size), IDENTITY: Mask(chunk_size, chunk_size, diagonal=True)}


@dataclass(frozen=True)
class Step:
    """out = mask * (left @ right + sum of sign * addend). Without `right` a sum, left + addends; without either a copy.

    A copy inherits codes and scale; `factor` (of copies only) multiplies the scale. A sum is stored like a product.
    IDENTITY may stand where a register is added. unit: the hardware that a product is meant for, a matrix unit or,
    where it is of rank one or a row, vectors; only counts and costs read it.

    Raises ValueError for a step that is none of these.
    """

    out: str
    mask: Mask
    left: str
    right: str | None = None
    addends: tuple[tuple[str, int], ...] = ()
    factor: float = 1.0
    unit: Unit = "matrix"

    def __post_init__(self) -> None:
        if self.factor != 1 and not self.is_copy:
            raise ValueError(f"step {self.out}: only a copy takes a factor")
        if IDENTITY in (self.out, self.right) or (self.left == IDENTITY and not self.is_sum):
            raise ValueError(f"step {self.out}: {IDENTITY} is a constant that can only be added")

    @property
    def is_copy(self) -> bool:
        return self.right is None and not self.addends

    @property
    def is_sum(self) -> bool:
        return self.right is None and bool(self.addends)

    @property
    def summands(self) -> tuple[tuple[str, int], ...]:
        """What is added to the product, if there is one: (register, sign)."""
        return self.addends if self.right is not None or self.is_copy else ((self.left, 1), *self.addends)

    def __str__(self) -> str:
        if self.is_copy:
            factor = "" if self.factor == 1 else f"{self.factor:g} "
            column = "" if self.mask.column is None else f" column {self.mask.column}"
            return f"{self.out} = {factor}{self.left} masked {self.mask.inner}:{self.mask.outer}{column}"
        signs = "".join(f" {'+' if s > 0 else '-'} {r}" for r, s in self.addends)
        return f"{self.out} = {self.left}{f' @ {self.right}' if self.right else ''}{signs}"


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
        """The mask of each register as last written, A and IDENTITY included."""
        return MappingProxyType(constant_masks(self.chunk_size) | {s.out: s.mask for s in self.steps})

    @property
    def matmuls(self) -> int:
        """Products meant for a matrix unit."""
        return sum(s.right is not None and s.unit == "matrix" for s in self.steps)

    @property
    def vector_steps(self) -> int:
        """Products meant for a vector unit."""
        return sum(s.right is not None and s.unit == "vector" for s in self.steps)

    @cached_property
    def depth(self) -> int:
        """Longest chain of dependent products, on either unit."""
        level: dict[str, int] = {INPUT: 0, IDENTITY: 0}
        for s in self.steps:
            sources = [s.left, *([s.right] if s.right else []), *(r for r, _ in s.addends)]
            level[s.out] = max(level[r] for r in sources) + (s.right is not None)
        return max(level.values())

    def source(self, register: str) -> str:
        """The register whose codes it holds: itself, or for a copy what it was made of."""
        copied = {s.out: s.left for s in self.steps if s.is_copy}
        while register not in (INPUT, OUTPUT, *self.registers):
            register = copied[register]
        return register

    def uses(self, register: str) -> set[str]:
        """How a register is read: any of `left`, `right`, `addend`. A copy's uses count for its source."""
        found: set[str] = set()
        names = {register}
        for s in self.steps:
            if s.is_copy and s.left in names:
                names.add(s.out)
        for s in self.steps:
            if s.right is not None:
                found |= {"left"} if s.left in names else set()
                found |= {"right"} if s.right in names else set()
            found |= {"addend"} if any(r in names for r, _ in s.summands) else set()
        return found

    def __str__(self) -> str:
        return "\n".join(str(s) for s in self.steps) or "T = I"

"""What a backend is: where integers are multiplied and requantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .accumulate import FLOAT32_EXACT
from .formats import IntFormat
from .granularity import Granularity
from .requantize import Mode, Result, Term, requantize


class Backend(Protocol):
    """The small interface that the integer arithmetic drives.

    Containers differ (int64, float32, float64); the numbers in them do not. The law: same codes, scales and plan, same
    output codes, every element, as backend `reference`.
    """

    name: str

    def matmul(self, left: Tensor, right: Tensor, bound: int, code_max: int) -> Tensor:
        """Exact product of codes [..., M, K] @ [..., K, N]; |accumulator| <= bound, |code| <= code_max."""
        ...

    def multiply(self, acc: Tensor, coefficient: Tensor, bound: int) -> Tensor:
        """Exact elementwise product of an accumulator and coefficient codes; |result| <= bound."""
        ...

    def requantize(
        self,
        terms: Sequence[Term],
        fmt: IntFormat,
        out_scale: Tensor | Granularity,
        *,
        mode: Mode = "float",
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Result:
        """As `qdeltanet.core.requantize`, to the bit."""
        ...


class FloatContainers:
    """Whole numbers in float32 while the bound is <= 2^24, else in float64: exact, and differentiable.

    This is fake quantization's backend: the same codes, products and requantizations as the integers, with the
    straight-through gradient where autograd is on.
    """

    name = "fake"

    def matmul(self, left: Tensor, right: Tensor, bound: int, code_max: int) -> Tensor:
        dtype = torch.float32 if bound <= FLOAT32_EXACT else torch.float64
        return left.to(dtype) @ right.to(dtype)

    def multiply(self, acc: Tensor, coefficient: Tensor, bound: int) -> Tensor:
        dtype = torch.float32 if bound <= FLOAT32_EXACT else torch.float64
        return acc.to(dtype) * coefficient.to(dtype)

    def requantize(
        self,
        terms: Sequence[Term],
        fmt: IntFormat,
        out_scale: Tensor | Granularity,
        *,
        mode: Mode = "float",
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Result:
        return requantize(terms, fmt, out_scale, mode=mode, shape=shape, mask=mask, compact=compact)

"""What a backend is: where integers are multiplied and requantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .accumulate import BF16_EXACT, FLOAT32_EXACT
from .requantize import Result, Target, requantize
from .terms import Term


class Backend(Protocol):
    """The small interface that the integer arithmetic drives.

    Containers differ (int64, float32, float64); the numbers in them do not. The law: same codes, scales and plan, same
    output codes, every element, as backend `reference`.
    """

    name: str
    # Optional fused kernels by name: `kernel(arithmetic, *arguments)` gives what the steps would give, to the bit, or
    # None where it declines. run_plan(plan, A) -> T; front(plan, k, write_decay) -> T; back(T, v_beta, k_beta) ->
    # (terms of u, w).
    kernels: Mapping[str, Callable[..., Any]]

    def matmul(self, left: Tensor, right: Tensor, left_max: int, right_max: int) -> Tensor:
        """Exact product of codes [..., M, K] @ [..., K, N], leading axes broadcast; |codes| <= left_max, right_max."""
        ...

    def requantize(self, terms: Sequence[Term], target: Target) -> Result:
        """As `qdeltanet.core.requantize`, to the bit."""
        ...


def held_in(contracted: int, left_max: int, right_max: int) -> torch.dtype:
    """Container of a product of codes: float32 while it holds the accumulator, else float64.

    Codes above 256 are multiplied in float64 whatever the bound: a user may have permitted bfloat16 or TF32 for float32
    products (torch.set_float32_matmul_precision), which smaller codes survive.
    """
    narrow = contracted * left_max * right_max <= FLOAT32_EXACT and max(left_max, right_max) <= BF16_EXACT
    return torch.float32 if narrow else torch.float64


class FloatContainers:
    """Whole numbers in float32 while it holds them, else in float64: exact, and differentiable.

    This is fake quantization's backend: the same codes, products and requantizations as the integers, with the
    straight-through gradient where autograd is on.
    """

    name = "fake"
    kernels: Mapping[str, Callable[..., Any]] = {}

    def matmul(self, left: Tensor, right: Tensor, left_max: int, right_max: int) -> Tensor:
        dtype = held_in(left.shape[-1], left_max, right_max)
        return left.to(dtype) @ right.to(dtype)

    def requantize(self, terms: Sequence[Term], target: Target) -> Result:
        return requantize(terms, target)

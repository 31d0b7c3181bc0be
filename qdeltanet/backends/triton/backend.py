"""The backend: int8 products on tensor cores, whole plans in one kernel. Importing this module imports Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...core import BYTE_MAX, FLOAT32_EXACT, INT32_LIMIT, FloatContainers, byte_matmul
from .float_form import float_inverse
from .fused import back, front, run_plan
from .matmul import int8_matmul
from .plans import declines

__all__ = ["TritonBackend", "declines", "float_inverse"]


class TritonBackend(FloatContainers):
    """Codes multiplied as int8 with int32 accumulators; formats of more than 8 bits as signed bytes.

    Requantization between kernels is torch's, as in every backend: elementwise operations round alike everywhere.
    """

    name = "triton"
    kernels: Mapping[str, Callable[..., Any]] = MappingProxyType({"run_plan": run_plan, "front": front, "back": back})

    def matmul(self, left: Tensor, right: Tensor, left_max: int, right_max: int) -> Tensor:
        """As `Backend.matmul`, in float32 where 2^24 holds the bound, else in float64."""
        inner = left.shape[-1]
        dtype = torch.float32 if inner * left_max * right_max <= FLOAT32_EXACT else torch.float64
        if inner * min(left_max, 128) * min(right_max, 128) > INT32_LIMIT:  # an int32 accumulator could overflow
            half = inner // 2
            first = self.matmul(left[..., :half], right[..., :half, :], left_max, right_max)
            return first.to(dtype) + self.matmul(left[..., half:], right[..., half:, :], left_max, right_max)
        if max(left_max, right_max) <= BYTE_MAX:
            return int8_matmul(left, right, dtype)
        return byte_matmul(_int32_matmul, left, right, left_max, right_max).to(dtype)


def _int32_matmul(left: Tensor, right: Tensor) -> Tensor:
    return int8_matmul(left, right, torch.int32)

"""Exact integers at the speed of float kernels: codes in float32 where 2^24 holds them, in float64 where 2^53 does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core import FloatContainers, held_in

_switch = threading.RLock()


@contextmanager
def permit_bf16() -> Iterator[None]:
    """Let oneDNN take float32 products (inputs rounded to bf16, which codes up to 256 survive, accumulators float32).

    The switch is global to the process: it is held under a lock and put back, whatever happens inside.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _switch:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


class CpuBackend(FloatContainers):
    """`FloatContainers` with the fast kernel for codes that fit bf16 (INT8 and below)."""

    name = "cpu"

    def matmul(self, left: Tensor, right: Tensor, left_max: int, right_max: int) -> Tensor:
        if held_in(left.shape[-1], left_max, right_max) is torch.float64:
            return super().matmul(left, right, left_max, right_max)
        with permit_bf16():
            return super().matmul(left, right, left_max, right_max)

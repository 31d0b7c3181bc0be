"""Batched products of int8 codes with int32 accumulators, from and into any container."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import QDeltaNetError

WARPS = 4


@triton.jit
def matmul_kernel(  # type: ignore[no-untyped-def]
    left, right, out, M, N, K, left_batch, left_m, left_k, right_batch, right_k, right_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b] = left[b] @ right[b]; one program per tile of out [batch, M, N]. BLOCK_K >= 32, as int8 dots need."""
    batch = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tl.cdiv(N, BLOCK_N)
    i = (tile // columns) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = (tile % columns) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        k_row = start + tl.arange(0, BLOCK_K)[None, :]
        k_column = start + tl.arange(0, BLOCK_K)[:, None]
        at = left + batch * left_batch + i * left_m + k_row * left_k
        x = tl.load(at, mask=(i < M) & (k_row < K), other=0)
        y = tl.load(
            right + batch * right_batch + k_column * right_k + j * right_n, mask=(k_column < K) & (j < N), other=0
        )
        acc += tl.dot(x.to(tl.int8), y.to(tl.int8), out_dtype=tl.int32)
    tl.store(out + batch * M * N + i * N + j, acc.to(out.dtype.element_ty), mask=(i < M) & (j < N))


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched there: on a GPU, and on the CPU in Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


def int8_matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of codes within [-128, 127], [..., M, K] @ [..., K, N] -> [..., M, N] as `dtype`.

    Leading axes broadcast. The caller knows that int32 accumulators and `dtype` hold the result. Raises QDeltaNetError
    for tensors on a device that runs no kernels.
    """
    if not runs_on(left.device):
        raise QDeltaNetError(f"backend triton: tensors are on {left.device}; move them to a GPU, or use backend cpu")
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    (rows, inner), columns = left.shape[-2:], right.shape[-1]
    batch = math.prod(lead)
    x = left.expand(*lead, rows, inner).reshape(batch, rows, inner)
    y = right.expand(*lead, inner, columns).reshape(batch, inner, columns)
    out = torch.empty(batch, rows, columns, dtype=dtype, device=left.device)
    if out.numel():
        tile = _block(rows, 16, 64), _block(columns, 16, 64), _block(inner, 32, 128)
        grid = (batch, triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]))
        arguments = (x, y, out, rows, columns, inner, *x.stride(), *y.stride(), *tile)
        with torch.cuda.device_of(out):
            matmul_kernel[grid](*arguments, num_warps=WARPS, enable_fp_fusion=False)
    return out.view(*lead, rows, columns)


def _block(size: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(size)))

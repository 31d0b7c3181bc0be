"""The contract of `npu::npu_quant_matmul` on the CPU, for machines without an NPU.

It is no model of the hardware: it computes the integers that the operator documents and refuses what the operator
refuses, so that the calls of backend `npu` are checked against the published rules. Sources: Ascend/op-plugin
(docs/context/torch_npu-npu_quant_matmul.md, op_plugin/ops/opapi/QuantMatmulKernelNpuOpApi.cpp and the checks of
op_plugin/python/meta/_meta_registrations.py) and CANN's aclnnQuantMatmulV4 (layouts, sizes).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import QDeltaNetError

NAME = "npu_quant_matmul"
SCHEMA = (
    f"{NAME}(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, SymInt[]? group_sizes=None) -> Tensor"
)
RANKS = (2, 6)
AXIS_LIMIT = 65535  # elements of the last axis as it lies in memory, of x1 and of x2
SCALES_OF_INT32 = (torch.float32, torch.bfloat16)
INT32 = 3  # torch.int32 as a schema of `int? output_dtype` hands it over

_library: torch.library.Library | None = None  # operators live as long as it


def is_registered() -> bool:
    """Whether this process multiplies with the emulation."""
    return _library is not None


def register_emulation() -> None:
    """Register the operator's CPU implementation as `torch.ops.npu.npu_quant_matmul`; again is a no-op.

    Raises QDeltaNetError where torch_npu is loaded or another library has the operator: the real one is never replaced.
    """
    global _library
    if _library is not None:
        return
    if "torch_npu" in sys.modules or hasattr(torch.ops.npu, NAME):
        raise QDeltaNetError(f"npu emulation: the real {NAME} is loaded; unset QDELTANET_EMULATE_NPU to use it")
    library = torch.library.Library("npu", "FRAGMENT")
    library.define(SCHEMA)
    library.impl(NAME, npu_quant_matmul, "CPU")
    _library = library


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
) -> Tensor:
    """int8 [..., M, K] @ int8 [..., K, N] -> int32 [..., M, N], leading axes broadcast; scale [1] or [N], all ones.

    The documentation multiplies by the scale, users of int32 output rely on that it does not: only ones are the same
    under both readings. Raises RuntimeError where the operator would, and for what is not emulated.
    """
    extras = (offset, pertoken_scale, bias, x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes)
    _refuse_unless(all(e is None for e in extras), "only x1, x2, scale and output_dtype are emulated")
    _refuse_unless(output_dtype == INT32, f"only output_dtype=torch.int32 is emulated, got {output_dtype}")
    for name, x in (("x1", x1), ("x2", x2)):
        _check_operand(name, x)
    _check_pair(x1, x2)
    _check_scale(scale, x2.shape[-1])
    # float64 holds every int32 accumulator, and is faster than int64
    return (x1.double() @ x2.double()).long().to(torch.int32)


def _refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{NAME}: {message}")


def _check_operand(name: str, x: Tensor) -> None:
    """dtype, rank, layout and size of x1 or x2."""
    low, high = RANKS
    _refuse_unless(x.dtype is torch.int8, f"{name} must be int8, got {x.dtype}")
    _refuse_unless(low <= x.dim() <= high, f"{name} must have {low} to {high} dimensions, got {x.dim()}")
    _refuse_unless(x.numel() > 0, f"{name} must not be empty, got {tuple(x.shape)}")
    transposed = not x.is_contiguous()
    _refuse_unless(not transposed or x.mT.is_contiguous(), f"{name} may only be transposed in its last two axes")
    last = x.shape[-2 if transposed else -1]
    _refuse_unless(last <= AXIS_LIMIT, f"the last axis of {name} must not exceed {AXIS_LIMIT}, got {last}")


def _check_pair(x1: Tensor, x2: Tensor) -> None:
    """The contracted axis, and leading axes that are equal or 1."""
    k1, k2 = x1.shape[-1], x2.shape[-2]
    _refuse_unless(k1 == k2, f"the contracted axes of x1 and x2 differ: {k1}, {k2}")
    for a, b in zip(reversed(x1.shape[:-2]), reversed(x2.shape[:-2]), strict=False):
        _refuse_unless(a == b or 1 in (a, b), f"the batch shape cannot be broadcast: {a}, {b}")


def _check_scale(scale: Tensor, columns: int) -> None:
    """dtype and shape for int32 output, and ones."""
    _refuse_unless(scale.dtype in SCALES_OF_INT32, f"scale must be float32 or bfloat16 for int32, got {scale.dtype}")
    fits = scale.dim() == 1 and scale.shape[0] in (1, columns)
    _refuse_unless(fits, f"scale must have the shape (1,) or ({columns},), got {tuple(scale.shape)}")
    _refuse_unless(bool((scale == 1).all()), "a scale other than 1 is not emulated for int32 output")

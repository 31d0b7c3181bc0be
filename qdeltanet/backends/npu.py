"""Ascend NPUs: products by `torch.ops.npu.npu_quant_matmul`, int8 x int8 with int32 accumulators."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core import (
    FLOAT32_EXACT,
    FloatContainers,
    QDeltaNetError,
    Result,
    Target,
    Term,
    byte_matmul,
    exact_matmul,
    requantize,
    split_bytes,
)
from ..core.terms import multipliers, part_of_scale
from .npu_emulation import AXIS_LIMIT, RANKS, is_registered, register_emulation

EMULATE = "QDELTANET_EMULATE_NPU"


class NpuBackend(FloatContainers):
    """Codes as int8 on the NPU's cube unit, accumulators int32, wide codes (INT9 to INT16) as products of bytes.

    The operator's published signature is npu_quant_matmul(x1, x2, scale, *, offset, pertoken_scale, bias, output_dtype,
    x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes) (torch_npu, Ascend/op-plugin). int32 output
    takes a float32 or bfloat16 scale [1] or [N] and no per-batch one, so the scale is 1 and requantization is ours.

    Containers: float32 where K * left_max * right_max <= 2^24, else int64. Never float64, which torch_npu silently
    replaces by float32; never int32, which coefficient codes would overflow.
    """

    name = "npu"

    def matmul(self, left: Tensor, right: Tensor, left_max: int, right_max: int) -> Tensor:
        """Exact [..., M, K] @ [..., K, N] in any layout and rank >= 2, on the device that the codes are on.

        Raises QDeltaNetError where K or N exceed the operator's 65535 or the codes are not on an NPU.
        """
        _check(left, right)
        acc = byte_matmul(quant_matmul, left, right, left_max, right_max)
        return acc.to(torch.float32) if left.shape[-1] * left_max * right_max <= FLOAT32_EXACT else acc

    def requantize(self, terms: Sequence[Term], target: Target) -> Result:
        """As `qdeltanet.core.requantize`, to the bit, although an NPU has no float64.

        Multipliers are float64 on the host, the rest runs on the device. Fixed point, and everything on a device whose
        arithmetic does not round as the host's, runs on the host.
        """
        if target.mode != "float" or not rounds_like_the_host(terms[0].acc.device.type):
            return _on_host(terms, target)
        result = requantize(*_folded(terms, target))
        return replace(result, scale=target.scale) if isinstance(target.scale, Tensor) else result


def _check(left: Tensor, right: Tensor) -> None:
    if left.device.type == "cpu" and not is_registered():
        raise QDeltaNetError(
            f"backend npu: the codes are on the CPU; move the model to the NPU, or emulate with {EMULATE}=1"
        )
    longest = max(left.shape[-1], right.shape[-1])
    if longest > AXIS_LIMIT:  # also what proves that products of bytes fit int32: 65535 * 2^14 < 2^31
        raise QDeltaNetError(f"backend npu: an axis of {longest} exceeds {AXIS_LIMIT}; use another backend")


def quant_matmul(left: Tensor, right: Tensor) -> Tensor:
    """int32 [..., M, N] of codes within [-128, 127], by one call of the operator.

    The operator takes 2 to 6 dimensions, contiguous, none of them empty.
    """
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*lead, left.shape[-2], right.shape[-1])
    if not (left.numel() and right.numel()):
        return torch.zeros(shape, dtype=torch.int32, device=left.device)
    if len(shape) > RANKS[1]:
        left, right = (x.expand(*lead, *x.shape[-2:]).flatten(0, -3) for x in (left, right))
    scale = torch.ones(1, dtype=torch.float32, device=left.device)
    multiply = torch.ops.npu.npu_quant_matmul
    result: Tensor = multiply(_int8(left), _int8(right), scale, output_dtype=torch.int32)
    return result.reshape(shape)


def _int8(codes: Tensor) -> Tensor:
    """The codes as int8 with the strides of a new tensor: `to` would keep those of a view."""
    return torch.empty(codes.shape, dtype=torch.int8, device=codes.device).copy_(codes)


def _folded(terms: Sequence[Term], target: Target) -> tuple[list[Term], Target]:
    """The same requantization with scales folded into float32 multipliers on the host, the output's scale included.

    What is left for the device is a product with one factor per group, which needs no float64.
    """
    static = isinstance(target.scale, Tensor)
    out = target.scale.cpu() if isinstance(target.scale, Tensor) else None
    folded = []
    for term in terms:
        scales = [s.cpu() for s in term.scales]
        factors = multipliers(scales, part_of_scale(out, term), 1)
        folded.append(replace(term, scales=tuple(f.to(term.acc.device) for f in factors)))
    one = torch.ones(1, 1, 1, device=terms[0].acc.device)
    return folded, replace(target, scale=one) if static else target


def _on_host(terms: Sequence[Term], target: Target) -> Result:
    """The definition on the CPU; codes and scale return to the device of the accumulators."""
    device = terms[0].acc.device
    moved = [
        replace(
            t,
            acc=t.acc.cpu(),
            scales=tuple(s.cpu() for s in t.scales),
            coefficient=None if t.coefficient is None else t.coefficient.cpu(),
        )
        for t in terms
    ]
    scale = target.scale.cpu() if isinstance(target.scale, Tensor) else target.scale
    mask = None if target.mask is None else target.mask.cpu()
    result = requantize(moved, replace(target, scale=scale, mask=mask))
    return Result(result.codes.to(device), result.scale.to(device), int(result.saturated))


@functools.cache
def rounds_like_the_host(device: str) -> bool:
    """Whether the arithmetic that requantization uses gives the host's bits on a device (tried once)."""
    make = torch.Generator().manual_seed(0)
    wide = torch.randint(-(2**53), 2**53, (4096,), generator=make)
    ties = torch.cat([2**25 + torch.arange(2048), -(2**30) - 8 * torch.arange(2048)])
    x, y = (torch.rand(4096, generator=make) - 0.5 for _ in range(2))
    inputs = (wide, ties, torch.randint(-(2**30), 2**30, (4096,), generator=make), x, y)
    try:
        there = [r.cpu() for r in _arithmetic(*(i.to(device) for i in inputs))]
    except Exception:
        return False  # a missing operator: the host has it
    return all(torch.equal(a, b) for a, b in zip(there, _arithmetic(*inputs), strict=True))


def _arithmetic(wide: Tensor, ties: Tensor, narrow: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """Conversions of int64, its products, and the float32 operations of a requantization, halves included."""
    converted = [wide.to(torch.float32), ties.to(torch.float32), (narrow * 4194303).to(torch.float32)]
    return [*converted, x * y, x + y, x / y, (x * 4096).round(), (ties.to(torch.float32) * 2.0**-24).round()]


# -- what can run here ---------------------------------------------------------------------------------------------


@functools.cache
def npu_status() -> tuple[bool, str]:
    """(available, reason) of backend `npu` in this process. Asked once; the operator is tried before it is trusted.

    Without torch_npu, QDELTANET_EMULATE_NPU=1 registers the emulation.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return _emulated()
    try:
        importlib.import_module("torch_npu")
        visible = bool(torch.get_device_module("npu").is_available())
    except Exception as error:  # without CANN its libraries are missing: OSError, ImportError, RuntimeError
        return False, f"torch_npu does not import: {_one_line(error)}"
    if not visible:
        return False, "no NPU is visible"
    wrong = smoke("npu")
    if wrong is not None:
        return False, wrong
    where = "the device" if rounds_like_the_host("npu") else "the host: float32 of this NPU rounds differently"
    return True, f"npu_quant_matmul; requantizes on {where}"


def _emulated() -> tuple[bool, str]:
    if os.environ.get(EMULATE) == "1":
        register_emulation()
    if not is_registered():
        return False, "torch_npu is not installed: pip install qdeltanet[npu] on a machine with CANN"
    wrong = smoke("cpu")
    return wrong is None, wrong or "emulated on the CPU: the operator's contract, not hardware"


def smoke(device: str) -> str | None:
    """What is wrong with the operator on a device, None where small products of 8 and 16 bits are exact."""
    try:
        right = _splits_on(device) and all(_exact_on(device, qmax) for qmax in (127, 32639))
    except Exception as error:
        return f"npu_quant_matmul failed its smoke call: {_one_line(error)}"
    return None if right else "npu_quant_matmul gave wrong integers in its smoke call"


def _exact_on(device: str, qmax: int) -> bool:
    """One product over ragged sizes, with a broadcast axis, a transposed side and codes at their limits."""
    make = torch.Generator().manual_seed(qmax)
    left = torch.randint(-qmax, qmax + 1, (2, 1, 5, 67), generator=make).float()
    right = torch.randint(-qmax, qmax + 1, (3, 9, 67), generator=make).float()
    left[0], right[0] = qmax, -qmax
    got = NpuBackend().matmul(left.to(device), right.to(device).mT, qmax, qmax)
    return torch.equal(got.cpu().long(), exact_matmul(left, right.mT))


def _splits_on(device: str) -> bool:
    """Every code of 16 bits as two bytes: a floor division that a device may approximate."""
    codes = torch.arange(-32639, 32640, dtype=torch.float32)
    pairs = zip(split_bytes(codes.to(device)), split_bytes(codes), strict=True)
    return all(torch.equal(there.cpu(), here) for there, here in pairs)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

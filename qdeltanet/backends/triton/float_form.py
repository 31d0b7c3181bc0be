"""The floating-point form of a plan's kernel: what the integer one is measured against."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...core import QDeltaNetError
from ...inverse import INPUT, OUTPUT, Plan
from .matmul import runs_on
from .plans import declines_size, mask_condition
from .writer import Lines, kernel_text, load_kernel, padded

TYPES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}


def float_inverse(A: Tensor, plan: Plan, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(I - A)^-1 by one kernel: registers in `dtype`, accumulators in float32. A and the result: [..., C, C].

    A: strictly lower, any floating dtype; the result has A's. Raises QDeltaNetError for plans that no kernel runs,
    another dtype than bfloat16, float16 or float32, or a device that runs no kernels.
    """
    reason = declines_size(plan)
    if dtype not in TYPES:
        reason = f"registers in {dtype}; they are held in bfloat16, float16 or float32"
    if A.shape[-2:] != (plan.chunk_size, plan.chunk_size) or not A.dtype.is_floating_point:
        reason = f"A {list(A.shape)} of {A.dtype}; the plan takes [..., {plan.chunk_size}, {plan.chunk_size}] in floats"
    if not runs_on(A.device):
        reason = f"A is on {A.device}; kernels run on a GPU"
    if reason is not None:
        raise QDeltaNetError(f"float_inverse: {reason}")
    T = torch.empty_like(A, memory_format=torch.contiguous_format)
    matrices = A.numel() // plan.chunk_size**2
    if matrices:
        kernel = float_kernel(plan, dtype, bool(triton.knobs.runtime.interpret))
        with torch.cuda.device_of(T):
            kernel[(matrices,)](A.contiguous(), T, num_warps=4 if plan.chunk_size <= 64 else 8)
    return T


def float_kernel(plan: Plan, dtype: torch.dtype, widen: bool = False) -> Any:
    """kernel(A, T), one program for each matrix."""
    size, container = plan.chunk_size, TYPES[dtype]
    w = Lines()
    w.lines += [
        f"at = tl.program_id(0).to(tl.int64) * {size * size}",
        f"i = tl.arange(0, {padded(size)})[:, None]",
        f"j = tl.arange(0, {padded(size)})[None, :]",
        f"at += i * {size} + j",
        f"inside = (i < {size}) & (j < {size})",
    ]
    registers = {INPUT: w.let("A", f"tl.load(A + at, mask=inside, other=0.0).to({container})")}
    for step in plan.steps:
        w.lines.append(f"# {step}")
        total = registers[step.left]
        if step.right is not None:
            total = w.let("r", f"dot_real({total}, {registers[step.right]}, {widen})")
        for register, sign in step.addends:
            total = w.let("r", f"{total} {'+' if sign > 0 else '-'} {registers[register]}.to(tl.float32)")
        kept = f"tl.where({w.mask(mask_condition(step.mask, size))}, {total}, 0.0)"
        # T is read by no step: it needs no rounding before its diagonal is set
        registers[step.out] = w.let(step.out, kept if step.out == OUTPUT else f"{kept}.to({container})")
    w.lines.append(f"tl.store(T + at, tl.where(i == j, 1.0, {registers[OUTPUT]}), mask=inside)")
    return load_kernel("float_kernel", kernel_text("float_kernel", ["A", "T"], w.lines))

"""Compiles kernels of backend `triton` for sm_90, which needs no GPU, and prints what is in them as JSON.

`test_triton.py` runs this in a process of its own: one process cannot both interpret and compile.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qdeltanet.backends.reference import ReferenceBackend
from qdeltanet.backends.triton import fused
from qdeltanet.backends.triton.float_form import float_kernel
from qdeltanet.backends.triton.matmul import matmul_kernel
from qdeltanet.conformance.inputs import ALL_KINDS, bound_rule, rule_inputs
from qdeltanet.core import Granularity, IntegerArithmetic, Operand, dynamic_scale
from qdeltanet.inverse import Plan, plan

INSTRUCTIONS = r"\b(?:wgmma\.mma_async|mma\.sync|fma|div|mul|add|sub|dp4a)\.\S*(?:f32|f64|s8|bf16)\b"
TARGET = GPUTarget("cuda", 90, 32)


def instructions(
    kernel: Any, types: list[str], constants: dict[str, int] | None = None, warps: int = 4
) -> Counter[str]:
    """Arithmetic instructions of the compiled kernel. types: of the arguments before the constants."""
    names = kernel.arg_names
    constants = constants or {}
    signature = dict(zip(names, [*types, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return Counter(re.findall(INSTRUCTIONS, triton.compile(source, target=TARGET, options=options).asm["ptx"]))


def operand(arithmetic: IntegerArithmetic, site: str, *shape: int) -> Operand:
    """Zero codes of a site, with its static scale or a dynamic one."""
    scheme = arithmetic.site(site)
    assert scheme.held is not None
    x = torch.zeros(2, 1, *shape)
    scale = arithmetic.out_scale(site, scheme, x.shape)
    if isinstance(scale, Granularity):
        scale = dynamic_scale(x, scheme.held.qmax, scale)
    return Operand(site, x, scale, scheme.held)


def integer_kernels(p: Plan, kind: str, bits: int, which: str) -> Iterator[tuple[str, Counter[str]]]:
    """The kernels of two value heads of 128 channels that share a key head."""
    inputs, size = rule_inputs(1, p.chunk_size, 1, 2, 128, 128), p.chunk_size
    scheme, scales = bound_rule(inputs, p, bits, ALL_KINDS[kind])
    ar = IntegerArithmetic(scheme, scales, ReferenceBackend())
    real, codes = "*fp32", "*i8" if bits <= 8 else "*i16"
    rest = [real if scheme.requantize == "float" else "*i64", "*i32", "*i32", "i32"]
    label = f"{kind} int{bits} C = {size}"
    if "plan" in which:
        ready = fused.plan_kernel(ar, p, operand(ar, "A", 2, size, size))
        yield f"plan {label}", instructions(ready.kernel, [real, real, codes, real, *rest], warps=ready.warps)
    if "front" in which:
        ready = fused.front_kernel(ar, p, operand(ar, "k", 1, size, 128), 2)
        yield f"front {label}", instructions(ready.kernel, [*[real] * 3, codes, real, *rest], warps=ready.warps)
    if "back" in which:
        T, v, k = (
            operand(ar, "T", 2, size, size),
            operand(ar, "v_beta", 2, size, 128),
            operand(ar, "k_beta", 2, size, 128),
        )
        ready = fused.back_kernel(ar, T, v, k)
        types = [codes, *[real] * 5, codes, real, *rest]
        yield f"back {label}", instructions(ready.kernel, types, warps=ready.warps)


def kernels() -> Iterator[tuple[str, Counter[str]]]:
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    yield "matmul", instructions(matmul_kernel, [*["*fp32"] * 3, *["i32"] * 9], tile)
    p = plan("block_merge", 64)
    yield from integer_kernels(p, "per_head", 8, "plan front back")
    small = plan("block_merge", 16)
    yield from integer_kernels(small, "per_head dynamic", 8, "plan back")
    yield from integer_kernels(small, "finest dynamic", 16, "front")
    yield from integer_kernels(small, "fixed_point finest", 8, "plan back")
    yield "float bfloat16 C = 64", instructions(float_kernel(p, torch.bfloat16), ["*bf16", "*bf16"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(dict(kernels())))

"""`qdeltanet bench inverse`: the triangular inverse alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...backends import backend_status, get_backend
from ...conformance.inputs import Inputs
from ...core import (
    TINY,
    FloatArithmetic,
    Granularity,
    IntegerArithmetic,
    IntFormat,
    ObservingArithmetic,
    Operand,
    RuleScheme,
    SiteScheme,
    relative_error,
)
from ...delta_rule import prepare
from ...inverse import Plan, invert, plan, run_plan, site_of
from .delta_rule import Size, inputs_of
from .peers import fla, pto_inverse, row_loop, solve_triangular
from .timing import Case

TOLERANCE = 1e-5  # of float64, relative Frobenius: float32 rounding leaves 1e-7 where powers do not explode
BFLOAT16_TOLERANCE = 2e-2  # 8 bits of significand, through ten products


def ut_matrices(inputs: Inputs, chunk_size: int) -> Tensor:
    """A = -tril(diag(beta) (k k^T) * D, -1) of every chunk and head, float32 [N * B, H, C, C]."""
    q, k, v, g, beta = inputs
    front = prepare(q, k, v, g, beta, chunk_size, True)
    arithmetic = FloatArithmetic()
    key = arithmetic.quantize("k", front.k)
    A = arithmetic.store("A", [arithmetic.product(key, key.mT, coefficient=front.write_decay, sign=-1)])
    return A.codes.flatten(0, 1)


def inverse_cases(size: Size, device: str = "cpu", backend: str = "auto") -> Iterator[Case]:
    """block_merge in float32 and INT8 against the solver and the loop; on a GPU Triton's forms against FLA's."""
    A = ut_matrices(inputs_of(size, device), size.chunk_size)
    exact = torch.linalg.inv(torch.eye(size.chunk_size, dtype=torch.float64) - A.cpu().double())
    p = plan("block_merge", size.chunk_size)
    name = f"{A.shape[0] * A.shape[1]} x [{size.chunk_size}, {size.chunk_size}]"
    solver = solve_triangular(A)

    def ours() -> Tensor:
        return invert(A, p)

    def near(run: Callable[[], Tensor], tolerance: float = TOLERANCE) -> Callable[[], tuple[bool, str]]:
        def verify() -> tuple[bool, str]:
            error = float(relative_error(exact, run().cpu().double()).max())
            return error <= tolerance, f"worst matrix {error:.1e} from float64"

        return verify

    yield Case(f"float inverse, {name}", "block_merge", ours, "solve_triangular(I)", solver, near(ours))
    yield Case(f"float inverse, {name}", "block_merge", ours, "row loop", lambda: row_loop(A), near(ours))
    arithmetic, operand = integer_inverse(A, p, device, backend)

    def integers() -> Any:
        return run_plan(p, operand, arithmetic)

    label = f"int8 {arithmetic.backend.name}"
    equal = equals_reference(p, operand, arithmetic)
    yield Case(f"INT8 inverse, {name}", label, integers, "solve_triangular(I)", solver, equal)
    yield from _gpu_cases(A, p, name, integers, label, near, equal)


def integer_inverse(A: Tensor, p: Plan, device: str, backend: str, bits: int = 8) -> tuple[IntegerArithmetic, Operand]:
    """An arithmetic whose per-head static scales hold everything that A reaches, and A's codes."""
    amax: dict[str, float] = {}

    def observe(site: str, x: Tensor, compact: bool) -> None:
        amax[site] = max(amax.get(site, 0.0), float(x.abs().amax()))

    run_plan(p, Operand("A", A.cpu()), ObservingArithmetic(observe))
    amax["A"] = float(A.abs().amax())
    fmt = IntFormat(bits)
    sites = ["A", "T", *(site_of(r) for r in p.registers)]
    scales = {s: torch.full((A.shape[1], 1, 1), max(amax[s], TINY) / fmt.qmax, device=device) for s in sites}
    scheme = RuleScheme(dict.fromkeys(sites, SiteScheme(fmt, "calibrated", Granularity.PER_HEAD)))
    arithmetic = IntegerArithmetic(scheme, scales, get_backend(backend, device))
    return arithmetic, arithmetic.quantize("A", A)


def equals_reference(p: Plan, operand: Operand, arithmetic: IntegerArithmetic) -> Callable[[], tuple[bool, str]]:
    def verify() -> tuple[bool, str]:
        """Codes of T equal reference's, every element that is timed."""
        assert operand.scale is not None
        scales = {k: s.cpu() for k, s in arithmetic.scales.items()}
        judge = IntegerArithmetic(arithmetic.scheme, scales, get_backend("reference"))
        on_cpu = Operand("A", operand.codes.cpu().long(), operand.scale.cpu(), operand.format)
        expected, found = run_plan(p, on_cpu, judge), run_plan(p, operand, arithmetic)
        assert expected is not None
        assert found is not None
        wrong = int((found.codes.cpu().long() != expected.codes).sum())
        return wrong == 0, f"{wrong} of {expected.codes.numel()} codes differ from reference"

    return verify


def _gpu_cases(
    A: Tensor, p: Plan, name: str, integers: Any, label: str, near: Any, equals: Callable[[], tuple[bool, str]]
) -> Iterator[Case]:
    """Triton's float form in bfloat16 and INT8 against flash-linear-attention's solve_tril; PTO on an NPU; a copy."""
    if A.device.type == "npu":
        pto = pto_inverse()
        if pto is not None:
            # its layout is [M, C, C], float16, strictly upper triangular, with I + M: M = -A transposed
            half = (-A).half().flatten(0, 1).mT.contiguous()
            yield Case(f"INT8 inverse, {name}", label, integers, "pto-kernels float16", lambda: pto(half), equals)
    if A.device.type != "cuda" or not backend_status("triton")[0]:
        return
    from ...backends.triton.backend import float_inverse

    half = A.to(torch.bfloat16).contiguous()

    def ours() -> Tensor:
        return float_inverse(half, p)

    check = near(ours, BFLOAT16_TOLERANCE)
    yield Case(f"bfloat16 inverse, {name}", "triton", ours, "copy (floor)", lambda: half.clone(), check)
    theirs = fla("fla.ops.utils.solve_tril", "solve_tril") or fla("fla.ops.utils", "solve_tril")
    if theirs is not None:
        # FLA's layout is [B, T, H, C], all chunks of a head one after the other, with I + M: M = -A
        packed = (-half).transpose(1, 2).reshape(1, -1, half.shape[1], half.shape[-1]).contiguous()
        solve = theirs

        def peer() -> Any:
            return solve(packed, output_dtype=torch.bfloat16)

        yield Case(f"bfloat16 inverse, {name}", "triton", ours, "FLA solve_tril", peer, check)
        yield Case(f"INT8 inverse, {name}", label, integers, "FLA solve_tril", peer, equals)

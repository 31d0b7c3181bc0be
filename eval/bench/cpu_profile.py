"""The numbers of the CPU's profile, measured on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backends import get_backend
from ...core import FLOAT32_EXACT, IntFormat, Target, Term, requantize
from ...inverse import plan, run_plan
from ...inverse.hardware import REQUANTIZE
from .inverse import integer_inverse
from .timing import keep_memory, quantile, threads, timed

Run = Callable[[], Any]
EDGE = 32  # of the products that the rates are measured at: between the leaves and the whole


def measure_cpu(matrices: int = 128, rounds: int = 15) -> dict[str, float]:
    """The numbers of `recipes/profiles/cpu.yaml`, of one thread of this machine, by field.

    Rates of products are those of batches of 32 x 32; vector work is what requantizing takes (four operations an
    element); on-chip traffic is a copy, in bytes of the format held (codes are kept in float32, four bytes each). The
    latencies are a step's overhead: what a step of a plan takes for one matrix of 16 x 16.
    """
    keep_memory()
    count = matrices * 4
    make = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-127, 128, (count, 1, 1, EDGE, EDGE), generator=make).float() for _ in "lr")
    backend = get_backend("cpu", "cpu")
    scale = torch.full((1, 1, 1), 0.1)
    x = torch.randint(-(2**20), 2**20, (matrices, 1, 64, 64), generator=make).float()

    def stored() -> Any:
        return requantize(
            [Term(x.clone(), (scale,), bound=FLOAT32_EXACT, fresh=True)], Target(IntFormat(8), scale, "float")
        )

    step = _step_overhead()
    with threads(1):

        def ns(run: Run) -> float:
            run()
            return quantile([timed(run, "cpu") for _ in range(rounds)], 0.5) * 1e9

        macs = count * EDGE**3
        copy = ns(x.clone)
        return {
            "macs_per_ns.int8": macs / ns(lambda: backend.matmul(left, right, 127, 127)),
            "macs_per_ns.int16": macs / ns(lambda: backend.matmul(left, right, 2**15, 2**15)),
            "macs_per_ns.float": macs / ns(lambda: left @ right),
            "vector_bytes_per_ns": REQUANTIZE * 4 * x.numel() / (ns(stored) - copy),
            "onchip_bytes_per_ns": 2 * x.numel() / copy,
            "offchip_bytes_per_ns": 8 * 2**24 / ns(torch.zeros(2**24).clone),
            "product_latency": ns(step[0]) / step[1],
            "concurrency": float(matrices),
        }


def _step_overhead() -> tuple[Run, int]:
    """A run of a plan on one small matrix, and its number of stored steps."""
    p = plan("neumann", 16)
    A = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).tril(-1) * 0.1
    arithmetic, operand = integer_inverse(A, p, "cpu", "cpu")
    return lambda: run_plan(p, operand, arithmetic), len([s for s in p.steps if not s.is_copy])

"""What the steps would requantize, found by running them without numbers.

The very code that runs the steps runs here on tensors without data, over a backend that only takes notes. Scales,
bounds, regions and the order of things are then those of the steps, and a kernel cannot disagree with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import (
    FloatContainers,
    IntegerArithmetic,
    Operand,
    Result,
    Target,
    Term,
    coefficient_bits,
    product_bound,
)
from ...core.granularity import reduced_dims
from ...inverse import Plan, run_plan

# A dynamic scale has no value yet; while scales are float32, its stand-in is float64 and passes through every view.
DYNAMIC = torch.float64


@dataclass(frozen=True)
class Call:
    """One requantization: terms whose accumulators have a shape only."""

    terms: tuple[Term, ...]
    target: Target

    @property
    def blocks(self) -> int:
        """Blocks on the diagonal of a compact output."""
        return (self.target.shape or self.terms[0].acc.shape)[-3] if self.target.compact else 1


class Recorder(FloatContainers):
    """Notes requantizations and multiplies nothing."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def requantize(self, terms: Sequence[Term], target: Target) -> Result:
        self.calls.append(Call(tuple(terms), target))
        codes = torch.empty(target.shape or _shape(terms[0]), device="meta")
        if isinstance(target.scale, Tensor):
            return Result(codes, target.scale, 0)
        kept = codes.amax(reduced_dims(target.scale, target.compact), keepdim=True).shape
        return Result(codes, torch.ones(kept, dtype=DYNAMIC), 0)


def _shape(term: Term) -> tuple[int, ...]:
    """Of what a term alone becomes: coefficient codes may have a multiple of the accumulator's heads."""
    if term.coefficient is None:
        return tuple(term.acc.shape)
    return (term.coefficient.shape[-3], *term.acc.shape[-2:])


def is_dynamic(scale: Tensor | None) -> bool:
    """Whether a scale differs from matrix to matrix of a head."""
    return scale is not None and (scale.dtype == DYNAMIC or scale.dim() > 3)


def without_numbers(x: Operand) -> Operand:
    """The operand [..., H, R, C] as the trace takes it: [H, R, C], no codes, stand-ins for dynamic scales."""
    assert x.scale is not None
    scale = torch.ones(x.scale.shape[-3:], dtype=DYNAMIC) if is_dynamic(x.scale) else x.scale.cpu()
    return replace(x, codes=torch.empty(x.codes.shape[-3:], device="meta"), scale=scale)


def tracer(arithmetic: IntegerArithmetic) -> tuple[IntegerArithmetic, list[Call]]:
    """An arithmetic of the same scheme and scales that takes notes, and its notes.

    On the CPU whatever the device: multipliers are then the same bits everywhere.
    """
    recorder = Recorder()
    scales = {key: scale.detach().cpu() for key, scale in arithmetic.scales.items()}
    return IntegerArithmetic(arithmetic.scheme, scales, recorder), recorder.calls


def trace_plan(arithmetic: IntegerArithmetic, plan: Plan, A: Operand) -> list[Call]:
    """The requantizations of `run_plan`, in order."""
    notes, calls = tracer(arithmetic)
    run_plan(plan, without_numbers(A), notes)
    return calls


def trace_front(arithmetic: IntegerArithmetic, plan: Plan, k: Operand, heads: int) -> list[Call]:
    """That of A from k k^T, then those of the plan. heads: value heads."""
    notes, calls = tracer(arithmetic)
    bare = without_numbers(k)
    A = notes.store("A", [notes.product(bare, bare.mT, coefficient=torch.zeros(heads, 1, 1), sign=-1)])
    # the unit of the coefficient codes was made beside the accumulator, without a number
    term = calls[0].terms[0]
    unit = torch.full((1, 1, 1), 2.0 ** -front_fraction(k))
    calls[0] = replace(calls[0], terms=(replace(term, scales=(*term.scales[:-1], unit)),))
    run_plan(plan, A, notes)
    return calls


def front_fraction(k: Operand) -> int:
    """Fractional bits of the coefficient codes of A."""
    assert k.format is not None
    return coefficient_bits(product_bound(k.codes.shape[-1], k.format, k.format), k.format.bits)


def trace_back(arithmetic: IntegerArithmetic, T: Operand, k_beta: Operand) -> list[Call]:
    """That of w."""
    notes, calls = tracer(arithmetic)
    x = without_numbers(k_beta)
    notes.store("w", [notes.product(without_numbers(T), x), notes.addend(x)])
    return calls

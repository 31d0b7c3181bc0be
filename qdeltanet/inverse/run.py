"""Run a plan over an arithmetic: the float, fake-quantized, integer and observing runner are this one loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import (
    Arithmetic,
    BindingError,
    FloatArithmetic,
    IntegerArithmetic,
    Mode,
    ObservingArithmetic,
    Operand,
    check_codes,
    diagonal_blocks,
    whole,
)
from .geometry import geometry
from .joins import head_length, joined
from .plan import IDENTITY, INPUT, OUTPUT, Plan, Step
from .steps import Register, identity_of, run_step


def run_plan(plan: Plan, A: Operand, arithmetic: Arithmetic) -> Operand | None:
    """T - I for the strictly lower A, both [..., H, C, C]; None for the empty plan (T = I).

    Registers are held as their blocks on the diagonal, and a product takes only the rows and columns that can be
    non-zero; what is skipped is exact zeros, so the codes equal those of full products.
    """
    check_codes(A)
    return run_steps(plan, A, arithmetic)


def run_steps(plan: Plan, A: Operand, arithmetic: Arithmetic) -> Operand | None:
    """`run_plan` for codes that a site has just been given."""
    fused: Operand | None = arithmetic.fused("run_plan", plan, A) if plan.steps else None
    if fused is not None:
        return fused
    if isinstance(arithmetic, IntegerArithmetic):
        check_factors(plan, arithmetic.scheme.requantize)
    if type(arithmetic) is FloatArithmetic and _joins(plan, A.codes):
        T = _run_joined(plan, A.codes)
        T.diagonal(dim1=-2, dim2=-1).zero_()
        return Operand(OUTPUT, T)
    registers = _run_steps(plan, len(plan.steps), A, arithmetic)
    return whole(registers[OUTPUT].operand) if plan.steps else None


def unfit_factor(plan: Plan, mode: Mode) -> Step | None:
    """The first copy whose factor is no power of two, where the mode asks for scales that are."""
    steps = plan.steps if mode == "power_of_two" else ()
    return next((s for s in steps if math.frexp(s.factor)[0] != 0.5), None)


def check_factors(plan: Plan, mode: Mode) -> None:
    """Raise BindingError for an `unfit_factor`. Binding asks, and so does every run in integers."""
    step = unfit_factor(plan, mode)
    if step is not None:
        raise BindingError(
            f"{plan.method}: register {step.out} is {step.left} times {step.factor:.6g}, which is no power of two; "
            "use requantize: float or fixed_point, or another method"
        )


def _run_steps(plan: Plan, steps: int, A: Operand, arithmetic: Arithmetic) -> dict[str, Register]:
    """Registers after the first `steps` steps."""
    registers = {INPUT: Register(A)}
    if plan.uses(IDENTITY):
        registers[IDENTITY] = Register(identity_of(A))
    for step, where in list(zip(plan.steps, geometry(plan), strict=True))[:steps]:
        registers[step.out] = run_step(step, where, registers, arithmetic)
    return registers


def _run_joined(plan: Plan, A: Tensor) -> Tensor:
    """T with its diagonal: the steps before the joins as ever, then the joins."""
    head, size = head_length(plan), plan.chunk_size
    last = plan.steps[head - 1]
    merged: Tensor | None = None
    if head > 1 or not last.is_copy:
        register = _run_steps(plan, head, Operand(INPUT, A), FloatArithmetic())[last.out].operand
        blocks = diagonal_blocks(register, last.mask.outer).codes
        merged = blocks.reshape(-1, *blocks.shape[-3:])
    return joined(A.reshape(-1, size, size), merged, last.mask.outer).view(A.shape)


def _joins(plan: Plan, A: Tensor) -> bool:
    """Whether the float reader of joins takes a plan; it writes in place, which autograd would not survive."""
    return 0 < head_length(plan) < len(plan.steps) and not A.requires_grad


def invert(A: Tensor, plan: Plan) -> Tensor:
    """(I - A)^-1 in floating point by a plan. A: [..., C, C], strictly lower; returns T with its diagonal."""
    if _joins(plan, A):
        return _run_joined(plan, A)
    T = run_plan(plan, Operand(INPUT, A), FloatArithmetic())
    if T is None:
        return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    own = T.codes.untyped_storage().data_ptr() != A.untyped_storage().data_ptr()  # a plan of copies hands A on
    result = T.codes if own and not T.codes.requires_grad else T.codes.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def register_ranges(plan: Plan, A: Tensor) -> dict[str, float]:
    """Range analysis: the largest |entry| that each register reaches for A [..., C, C], in A's dtype.

    Non-finite entries (a method that overflows) are reported as they are.
    """
    reached: dict[str, float] = {INPUT: float(A.abs().amax())}

    def observe(site: str, x: Tensor, compact: bool) -> None:
        name = site.removeprefix("inverse.")
        top = float(x.abs().amax())
        reached[name] = top if top != top else max(top, reached.get(name, 0.0))

    run_plan(plan, Operand(INPUT, A), ObservingArithmetic(observe))
    return reached

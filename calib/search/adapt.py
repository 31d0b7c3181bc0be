"""The published method alone: which order and number of residual steps suit a chunk size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ...core import IntFormat, QDeltaNetError
from ...delta_rule.laboratory import invert_integer, relative_errors
from ...delta_rule.measure import Specimens, Trial
from ...inverse import Profile, plan, plan_cost

ORDERS = (2, 3, 4, 5)
STEPS = tuple(range(1, 17))


@dataclass(frozen=True)
class Pair:
    """order, residual_steps: of `neumann`, with as many sub-diagonals kept as the order says. median, worst: relative
    Frobenius error of T, infinite where it overflows. cost: modelled ns per matrix."""

    order: int
    residual_steps: int
    median: float
    worst: float
    cost: float
    matmuls: int
    depth: int

    def as_dict(self) -> dict[str, Any]:
        return {k: None if v == float("inf") else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Adapted:
    """best: the cheapest pair whose worst error stays within the budget, None where there is none; grid: all pairs."""

    best: Pair | None
    grid: Sequence[Pair]


def adapt_neumann(A: Tensor, profile: Profile, budget: float, number: str = "int8") -> Adapted:
    """Order and residual steps of the masked Neumann inverse for matrices A [H, M, C, C], strictly lower.

    The first half of the matrices calibrates static scales per head and register, the second is measured. budget: the
    largest relative error of T. number: format of A, T and registers, int2 to int16. Raises QDeltaNetError for a budget
    that is not positive.
    """
    if not budget > 0:
        raise QDeltaNetError(f"budget {budget:g}: must be a positive relative error of T")
    specimens, fmt = Specimens.of({"A": A}), IntFormat.parse(number)
    grid = [_pair(specimens, profile, fmt, order, steps) for order in ORDERS for steps in STEPS]
    within = [p for p in grid if p.worst <= budget]
    return Adapted(min(within, key=lambda p: (p.cost, p.worst), default=None), grid)


def _pair(specimens: Specimens, profile: Profile, fmt: IntFormat, order: int, steps: int) -> Pair:
    built = plan("neumann", specimens.chunk_size, order=order, band=order, residual_steps=steps)
    scheme, scales = Trial(built, specimens).bound(fmt)
    errors = relative_errors(invert_integer(built, scheme, scales, specimens.A).T, specimens.exact)
    cost = plan_cost(built, scheme.sites, profile).total
    return Pair(order, steps, float(errors.median()), float(errors.amax()), cost, built.matmuls, built.depth)

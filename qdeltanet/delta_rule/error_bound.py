"""A proven bound on the error of a plan: the plan run once more, each entry with a bound on its error beside it.

Running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3), entry by entry. Let x be
what a register holds in exact arithmetic and x + d, |d| <= e, what it holds in a format.

- product: |(L + dL)(R + dR) - L R| <= |L| eR + eL (|R| + eR), plus the rounding of the sum, at most
  gamma (|L| + eL)(|R| + eR); addends add their e.
- stored with step s in integers: e + s / 2, plus the distance of x from the range of the codes: clipping is a
  projection onto an interval, so it moves x + d and x no further apart than they were.
- stored in a float format of unit roundoff u: e + u (|x| + e) + half the smallest subnormal; no bound beyond its range.

gamma is n 2^-24 with n the roundings that a term of a step meets. In integers accumulators are exact; the first of t
terms is rounded t + 2 times (conversion, multiplier, product, t - 1 sums) and twice more where copies with a factor
are read: n = t + 4, t taken from the plan's longest step. In floats the product itself is a sum of C: n = C + t + 4.
A enters as float32 and is divided by its scale in float32, two roundings more, and T is read as float32, one more.
At the end comes what the method itself leaves out, |T of the plan - (I - A)^-1|, which is 0 for exact methods. The
bound holds for every plan, and is pessimistic where errors cancel: it takes absolute values in each product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import FloatArithmetic, Granularity, IntFormat, Operand, Region, RuleScheme, Term, fit_scale
from ..core.operand import block_part
from ..inverse import INPUT, Plan, run_plan
from ..inverse.plan import IDENTITY

Store = Callable[[str, Tensor, Tensor, bool], Tensor]
UNIT = 2.0**-24  # unit roundoff of float32


class ErrorArithmetic(FloatArithmetic):
    """Codes are [2, ..., R, C]: exact values, and bounds on their errors.

    store(site, x, e, compact) gives the bound after x enters a site; gamma: relative rounding of a sum's terms.
    """

    def __init__(self, stored: Store, gamma: float) -> None:
        self.stored, self.gamma = stored, gamma

    def quantize(self, site: str, x: Tensor) -> Operand:
        return self._entered(Operand(site, torch.stack([x, 2 * UNIT * x.abs()])))

    def product(
        self,
        left: Operand,
        right: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        parts: tuple[Region, Region] | None = None,
        size: int = 0,
    ) -> Term:
        if parts is not None:
            left, right = block_part(left, size, *parts[0]), block_part(right, size, *parts[1])
        (L, eL), (R, eR) = _planes(left), _planes(right)
        error = L.abs() @ eR + eL @ (R.abs() + eR)
        error = error + self.gamma * (L.abs() @ R.abs() + error)
        return Term(torch.stack([L @ R, sign * error]), sign=sign, region=region)

    def addend(self, x: Operand, *, sign: int = 1, **options: Any) -> Term:
        value, error = _planes(x)
        error = error + self.gamma * (value.abs() + error)
        return super().addend(replace(x, codes=torch.stack([value, sign * error])), sign=sign, **options)

    def store(
        self,
        site: str,
        terms: Sequence[Term],
        *,
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Operand:
        return self._entered(super().store(site, terms, shape=shape, mask=mask, compact=compact))

    def _entered(self, x: Operand) -> Operand:
        value, error = x.codes
        after = self.stored(x.site, value, error, x.compact)
        alive = (value != 0) | (error != 0)  # a zero that is known exactly stays one
        return replace(x, codes=torch.stack([value, torch.where(alive, after, 0.0)]))


def _planes(x: Operand) -> tuple[Tensor, Tensor]:
    """Values and bounds. The identity, which a plan makes in the shape of A's codes, is known exactly."""
    value, error = x.codes
    return value, torch.zeros_like(error) if x.site == IDENTITY else error


def roundings(plan: Plan) -> int:
    """How often a term is rounded in float32 on its way into a register, at most (see above)."""
    return max((len(s.summands) + (s.right is not None) for s in plan.steps), default=0) + 4


def integer_errors(plan: Plan, formats: Mapping[str, IntFormat], scales: Mapping[str, Tensor]) -> ErrorArithmetic:
    """The arithmetic of `integer_error_bounds`."""

    def stored(site: str, x: Tensor, e: Tensor, compact: bool) -> Tensor:
        s = fit_scale(scales[site].double(), x.shape, compact)
        beyond = (x.abs() - formats[site].qmax * s).clamp(min=0)
        return e + beyond + s / 2

    return ErrorArithmetic(stored, roundings(plan) * UNIT)


def integer_error_bounds(
    plan: Plan, A: Tensor, exact: Tensor, formats: Mapping[str, IntFormat], scales: Mapping[str, Tensor]
) -> Tensor:
    """Bounds on the relative Frobenius error of T in integers, [H], for A and exact T [H, C, C] float64.

    formats: by site; scales: static, one per head or tensor. Infinite where nothing can be said.
    """
    return _bounds(plan, A, exact, integer_errors(plan, formats, scales))


def float_error_bounds(plan: Plan, A: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """As `integer_error_bounds`, for products summed in float32 and stored in a float dtype."""
    info = torch.finfo(dtype)

    def stored(site: str, x: Tensor, e: Tensor, compact: bool) -> Tensor:
        top = x.abs() + e
        after = e + info.eps / 2 * top + info.smallest_normal * info.eps / 2
        return torch.where(top + after > info.max, float("inf"), after)

    return _bounds(plan, A, exact, ErrorArithmetic(stored, (plan.chunk_size + roundings(plan)) * UNIT))


def _bounds(plan: Plan, A: Tensor, exact: Tensor, arithmetic: ErrorArithmetic) -> Tensor:
    eye = torch.eye(plan.chunk_size, dtype=torch.float64)
    T = run_plan(plan, arithmetic.quantize(INPUT, A.double()), arithmetic)
    value, error = (torch.zeros_like(A), torch.zeros_like(A)) if T is None else T.codes
    total = error + UNIT * (value.abs() + error) + (value + eye - exact).abs()
    bound = total.flatten(-2).norm(dim=-1) / exact.flatten(-2).norm(dim=-1)
    return bound.nan_to_num(nan=float("inf"), posinf=float("inf"))


@dataclass(frozen=True)
class Worst:
    """Matrices A and exact T [M, H, C, C], measured errors [M, H], and groups of heads: of each, the worst matrix."""

    A: Tensor
    exact: Tensor
    errors: Tensor
    groups: Mapping[str, slice]

    def places(self) -> tuple[Tensor, Tensor]:
        """(chunk, head) of the largest error of each group, int64 each."""
        found = []
        for heads in self.groups.values():
            own = self.errors[:, heads]
            flat = int(own.argmax())
            found.append((flat // own.shape[1], heads.start + flat % own.shape[1]))
        chunk, head = torch.tensor(found).T
        return chunk, head


def worst_bounds(
    plan: Plan, worst: Worst, dtype: torch.dtype | None, scheme: RuleScheme | None, scales: Mapping[str, Tensor]
) -> dict[str, float | None]:
    """The bound for the worst matrix of each group, in a float dtype or in integers (a bound scheme, static scales).

    None where nothing can be said: in float64, which the exact T is computed in itself, for carried registers, for
    scales that are dynamic or stand per row or column, and where requantization is not in float32.
    """
    if dtype is torch.float64 or (scheme is not None and not (scheme.requantize == "float" and _per_head(scheme))):
        return dict.fromkeys(worst.groups)
    chunk, head = worst.places()
    A, exact = worst.A[chunk, head], worst.exact[chunk, head]
    if dtype is not None:
        bounds = float_error_bounds(plan, A, exact, dtype)
    else:
        assert scheme is not None
        formats = {site: s.format for site, s in scheme.sites.items() if s.format is not None}
        own = {site: s if s.shape[0] == 1 else s[head] for site, s in scales.items()}
        bounds = integer_error_bounds(plan, A, exact, formats, own)
    return {g: x if x < float("inf") else None for g, x in zip(worst.groups, bounds.tolist(), strict=True)}


def _per_head(scheme: RuleScheme) -> bool:
    kept = (Granularity.PER_HEAD, Granularity.PER_TENSOR)
    return all(
        s.format is not None and s.carry is None and s.granularity in kept and s.scale != "dynamic"
        for s in scheme.sites.values()
    )

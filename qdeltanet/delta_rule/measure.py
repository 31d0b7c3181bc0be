"""Methods measured: specimens that all of them share, and one plan on these in format after format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..core import Granularity, IntFormat, QDeltaNetError, RuleScheme, unknown
from ..inverse import Plan
from ..inverse import plan as make_plan
from .error_bound import Worst, worst_bounds
from .laboratory import (
    FLOAT_FORMATS,
    InverseScheme,
    Inverted,
    Seen,
    exact_inverse,
    invert_float,
    invert_integer,
    observe_ranges,
    quantized,
    relative_errors,
    static_scales,
)

LEAST_FLOOR = 0.25  # of a step of A's format: what counts as floor where A is represented exactly


@dataclass(frozen=True)
class Measured:
    """Errors of T over the matrices of a group, relative Frobenius; infinite where T is not finite.

    worst_to_floor: worst / `Specimens.floor`. max_intermediate: the largest |entry| that A, T or a register reaches in
    float64. overflow: T or a register left the format, or float32 in calibration. saturated: clipped codes, all groups
    of the run together. scale: where static scales come from; None in float. theory: a proven bound on the error of the
    worst matrix (error_bound.py); None where there is none.
    """

    median: float
    worst: float
    worst_to_floor: float
    max_intermediate: float
    overflow: bool
    saturated: int
    scale: str | None
    theory: float | None


@dataclass(frozen=True)
class Specimens:
    """Matrices to measure methods on, and to calibrate static scales on, each float64 [M, H, C, C].

    groups: names for ranges of heads; results are per group, and one run serves them all, since scales are per head.
    limit: what |A_ij| and |T_ij| provably stay within, as `Family.limit`.
    """

    calibration: Tensor
    A: Tensor
    groups: Mapping[str, slice]
    limit: float | None = 1.0
    _quantized: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, families: Mapping[str, Tensor], limit: float | None = 1.0) -> Specimens:
        """From matrices [H, M, C, C] by name, M and C all alike: the first half calibrates, the second is measured.

        A single matrix per head serves for both.
        """
        groups, start = {}, 0
        for name, A in families.items():
            groups[name] = slice(start, start + A.shape[0])
            start += A.shape[0]
        every = torch.cat(list(families.values())).transpose(0, 1).contiguous()
        half = every.shape[0] // 2
        return cls(every[:half] if half else every, every[half:], groups, limit)

    def thinned(self, step: int) -> Specimens:
        """Every step-th matrix, for methods that take long."""
        return Specimens(self.calibration[::step], self.A[::step], self.groups, self.limit)

    @property
    def chunk_size(self) -> int:
        return self.A.shape[-1]

    @cached_property
    def exact(self) -> Tensor:
        return exact_inverse(self.A)

    def floor(self, name: str, group: str) -> float:
        """Worst error in a group of the exact inverse of A as the format holds it, at least a quarter of a step.

        Integers: A's codes at the scale that the default method gives A, whatever the method at hand, and 0.25 / qmax.
        Floats: A rounded to the format, and 0.25 eps.
        """
        if name not in self._quantized:
            self._quantized[name] = relative_errors(exact_inverse(self._as_held(name)), self.exact)
        worst = float(self._quantized[name][:, self.groups[group]].amax())
        step = torch.finfo(FLOAT_FORMATS[name]).eps if name in FLOAT_FORMATS else 1 / IntFormat.parse(name).qmax
        return max(worst, LEAST_FLOOR * step)

    def _as_held(self, name: str) -> Tensor:
        if name in FLOAT_FORMATS:
            return self.A.to(FLOAT_FORMATS[name]).double()
        trial = Trial(make_plan(chunk_size=self.chunk_size), self)
        return quantized(*trial.bound(IntFormat.parse(name)), self.A)


class Trial:
    """One plan on specimens. What formats share is computed once: ranges on the calibration half, a run in float64.

    chosen: how integers are held; None for what the default recipes would (`InverseScheme.of`).
    """

    def __init__(self, plan: Plan, specimens: Specimens, chosen: InverseScheme | None = None) -> None:
        if plan.chunk_size != specimens.chunk_size:
            raise QDeltaNetError(f"a plan for chunks of {plan.chunk_size} on matrices of {specimens.chunk_size}")
        self.plan, self.specimens, self.chosen = plan, specimens, chosen
        self._seen: dict[frozenset[tuple[str, Granularity]], Seen] = {}

    @cached_property
    def in_float64(self) -> Inverted:
        return invert_float(self.plan, self.specimens.A, "fp64")

    def scheme(self, fmt: IntFormat) -> InverseScheme:
        return self.chosen or InverseScheme.of(fmt, self.plan, self.specimens.limit)

    def bound(self, fmt: IntFormat) -> tuple[RuleScheme, dict[str, Tensor]]:
        """The bound scheme of a format and its static scales. Raises BindingError."""
        chosen = self.scheme(fmt)
        scheme = chosen.bound(self.plan)
        return scheme, static_scales(self.plan, chosen, scheme, self._ranges(scheme))

    def _ranges(self, scheme: RuleScheme) -> Seen:
        static = {site: s for site, s in scheme.sites.items() if s.scale == "calibrated"}
        key = frozenset((site, s.granularity) for site, s in static.items())
        if key not in self._seen or any(s.carry for s in static.values()):
            self._seen[key] = observe_ranges(self.plan, scheme, self.specimens.calibration)
        return self._seen[key]

    def measure(self, name: str) -> dict[str, Measured]:
        """A format (fp64, fp32, bf16, fp16, int2 to int16) by group. Raises QDeltaNetError for another name."""
        check_format(name)
        scales: Mapping[str, Tensor] = {}
        if name in FLOAT_FORMATS:
            found = self.in_float64 if name == "fp64" else invert_float(self.plan, self.specimens.A, name)
            lost = ~found.largest.isfinite()
            scheme, scale = None, None
        else:
            fmt = IntFormat.parse(name)
            scheme, scales = self.bound(fmt)
            found = invert_integer(self.plan, scheme, scales, self.specimens.A)
            lost, scale = self._overflowed(scheme), str(self.scheme(fmt))
        errors = relative_errors(found.T, self.specimens.exact)
        wanted = Worst(self.specimens.A, self.specimens.exact, errors, self.specimens.groups)
        theory = worst_bounds(self.plan, wanted, FLOAT_FORMATS.get(name), scheme, scales)
        lost = lost | errors.isinf().any(0)
        return {
            group: Measured(
                median=float(errors[:, heads].median()),
                worst=float(errors[:, heads].amax()),
                worst_to_floor=float(errors[:, heads].amax()) / self.specimens.floor(name, group),
                max_intermediate=float(self.in_float64.largest[heads].amax()),
                overflow=bool(lost[heads].any()),
                saturated=found.saturated,
                scale=scale,
                theory=theory[group],
            )
            for group, heads in self.specimens.groups.items()
        }

    def _overflowed(self, scheme: RuleScheme) -> Tensor:
        """Heads in which a register left float32 while ranges were observed, [H]."""
        heads = torch.zeros(self.specimens.A.shape[1], dtype=torch.bool)
        for top in self._ranges(scheme).values():
            heads |= ~top.flatten(1).amax(1).isfinite()
        return heads


def check_format(name: str) -> str:
    """Raises QDeltaNetError for what is neither a float format nor int2 to int16."""
    integers = [f"int{bits}" for bits in range(2, 17)]
    if name not in FLOAT_FORMATS and name not in integers:
        raise unknown("format", name, [*FLOAT_FORMATS, *integers])
    return name


def measure(
    plan: Plan, A: Tensor, name: str, chosen: InverseScheme | None = None, limit: float | None = 1.0
) -> Measured:
    """One plan in one format on A [H, M, C, C]; of several plans or formats on the same A, `Trial` shares the work."""
    return Trial(plan, Specimens.of({"A": A}, limit), chosen).measure(name)["A"]

"""The inverse alone, on given matrices: any plan in any format, its error beside the least one possible.

Matrices are A [M, H, C, C] here: chunks, heads, tokens, as the rule has them. The *floor* is the error of the exact
inverse of A as its codes stand for it: no method that is handed these codes can know better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import (
    FloatContainers,
    Granularity,
    IntegerArithmetic,
    IntFormat,
    Mode,
    NonFiniteError,
    ObservingArithmetic,
    RuleScheme,
    SiteArithmetic,
    SiteScheme,
    grouped,
    relative_error,
)
from ..inverse import INPUT, OUTPUT, Plan, run_plan
from .binding import bind, make_scales, scale_specs
from .sites import is_register, rule_sites

FLOAT_FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADROOM = 1.25
LARGEST_RANGE = 2.0**100  # what a static scale is made for at most: beyond it a register counts as overflowed

Seen = Mapping[tuple[str, Granularity], Tensor]


@dataclass(frozen=True)
class InverseScheme:
    """How A, T and the registers are held: one scheme for all, with exceptions by site name.

    shared: one static range for all of them; headroom: factor on calibrated ranges, as `make_scales` has them. limit:
    what bounded registers provably stay within (max beta); None where nothing is proven. requantize, accumulator_bits:
    as RuleScheme has them.
    """

    default: SiteScheme
    sites: Mapping[str, SiteScheme] | None = None
    shared: bool = False
    headroom: float = 1.0
    limit: float | None = 1.0
    requantize: Mode = "float"
    accumulator_bits: int = 64

    @classmethod
    def of(cls, fmt: IntFormat, plan: Plan, limit: float | None = 1.0) -> InverseScheme:
        """The scheme that the default recipes give the inverse.

        Above 8 bits clipping, not rounding, is the error: the proven range, where every register has one. Below, one
        calibrated range per head for all registers (their ranges nest, and equal scales pass addends on exactly), with
        headroom at 5 bits and above, where a step is small beside what calibration may have missed. Where nothing is
        proven, one calibrated range per register.
        """
        bounded = limit is not None and plan.bounded >= {INPUT, OUTPUT, *plan.registers}
        if fmt.bits > 8 and bounded:
            return cls(SiteScheme(fmt, "bound"), limit=limit)
        return cls(SiteScheme(fmt), shared=bounded, headroom=HEADROOM if fmt.bits > 4 else 1.0, limit=limit)

    def bound(self, plan: Plan) -> RuleScheme:
        """Bound to a plan, sites of the inverse only. Raises BindingError."""
        outside = SiteScheme(IntFormat(8))
        every = {s: self.default if _in_inverse(s) else outside for s in rule_sites(plan)}
        every |= {s: scheme for s, scheme in (self.sites or {}).items() if s in every}
        bound = bind(RuleScheme(every, self.requantize, self.accumulator_bits), plan, key_dim=1)
        return replace(bound, sites={s: x for s, x in bound.sites.items() if _in_inverse(s)})

    def __str__(self) -> str:
        """Where scales come from, in the words of recipes."""
        if self.default.scale != "calibrated":
            return self.default.scale
        return f"calibrated, {'shared' if self.shared else 'per register'}"


def _in_inverse(site: str) -> bool:
    return site in (INPUT, OUTPUT) or is_register(site)


@dataclass(frozen=True)
class Inverted:
    """T [M, H, C, C] with its diagonal, float64; per head what the largest register reached, [H] float64.

    largest is infinite where a register left the format, and NaN where it was not watched (integers). saturated:
    clipped codes of all heads.
    """

    T: Tensor
    largest: Tensor
    saturated: int = 0


def exact_inverse(A: Tensor) -> Tensor:
    """(I - A)^-1 in float64 by back substitution. A: [..., C, C], strictly lower."""
    eye = torch.eye(A.shape[-1], dtype=torch.float64)
    return torch.linalg.solve_triangular(eye - A.double(), eye.expand_as(A), upper=False, unitriangular=True)


def relative_errors(found: Tensor, exact: Tensor) -> Tensor:
    """Relative Frobenius error of each matrix, [...]; infinite where `found` is not finite."""
    return relative_error(exact, found).nan_to_num(nan=float("inf"), posinf=float("inf"))


def invert_float(plan: Plan, A: Tensor, name: str) -> Inverted:
    """A plan in fp64, fp32, bf16 or fp16. A: [M, H, C, C].

    Products accumulate in float32 (fp64: in float64) and what is stored is rounded, as matrix units do.
    """
    wide = torch.float64 if name == "fp64" else torch.float32
    arithmetic = _Rounding(FLOAT_FORMATS[name], A.shape[1])
    T = run_plan(plan, arithmetic.quantize(INPUT, A.to(wide)), arithmetic)
    return Inverted(_with_diagonal(A, None if T is None else T.codes), arithmetic.largest)


class _Rounding(SiteArithmetic):
    """Stored tensors are rounded to a dtype; largest: |entry| per head, [H]."""

    def __init__(self, dtype: torch.dtype, heads: int) -> None:
        self.dtype = dtype
        self.largest = torch.zeros(heads, dtype=torch.float64)

    def enter(self, site: str, x: Tensor, compact: bool) -> Tensor:
        x = x.to(self.dtype).to(x.dtype)
        top = x.abs().movedim(-4 if compact else -3, 0).flatten(1).amax(1).nan_to_num(nan=float("inf"))
        self.largest = torch.maximum(self.largest, top.double())
        return x


def _with_diagonal(A: Tensor, T: Tensor | None) -> Tensor:
    """I + T in float64; I for an empty plan."""
    return (torch.zeros_like(A) if T is None else T).double() + torch.eye(A.shape[-1], dtype=torch.float64)


# -- integers ----------------------------------------------------------------------------------------------------------


def observe_ranges(plan: Plan, scheme: RuleScheme, A: Tensor) -> dict[tuple[str, Granularity], Tensor]:
    """What A and the registers reach in float32 on calibration matrices A [M, H, C, C], for the static scales of a
    bound scheme: by (site, granularity), in the shape of the scale. Not finite where a register overflows."""
    specs = scale_specs(_completed(scheme, plan), plan)
    seen: dict[tuple[str, Granularity], Tensor] = {}

    def observe(site: str, x: Tensor, compact: bool) -> None:
        for granularity in {s.granularity for s in specs if s.site == site and not s.bound}:
            top = grouped(x, granularity, compact).abs().amax((0, -1))
            seen[site, granularity] = torch.maximum(seen.get((site, granularity), top), top)

    if any(not s.bound for s in specs):
        arithmetic = ObservingArithmetic(observe)
        run_plan(plan, arithmetic.quantize(INPUT, A.float()), arithmetic)
    return seen


def static_scales(plan: Plan, chosen: InverseScheme, scheme: RuleScheme, seen: Seen) -> dict[str, Tensor]:
    """Static scales of a scheme that `chosen` was bound to, from observed ranges."""
    ranges = {key: top.nan_to_num(nan=LARGEST_RANGE).clamp(max=LARGEST_RANGE) for key, top in seen.items()}
    return make_scales(
        scale_specs(_completed(scheme, plan), plan),
        ranges,
        shared=chosen.shared,
        power_of_two=scheme.requantize == "power_of_two",
        headroom=chosen.headroom,
        beta_max=chosen.limit or 1.0,
        proven=() if chosen.limit is None else plan.bounded,
    )


def _completed(scheme: RuleScheme, plan: Plan) -> RuleScheme:
    """Sites outside of the inverse in float: they need no scale."""
    return replace(scheme, sites={s: scheme.sites.get(s, SiteScheme(None)) for s in rule_sites(plan)})


def invert_integer(plan: Plan, scheme: RuleScheme, scales: Mapping[str, Tensor], A: Tensor) -> Inverted:
    """A plan in integers on A [M, H, C, C]; NaN throughout where the arithmetic refuses to go on."""
    arithmetic = IntegerArithmetic(scheme, scales, FloatContainers())
    unwatched = torch.full((A.shape[1],), float("nan"), dtype=torch.float64)
    try:
        T = run_plan(plan, arithmetic.quantize(INPUT, A.float()), arithmetic)
    except NonFiniteError:
        return Inverted(torch.full_like(A, float("nan"), dtype=torch.float64), unwatched)
    real = None if T is None else T.real()
    return Inverted(_with_diagonal(A, real), unwatched, sum(arithmetic.saturated.values()))


def quantized(scheme: RuleScheme, scales: Mapping[str, Tensor], A: Tensor) -> Tensor:
    """A [M, H, C, C] as its codes stand for it, float64."""
    codes = IntegerArithmetic(scheme, scales, FloatContainers()).quantize(INPUT, A.float())
    return codes.real().double()

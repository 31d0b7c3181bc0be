"""Accumulators to codes: the one definition that every backend and fake quantization share.

Operations are written out one by one on purpose: addcmul, add(alpha=), lerp and fused multiply-add round once where
this definition rounds twice, and would change bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .errors import BindingError
from .formats import IntFormat
from .granularity import Granularity, dynamic_scale
from .quantize import round_half_even, saturate, straight_through

Mode = Literal["float", "fixed_point", "power_of_two"]
MODES: tuple[Mode, ...] = ("float", "fixed_point", "power_of_two")
Region = tuple[slice, slice]

NARROW_MULTIPLIER_BITS = 31  # of an accumulator that fits int32
WIDE_MULTIPLIER_BITS = 22
NARROW_LIMIT = 2**31
SUM_LIMIT = 2**62


@dataclass(frozen=True)
class Term:
    """One summand of a requantization: an exact accumulator (or codes) and the scales that make it real.

    acc: [..., R, C] whole numbers in any container (int64, float32, float64), or real float32 where nothing is
    quantized. scales: float32 factors, each broadcastable to acc and keeping at most one of the last two axes.
    sign: +1 or -1. bound: largest |acc|, 0 for real numbers. region: rows and columns of the output that acc covers,
    None for all of them; the rest of the output is zero for this term.
    """

    acc: Tensor
    scales: tuple[Tensor, ...] = ()
    sign: int = 1
    bound: int = 0
    region: Region | None = None

    def __getitem__(self, n: int) -> Term:
        """The term of chunk n, for [N, B, H, R, C] accumulators."""
        return replace(self, acc=self.acc[n], scales=tuple(s[n] if s.dim() > 3 else s for s in self.scales))


@dataclass(frozen=True)
class Result:
    """codes [..., R, C] (float32 whole numbers), their scale, and how many elements saturated (0-d int64)."""

    codes: Tensor
    scale: Tensor
    saturated: Tensor


def multipliers(scales: Sequence[Tensor], out_scale: Tensor | None, sign: int) -> list[Tensor]:
    """float32(float64(s_a) * s_b / s_out): one factor, or two (row, column) where rows and columns both vary."""
    factors = [(s.double(), False) for s in scales] + ([] if out_scale is None else [(out_scale.double(), True)])
    columns = [f for f in factors if f[0].shape[-1] > 1]
    rows = [f for f in factors if f[0].shape[-1] == 1]
    groups = [rows, columns] if columns and any(f[0].shape[-2] > 1 for f in rows) else [rows + columns]
    result = []
    for i, group in enumerate(groups):
        value: Tensor | None = None
        for factor, inverse in group:
            if value is None:
                value = factor.reciprocal() if inverse else factor
            else:
                value = value / factor if inverse else value * factor
        if value is not None:
            result.append(((value * sign) if i == 0 else value).to(torch.float32))
    return result


def _region_of(scale: Tensor | None, region: Region | None) -> Tensor | None:
    """The part of an output scale that belongs to a region."""
    if scale is None or region is None:
        return scale
    rows, columns = region
    scale = scale[..., rows, :] if scale.shape[-2] > 1 else scale
    return scale[..., columns] if scale.shape[-1] > 1 else scale


def scaled_sum(terms: Sequence[Term], out_scale: Tensor | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """r = f32(acc_0) * m_0, then r = r + f32(acc_t) * m_t in order, each operation rounded to float32.

    shape: of the output; needed only where terms cover regions of it. Returns float32 [..., R, C].
    """
    total: Tensor | None = None
    if any(t.region is not None for t in terms):
        assert shape is not None
        total = terms[0].acc.new_zeros(*shape, dtype=torch.float32)
    for term in terms:
        value = term.acc.to(torch.float32)
        factors = multipliers(term.scales, _region_of(out_scale, term.region), term.sign)
        if not factors and term.sign < 0:
            value = -value
        for factor in factors:
            value = value * factor
        if total is None:
            total = value
        elif term.region is None:
            total = total + value
        else:
            total[..., term.region[0], term.region[1]] += value
    assert total is not None, "a requantization needs at least one term"
    return total


def multiplier_bits(terms: Sequence[Term]) -> int:
    """Bits of the largest fixed-point multiplier: 31, or 22 where a term's accumulator is wider than int32."""
    wide = any(t.bound >= NARROW_LIMIT for t in terms)
    return WIDE_MULTIPLIER_BITS if wide else NARROW_MULTIPLIER_BITS


def check_fixed_point(step: str, bounds: Sequence[int]) -> None:
    """Prove sum |acc| M < 2^62. Raises BindingError that names the step and by how much it fails."""
    bits = WIDE_MULTIPLIER_BITS if max(bounds) >= NARROW_LIMIT else NARROW_MULTIPLIER_BITS
    total = sum(bounds) * 2**bits
    if total >= SUM_LIMIT:
        raise BindingError(
            f"step {step}: fixed-point requantization can reach {total / SUM_LIMIT:.3g} times 2^62; "
            "use fewer bits or requantize: float"
        )


def fixed_point(
    terms: Sequence[Term], out_scale: Tensor, shape: Sequence[int] | None = None, compact: bool = False
) -> Tensor:
    """Unclamped codes, int64: one shift n for all terms, M_t = round(m_t 2^n), one rounding half away from zero.

    n is the same over a matrix: the largest M of the step has 31 bits (22 with a wide accumulator).

    The multiplier m_t = float32(float64(s_a) * s_b / s_out) is one number even where rows and columns both vary.
    """
    bits = multiplier_bits(terms)
    out = tuple(shape) if shape is not None else terms[0].acc.shape
    mult = []
    largest = torch.zeros((), dtype=torch.float32, device=out_scale.device)
    for term in terms:
        m = torch.ones((), dtype=torch.float64, device=out_scale.device)
        for scale in term.scales:
            m = m * scale.double()
        out_part = _region_of(out_scale, term.region)
        assert out_part is not None
        m32 = (m / out_part.double() * term.sign).to(torch.float32)
        mult.append(m32)
        # One shift for a whole matrix, so that a backend that skips zero blocks finds the same one.
        matrix = (-1, -2, -3) if compact else (-1, -2)
        largest = torch.maximum(largest, m32.abs().amax(matrix, keepdim=True))
    shift = (bits - torch.frexp(largest).exponent).clamp(1, 62).long()
    unit = torch.ldexp(torch.ones_like(shift, dtype=torch.float64), shift)  # 2^n
    total = torch.zeros(out, dtype=torch.int64, device=out_scale.device)
    for term, m32 in zip(terms, mult, strict=True):
        # The clamp only meets multipliers of 2^(bits - 1) and more (calibration saw zeros only): they saturate.
        fixed = torch.round(m32.double() * unit).clamp(-(2.0**bits), 2.0**bits).long()
        product = term.acc.detach().long() * fixed
        if term.region is None:
            total = total + product
        else:
            total[..., term.region[0], term.region[1]] += product
    half = torch.ones_like(shift) << (shift - 1)
    return total.sign() * ((total.abs() + half) >> shift)


def requantize(
    terms: Sequence[Term],
    fmt: IntFormat,
    out_scale: Tensor | Granularity,
    *,
    mode: Mode = "float",
    shape: Sequence[int] | None = None,
    mask: Tensor | None = None,
    compact: bool = False,
) -> Result:
    """Sum the terms, mask, and round to codes of `fmt`.

    terms: the product first. out_scale: a static float32 scale, or a Granularity for a dynamic one (mode float only).
    mask: {0, 1} float32, broadcastable to the output. The gradient is straight-through.
    Raises BindingError for a dynamic output scale in another mode than float.
    """
    if isinstance(out_scale, Granularity):
        if mode != "float":
            raise BindingError(f"requantize: {mode} needs static scales; a dynamic scale needs requantize: float")
        real = scaled_sum(terms, None, shape)
        real = real if mask is None else real * mask
        scale = dynamic_scale(real, fmt.qmax, out_scale, compact)
        codes, saturated = saturate(round_half_even(real / scale), fmt)
        return Result(codes, scale, saturated)
    if mode == "float":
        real = scaled_sum(terms, out_scale, shape)
        rounded = round_half_even(real if mask is None else real * mask)
    else:
        exact = fixed_point(terms, out_scale, shape, compact)
        with_grad = any(t.acc.requires_grad for t in terms)
        exact_f = exact.clamp(-(2**24), 2**24).to(torch.float32)
        rounded = straight_through(scaled_sum(terms, out_scale, shape), exact_f) if with_grad else exact_f
        rounded = rounded if mask is None else rounded * mask
    codes, saturated = saturate(rounded, fmt)
    return Result(codes, out_scale, saturated)

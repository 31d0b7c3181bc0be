"""Accumulators to codes: the one definition that every backend and fake quantization share.

Operations are written out one by one on purpose: addcmul, add(alpha=), lerp and fused multiply-add round once where
this definition rounds twice, and would change bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

MULTIPLIER_BITS = 31
NARROW_LIMIT = 2**31  # an accumulator below it fits int32
SUM_LIMIT_BITS = 62


@dataclass(frozen=True)
class Term:
    """One summand of a requantization: an exact accumulator (or codes) and the scales that make it real.

    acc: [..., R, C] whole numbers in any container (int64, float32, float64), or real float32 where nothing is
    quantized. scales: float32 factors, each broadcastable to the output and keeping at most one of the last two axes.
    sign: +1 or -1. bound: largest |acc| (times coefficient), 0 for real numbers. region: rows and columns of the output
    that acc covers, None for all of them; the rest of the output is zero for this term. coefficient: coefficient codes
    that multiply acc into a wide accumulator; they may have a multiple of acc's heads.
    """

    acc: Tensor
    scales: tuple[Tensor, ...] = ()
    sign: int = 1
    bound: int = 0
    region: Region | None = None
    coefficient: Tensor | None = None

    def __getitem__(self, n: int) -> Term:
        """The term of chunk n, for [N, B, H, R, C] accumulators."""
        coefficient = None if self.coefficient is None else self.coefficient[n]
        scales = tuple(s[n] if s.dim() > 3 else s for s in self.scales)
        return replace(self, acc=self.acc[n], scales=scales, coefficient=coefficient)

    def float32(self) -> tuple[Tensor, bool]:
        """f32(acc): the accumulator as one whole number, converted once. Also says whether the tensor is a new one.

        A float32 container and coefficient codes are both exact in float32, so their float32 product is the wide
        accumulator rounded once: no wider container is needed.
        """
        if self.coefficient is None:
            value = self.acc.to(torch.float32)
            return value, value is not self.acc
        container = self.acc.dtype
        wide = per_head(torch.mul, self.acc, self.coefficient.to(container))
        return wide.to(torch.float32), True

    def int64(self) -> Tensor:
        """The accumulator, times its coefficient codes."""
        acc = self.acc.detach().long()
        return acc if self.coefficient is None else per_head(torch.mul, acc, self.coefficient.long())


def per_head(operation: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """operation(x, y) where y may have a multiple of x's heads: consecutive heads of y share one of x."""
    if x.dim() < 3 or y.dim() < 3 or x.shape[-3] in (1, y.shape[-3]) or y.shape[-3] == 1:
        return operation(x, y)
    grouped = y.unflatten(-3, (x.shape[-3], -1))
    return operation(x.unsqueeze(-3), grouped).flatten(-4, -3)


@dataclass(frozen=True)
class Target:
    """What terms are requantized to.

    scale: a static float32 scale, or a Granularity for a dynamic one (mode float only). shape: of the output, needed
    where terms cover regions of it. mask: {0, 1} float32, broadcastable to the output. compact: the output is a
    register of the inverse, [..., H, n, b, b].
    """

    format: IntFormat
    scale: Tensor | Granularity
    mode: Mode = "float"
    shape: tuple[int, ...] | None = None
    mask: Tensor | None = None
    compact: bool = False


@dataclass(frozen=True)
class Result:
    """codes [..., R, C] (whole numbers), their scale, and how many elements saturated."""

    codes: Tensor
    scale: Tensor
    saturated: int | Tensor


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

    shape: of the output; needed only where terms cover regions of it. Returns float32 [..., R, C], never a tensor of
    the caller's.
    """
    assert terms, "a requantization needs at least one term"
    regional = any(t.region is not None for t in terms)
    assert shape is not None or not regional
    total = terms[0].acc.new_zeros(*(shape or ()), dtype=torch.float32) if regional else None
    for term in terms:
        value = _scaled(term, out_scale)
        if total is None:
            total = value
        elif term.region is None:
            total = total.add_(value)
        else:
            total[..., term.region[0], term.region[1]] += value
    assert total is not None
    return total


def _scaled(term: Term, out_scale: Tensor | None) -> Tensor:
    """f32(acc) * m as a new tensor."""
    value, new = term.float32()
    factors = multipliers(term.scales, _region_of(out_scale, term.region), term.sign)
    if not factors and term.sign < 0:
        factors = [torch.full((), -1.0, device=value.device)]
    for factor in factors:
        fits = new and value.dim() >= factor.dim() and value.shape == torch.broadcast_shapes(value.shape, factor.shape)
        value = value.mul_(factor) if fits else per_head(torch.mul, value, factor)
        new = True
    return value if new else value.clone()


def fixed_point_bits(bounds: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(pre-shift of each term, bits of the largest multiplier), so that sum |acc| M < 2^62 whatever the bounds.

    An accumulator that does not fit int32 is shifted right first, rounding half away from zero, until it does. Then
    the multiplier has 31 bits, or as many fewer as several terms need.
    """
    shifts = tuple(max(0, bound.bit_length() - 31) for bound in bounds)
    # the rounded shift can carry once beyond the bound
    total = sum((bound >> p) + (p > 0) for bound, p in zip(bounds, shifts, strict=True))
    return shifts, min(MULTIPLIER_BITS, SUM_LIMIT_BITS - total.bit_length())


def shift_half_away(x: Tensor, shift: Tensor | int) -> Tensor:
    """int64 x / 2^shift, rounded half away from zero; shift >= 1."""
    half = torch.ones_like(x) << (shift - 1)
    return x.sign() * ((x.abs() + half) >> shift)


def fixed_point_multipliers(terms: Sequence[Term], target: Target) -> tuple[list[Tensor], Tensor]:
    """(M_t of each term as int64, the one shift n of a matrix as int64): M_t = round(m_t 2^n).

    m_t = float32(float64(s_a) * s_b / s_out) 2^p with p the term's pre-shift; it is one number even where rows and
    columns both vary. n is the same over a matrix: the largest M of the step has all the bits.
    """
    assert isinstance(target.scale, Tensor)
    shifts, bits = fixed_point_bits([t.bound for t in terms])
    real = []
    largest = torch.zeros((), dtype=torch.float64, device=target.scale.device)
    for term, p in zip(terms, shifts, strict=True):
        m = torch.ones((), dtype=torch.float64, device=target.scale.device)
        for scale in term.scales:
            m = per_head(torch.mul, m, scale.double()) if m.dim() else m * scale.double()
        out_part = _region_of(target.scale, term.region)
        assert out_part is not None
        m = per_head(torch.div, m, out_part.double()) if m.dim() else m / out_part.double()
        real.append((m * term.sign).to(torch.float32).double() * 2.0**p)
        # One shift for a whole matrix, so that a backend that skips zero blocks finds the same one.
        matrix = (-1, -2, -3) if target.compact else (-1, -2)
        largest = torch.maximum(largest, real[-1].abs().amax(matrix, keepdim=True))
    shift = (bits - torch.frexp(largest).exponent).clamp(1, 62).long()
    unit = torch.ldexp(torch.ones_like(shift, dtype=torch.float64), shift)  # 2^n
    # The clamp only meets multipliers of 2^(bits - 1) and more (calibration saw zeros only): they saturate.
    return [torch.round(m * unit).clamp(-(2.0**bits), 2.0**bits).long() for m in real], shift


def fixed_point(terms: Sequence[Term], target: Target) -> Tensor:
    """Unclamped codes, int64: sum of acc_t M_t in int64, one rounding half away from zero (after the pre-shifts)."""
    fixed, shift = fixed_point_multipliers(terms, target)
    pre, _ = fixed_point_bits([t.bound for t in terms])
    total: Tensor | None = None
    if target.shape is not None:
        total = torch.zeros(target.shape, dtype=torch.int64, device=shift.device)
    for term, m, p in zip(terms, fixed, pre, strict=True):
        acc = term.int64()
        product = per_head(torch.mul, shift_half_away(acc, p) if p else acc, m)
        if total is None:
            total = product
        elif term.region is None:
            total = total + product
        else:
            total[..., term.region[0], term.region[1]] += product
    assert total is not None
    return shift_half_away(total, shift)


def requantize(terms: Sequence[Term], target: Target) -> Result:
    """Sum the terms, mask, and round to codes of the target's format. The gradient is straight-through.

    terms: the product first. Raises BindingError for a dynamic output scale in another mode than float.
    """
    mask, out_scale = target.mask, target.scale
    if isinstance(out_scale, Granularity):
        if target.mode != "float":
            raise BindingError(
                f"requantize: {target.mode} needs static scales; a dynamic scale needs requantize: float"
            )
        real = scaled_sum(terms, None, target.shape)
        real = real if mask is None else real.mul_(mask)
        scale = dynamic_scale(real, target.format.qmax, out_scale, target.compact)
        # |x| <= amax, so x / (amax / qmax) rounds to qmax at most: nothing can saturate
        return Result(round_half_even(real.div_(scale), new=True), scale, 0)
    if target.mode == "float":
        real = scaled_sum(terms, out_scale, target.shape)
        rounded = round_half_even(real if mask is None else real.mul_(mask), new=True)
    else:
        exact = fixed_point(terms, target)
        with_grad = any(t.acc.requires_grad for t in terms)
        exact_f = exact.clamp(-(2**24), 2**24).to(torch.float32)
        rounded = straight_through(scaled_sum(terms, out_scale, target.shape), exact_f) if with_grad else exact_f
        rounded = rounded if mask is None else rounded * mask
    codes, saturated = saturate(rounded, target.format)
    return Result(codes, out_scale, saturated)

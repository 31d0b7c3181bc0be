"""Accumulators to codes: the one definition that every backend and fake quantization share.

Operations are written out one by one on purpose: addcmul, add(alpha=), lerp and fused multiply-add round once where
this definition rounds twice, and would change bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import BindingError
from .formats import IntFormat
from .granularity import Granularity, dynamic_scale
from .quantize import round_half_even, saturate, straight_through
from .terms import (
    Piece,
    Term,
    are_disjoint,
    assemble,
    part_of_scale,
    per_head,
    place,
    scaled_pieces,
    scaled_sum,
)

Mode = Literal["float", "fixed_point", "power_of_two"]
MODES: tuple[Mode, ...] = ("float", "fixed_point", "power_of_two")
MULTIPLIER_BITS = 31
NARROW_LIMIT = 2**31  # an accumulator below it fits int32
SUM_LIMIT_BITS = 62


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
        out_part = part_of_scale(target.scale, term)
        assert out_part is not None
        m = per_head(torch.div, m, out_part.double()) if m.dim() else m / out_part.double()
        real.append((m * term.sign).to(torch.float32).double() * 2.0**p)
        # One shift for a whole matrix, so that a backend that skips zero blocks finds the same one.
        matrix = (-1, -2, -3) if target.compact else (-1, -2)
        top = real[-1].abs()
        top = top.amax(-3) if term.blocks is not None else top
        largest = torch.maximum(largest, top.amax(matrix, keepdim=True))
    shift = (bits - torch.frexp(largest).exponent).clamp(1, 62).long()
    unit = ((shift + 1023) << 52).view(torch.float64)  # 2^n by its bits: pow need not be exact everywhere
    # The clamp only meets multipliers of 2^(bits - 1) and more (calibration saw zeros only): they saturate.
    units = [unit if t.blocks is None else unit.unsqueeze(-3) for t in terms]
    fixed = [torch.round(m * u).clamp(-(2.0**bits), 2.0**bits).long() for m, u in zip(real, units, strict=True)]
    return fixed, shift


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
        else:
            place(total, term).add_(product)
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
        pieces = scaled_pieces(terms, out_scale)
        if mask is None and are_disjoint(pieces):
            return _rounded_pieces(pieces, target, out_scale)
        real = assemble(pieces, target.shape, disjoint=False)
        rounded = round_half_even(real if mask is None else real.mul_(mask), new=True)
    else:
        exact = fixed_point(terms, target)
        with_grad = any(t.acc.requires_grad for t in terms)
        exact_f = exact.clamp(-(2**24), 2**24).to(torch.float32)
        rounded = straight_through(scaled_sum(terms, out_scale, target.shape), exact_f) if with_grad else exact_f
        rounded = rounded if mask is None else rounded * mask
    codes, saturated = saturate(rounded, target.format)
    return Result(codes, out_scale, saturated)


def _rounded_pieces(pieces: list[Piece], target: Target, scale: Tensor) -> Result:
    """Round each piece before they are put together: what lies outside of them is zero anyway."""
    count: int | Tensor = 0
    for piece in pieces:
        piece.value, saturated = saturate(round_half_even(piece.value, new=True), target.format)
        count = count + saturated
    return Result(assemble(pieces, target.shape, disjoint=True), scale, count)

"""What generated kernels call. Each function is one operation of `core`, with the same roundings in the same order.

They are compiled with fp fusion off: a fused multiply-add would round once where the definition rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):  # type: ignore[no-untyped-def]
    """Whole numbers, ties to even, for |x| <= 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_positive(x):  # type: ignore[no-untyped-def]
    """As round_half_even for 0 <= x <= 2^23."""
    return (x + 8388608.0) - 8388608.0


@triton.jit
def saturate(x, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """(codes clamped to [-QMAX, QMAX], how many were outside) of whole numbers."""
    outside = tl.sum(((x > QMAX) | (x < -QMAX)).to(tl.int32))
    return tl.minimum(tl.maximum(x, -QMAX), QMAX), outside


@triton.jit
def to_codes(r, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """(codes, saturated) of real numbers in units of the scale. The first clamp keeps rounding exact."""
    return saturate(round_half_even(tl.minimum(tl.maximum(r, -2097152.0), 2097152.0)), QMAX)


@triton.jit
def not_finite(r):  # type: ignore[no-untyped-def]
    """1 where anything is NaN or Inf, else 0."""
    return tl.max(1 - (tl.abs(r) <= 3.4028234663852886e38).to(tl.int32))


@triton.jit
def dynamic_scale(r, AXIS: tl.constexpr, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """max(amax, 2^-100) / QMAX, of the tile (AXIS None) or along an axis, kept as an axis of 1."""
    amax = tl.max(tl.abs(r)) if AXIS is None else tl.max(tl.abs(r), axis=AXIS, keep_dims=True)
    return tl.div_rn(tl.maximum(amax, 7.888609052210118e-31), QMAX * 1.0)


@triton.jit
def shift_half_away(x, shift):  # type: ignore[no-untyped-def]
    """int64 x / 2^shift, rounded half away from zero; shift >= 1."""
    one = tl.full((1, 1), 1, tl.int64)
    rounded = (tl.abs(x) + (one << (shift - 1))) >> shift
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def coefficient_codes(x, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """round_half_even(x SCALE) for |x| <= 2 and SCALE = 2^f <= 2^22, as float32."""
    size = round_positive(tl.abs(x) * SCALE)
    return tl.where(x < 0, -size, size)


@triton.jit
def high_byte(x):  # type: ignore[no-untyped-def]
    return ((x.to(tl.int32) + 128) >> 8).to(tl.int8)


@triton.jit
def low_byte(x):  # type: ignore[no-untyped-def]
    """What is left of x after 256 high_byte(x), in [-128, 127]."""
    return (((x.to(tl.int32) + 128) & 255) - 128).to(tl.int8)


@triton.jit
def dot_right(left, right, RIGHT_WIDE: tl.constexpr, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 tile times an int8 or a split int16 tile."""
    wide = tl.int64 if LONG else tl.int32
    if RIGHT_WIDE:
        high = tl.dot(left, high_byte(right), out_dtype=tl.int32).to(wide)
        total = (high << 8) + tl.dot(left, low_byte(right), out_dtype=tl.int32).to(wide)
    else:
        total = tl.dot(left, right, out_dtype=tl.int32).to(wide)
    return total


@triton.jit
def dot_codes(left, right, LEFT_WIDE: tl.constexpr, RIGHT_WIDE: tl.constexpr, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Exact product of codes: int8 tiles, or int16 tiles (WIDE) split into signed bytes. int32, or int64 if LONG."""
    if LEFT_WIDE:
        high = dot_right(high_byte(left), right, RIGHT_WIDE, LONG)
        total = (high << 8) + dot_right(low_byte(left), right, RIGHT_WIDE, LONG)
    else:
        total = dot_right(left, right, RIGHT_WIDE, LONG)
    return total


@triton.jit
def dot_real(left, right, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Product of floating-point tiles with float32 accumulators. WIDEN: the interpreter cannot multiply bfloat16."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, out_dtype=tl.float32, input_precision="ieee")

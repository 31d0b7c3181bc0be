"""Exact accumulation of codes: bounds, proven before a product runs, and the int64 definition."""

from __future__ import annotations

from torch import Tensor

from .errors import BindingError
from .formats import IntFormat

INT32_LIMIT = 2**31 - 1  # |accumulator| of an int32 accumulator stays below 2^31
FLOAT32_EXACT = 2**24  # whole numbers up to here are exact in float32
FLOAT64_EXACT = 2**53
COEFFICIENT_BITS = 15
COEFFICIENT_MAX = 2  # beta <= 2 (negative eigenvalues), decay <= 1


def product_bound(contracted: int, left: IntFormat, right: IntFormat) -> int:
    """Largest |accumulator| of a product that contracts `contracted` codes: K * qmax_a * qmax_b."""
    return contracted * left.qmax * right.qmax


def coefficient_bits(bound: int, bits: int) -> int:
    """Fractional bits of the coefficient codes that multiply an accumulator of this bound.

    15 up to INT8. A wider format resolves more: as many bits (up to 22, exact in float32 for values up to 2) as leave
    the wide accumulator within 2^53.
    """
    if bits <= 8:
        return COEFFICIENT_BITS
    room = (FLOAT64_EXACT // (COEFFICIENT_MAX * max(bound, 1))).bit_length() - 1
    return max(COEFFICIENT_BITS, min(22, room))


def check_bound(step: str, bound: int, accumulator_bits: int) -> None:
    """Refuse an accumulator that could overflow, before any number does.

    accumulator_bits: 32 (int32) or 64 (int64; every fast path holds it exactly up to 2^53).
    Raises BindingError that names the step and by how much it is too large.
    """
    limit = INT32_LIMIT if accumulator_bits == 32 else FLOAT64_EXACT
    if bound > limit:
        raise BindingError(
            f"step {step}: the accumulator can reach {bound:.3g}, {bound / limit:.3g} times the limit of "
            f"{accumulator_bits}-bit accumulation; use fewer bits, a smaller chunk size or head dimension"
        )


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """int64 [..., M, K] @ [..., K, N] -> int64 [..., M, N]: the definition every backend is compared with."""
    return left.long() @ right.long()

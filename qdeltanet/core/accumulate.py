"""Exact accumulation of codes: bounds, proven before a product runs, and the int64 definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import BindingError
from .formats import IntFormat

INT32_LIMIT = 2**31 - 1  # |accumulator| of an int32 accumulator stays below 2^31
FLOAT32_EXACT = 2**24  # whole numbers up to here are exact in float32
FLOAT64_EXACT = 2**53
BF16_EXACT = 2**8  # 8 significant bits
BYTE_MAX = 127
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


def split_bytes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) with codes = 256 high + low, both in [-128, 127]; any |code| <= 32639 = qmax of INT16.

    >>> split_bytes(torch.tensor([32639, -32639, 200]))
    (tensor([ 127, -127,    1]), tensor([ 127, -127,  -56]))
    """
    high = torch.floor_divide(codes + 128, 256)
    return high, codes - 256 * high


def byte_matmul(
    multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, left_max: int, right_max: int
) -> Tensor:
    """Exact int64 product of codes up to 16 bits out of products of signed bytes.

    multiply: [..., M, K] @ [..., K, N] of codes within [-128, 127] with int32 accumulators (as any integer tensor).
    A side of more than 8 bits is split: INT16 x INT8 is two products, INT16 x INT16 four.
    """
    lefts = split_bytes(left) if left_max > BYTE_MAX else (left,)
    rights = split_bytes(right) if right_max > BYTE_MAX else (right,)
    total: Tensor | None = None
    for i, x in enumerate(reversed(lefts)):
        for j, y in enumerate(reversed(rights)):
            part = multiply(x, y).long() << (8 * (i + j))
            total = part if total is None else total + part
    assert total is not None
    return total


def part_bound(contracted: int, left: IntFormat, right: IntFormat) -> int:
    """Largest |accumulator| of one product of bytes where formats of more than 8 bits are split."""
    sides = [128 if fmt.qmax > BYTE_MAX else fmt.qmax for fmt in (left, right)]
    return contracted * sides[0] * sides[1]


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


def check_product(step: str, contracted: int, left: IntFormat, right: IntFormat, accumulator_bits: int) -> None:
    """Prove that a product of codes cannot overflow. With 32-bit accumulators wide formats are split into bytes, each
    product of bytes has an accumulator of its own, and only their shifted sum is wider.

    Raises BindingError that names the step and by how much it is too large.
    """
    if accumulator_bits == 32:
        check_bound(step, part_bound(contracted, left, right), 32)
    check_bound(step, product_bound(contracted, left, right), 64)


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """int64 [..., M, K] @ [..., K, N] -> int64 [..., M, N]: the definition every backend is compared with."""
    return left.long() @ right.long()

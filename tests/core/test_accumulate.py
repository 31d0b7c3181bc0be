from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeltanet.core import (
    COEFFICIENT_BITS,
    COEFFICIENT_MAX,
    FLOAT64_EXACT,
    BindingError,
    IntFormat,
    check_bound,
    coefficient_bits,
    exact_matmul,
    product_bound,
)


@given(k=st.integers(1, 256), left=st.integers(2, 16), right=st.integers(2, 16))
def test_bound_is_reached_by_the_largest_codes_and_not_passed(k: int, left: int, right: int) -> None:
    a, b = IntFormat(left), IntFormat(right)
    row = torch.full((1, k), a.qmax)
    assert int(exact_matmul(row, torch.full((k, 1), b.qmax))) == product_bound(k, a, b)
    assert int(exact_matmul(row, torch.full((k, 1), b.qmin))) == -product_bound(k, a, b)


def test_exact_matmul_is_python_arithmetic() -> None:
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-32639, 32640, s, generator=make) for s in ((3, 5, 64), (3, 64, 4)))
    got = exact_matmul(a.float(), b.double())
    assert got.dtype is torch.int64
    for n in range(3):
        rows, columns = a[n].tolist(), b[n].T.tolist()
        assert got[n].tolist() == [[sum(x * y for x, y in zip(r, c, strict=True)) for c in columns] for r in rows]


@given(k=st.integers(1, 2048), bits=st.integers(2, 16))
def test_coefficient_bits_leave_the_wide_accumulator_exact(k: int, bits: int) -> None:
    bound = product_bound(k, IntFormat(bits), IntFormat(bits))
    fraction = coefficient_bits(bound, bits)
    assert COEFFICIENT_BITS <= fraction <= 22
    if bits <= 8:
        assert fraction == COEFFICIENT_BITS
    elif fraction > COEFFICIENT_BITS:
        assert bound * COEFFICIENT_MAX * 2**fraction <= FLOAT64_EXACT
    if bits > 8 and fraction < 22:
        assert bound * COEFFICIENT_MAX * 2 ** (fraction + 1) > FLOAT64_EXACT


@pytest.mark.parametrize(("bits", "limit"), [(32, 2**31 - 1), (64, 2**53)])
def test_overflow_is_refused_by_name_before_it_happens(bits: int, limit: int) -> None:
    check_bound("w", limit, bits)
    with pytest.raises(BindingError, match=rf"step w: .*1 times the limit of {bits}-bit accumulation; use fewer bits"):
        check_bound("w", limit + 1, bits)
    with pytest.raises(BindingError, match="4 times the limit"):
        check_bound("w", 4 * limit, bits)

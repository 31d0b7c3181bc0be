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
    byte_matmul,
    check_bound,
    coefficient_bits,
    exact_matmul,
    part_bound,
    product_bound,
    split_bytes,
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


@given(codes=st.lists(st.integers(-32639, 32639), min_size=1, max_size=30))
def test_codes_split_into_signed_bytes(codes: list[int]) -> None:
    x = torch.tensor([*codes, 32639, -32639, 127, 128, -128, -129])
    for container in (torch.int64, torch.int32, torch.float64, torch.float32):
        high, low = split_bytes(x.to(container))
        assert torch.equal(high.long() * 256 + low.long(), x)
        for part in (high, low):
            assert int(part.min()) >= -128
            assert int(part.max()) <= 127


@pytest.mark.parametrize(("left", "right", "products"), [(8, 8, 1), (16, 8, 2), (9, 16, 4), (4, 12, 2)])
def test_products_of_bytes_add_up_to_wide_products(left: int, right: int, products: int) -> None:
    a_fmt, b_fmt = IntFormat(left), IntFormat(right)
    make = torch.Generator().manual_seed(0)
    a = torch.randint(a_fmt.qmin, a_fmt.qmax + 1, (2, 5, 64), generator=make)
    b = torch.randint(b_fmt.qmin, b_fmt.qmax + 1, (2, 64, 3), generator=make)
    a[0, 0], b[0, :, 0] = a_fmt.qmax, b_fmt.qmin
    calls = []

    def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        acc = exact_matmul(x, y)
        assert int(acc.abs().max()) <= part_bound(64, a_fmt, b_fmt) < 2**31
        calls.append(1)
        return acc.to(torch.int32)

    assert torch.equal(byte_matmul(multiply, a, b, a_fmt.qmax, b_fmt.qmax), a @ b)
    assert len(calls) == products

"""Single products: every backend against Python's integers, where bounds are reached exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeltanet.backends import get_backend
from qdeltanet.core import (
    COEFFICIENT_MAX,
    FLOAT32_EXACT,
    FLOAT64_EXACT,
    IntFormat,
    Term,
    coefficient_bits,
    exact_matmul,
    product_bound,
)

FAST = ("cpu", "fake")
PATTERNS = ("random", "max", "alternating", "minus", "one_hot", "zero", "odd")


def codes(pattern: str, shape: tuple[int, ...], fmt: IntFormat, make: torch.Generator) -> Tensor:
    """float32 codes [..., R, C] that are easy or hard on an accumulator."""
    q = fmt.qmax
    if pattern == "random":
        return torch.randint(-q, q + 1, shape, generator=make).float()
    if pattern == "alternating":
        return torch.where(torch.arange(shape[-1]) % 2 == 0, float(q), float(-q)).expand(shape).clone()
    if pattern == "one_hot":
        hot = torch.zeros(shape)
        hot[..., 0, -1] = q
        hot[..., -1, 0] = -q
        return hot
    if pattern == "odd":  # the low bits that a shorter mantissa would lose
        return (q - 2 * torch.randint(0, 2, shape, generator=make)).float()
    return torch.full(shape, {"max": q, "minus": -q, "zero": 0}[pattern]).float()


@pytest.mark.parametrize("backend", FAST)
@given(
    left=st.integers(2, 16),
    right=st.integers(2, 16),
    k=st.sampled_from([1, 3, 16, 64, 128, 257]),
    patterns=st.tuples(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS)),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_are_exact(
    backend: str, left: int, right: int, k: int, patterns: tuple[str, str], transposed: bool, seed: int
) -> None:
    a_fmt, b_fmt = IntFormat(left), IntFormat(right)
    make = torch.Generator().manual_seed(seed)
    a = codes(patterns[0], (2, 3, 5, k), a_fmt, make)
    b = codes(patterns[1], (2, 3, 7, k), b_fmt, make).mT
    b = b if transposed else b.contiguous()
    bound = product_bound(k, a_fmt, b_fmt)
    got = get_backend(backend).matmul(a, b, a_fmt.qmax, b_fmt.qmax)
    assert torch.equal(got.long(), exact_matmul(a, b))
    assert int(got.abs().max()) <= bound


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("bits", "k"), [(8, 1040), (8, 1041), (9, 258), (9, 259), (12, 4), (12, 5), (16, 64), (16, 4096)]
)
@pytest.mark.parametrize("pattern", ["max", "alternating", "odd"])
def test_products_are_exact_at_the_edge_of_float32(backend: str, bits: int, k: int, pattern: str) -> None:
    fmt = IntFormat(bits)
    make = torch.Generator().manual_seed(k)
    a, b = codes(pattern, (2, 3, k), fmt, make), codes(pattern, (2, 4, k), fmt, make).mT
    bound = product_bound(k, fmt, fmt)
    got = get_backend(backend).matmul(a, b, fmt.qmax, fmt.qmax)
    assert torch.equal(got.long(), exact_matmul(a, b))
    # a float32 container is taken exactly while it is proven to hold the bound, for codes that bfloat16 would hold
    assert got.dtype is (torch.float32 if bound <= FLOAT32_EXACT and fmt.qmax <= 256 else torch.float64)


@given(bits=st.integers(2, 16), k=st.sampled_from([16, 64, 128]), seed=st.integers(0, 2**31))
def test_coefficients_are_exact_in_every_container(bits: int, k: int, seed: int) -> None:
    fmt = IntFormat(bits)
    bound = product_bound(k, fmt, fmt)
    fraction = coefficient_bits(bound, bits)
    wide = bound * COEFFICIENT_MAX * 2**fraction
    assert wide <= FLOAT64_EXACT
    make = torch.Generator().manual_seed(seed)
    acc = torch.randint(-bound, bound + 1, (2, 6, 6), generator=make)
    acc[0, 0, 0], acc[0, 0, 1] = bound, -bound
    coefficient = torch.randint(0, COEFFICIENT_MAX * 2**fraction + 1, (2, 6, 6), generator=make)
    coefficient[0, 0, :2] = COEFFICIENT_MAX * 2**fraction
    containers = [torch.int64, torch.float64] + ([torch.float32] if bound <= FLOAT32_EXACT else [])
    for container in containers:
        term = Term(acc.to(container), bound=wide, coefficient=coefficient.float())
        assert torch.equal(term.int64(), acc * coefficient)
        assert torch.equal(term.float32()[0], (acc * coefficient).float())


def test_large_products_take_the_threaded_kernel_and_stay_exact() -> None:
    fmt = IntFormat(8)
    make = torch.Generator().manual_seed(0)
    a, b = codes("odd", (64, 64, 64), fmt, make), codes("random", (64, 64, 64), fmt, make)
    expected = exact_matmul(a, b)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for right in (b, b.mT.contiguous().mT):
            assert torch.equal(get_backend("cpu").matmul(a, right, 127, 127).long(), expected)

"""Every method's result, against LAPACK and against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import KEY_FAMILIES, random_A
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeltanet.core import relative_error
from qdeltanet.inverse import CHUNK_SIZES, Plan, invert, plan, run_plan

RADICES = {
    16: ([2, 2, 2, 2], [4, 4], [2, 8], [8, 2], [16]),
    32: ([2, 2, 2, 2, 2], [4, 8], [8, 4], [32]),
    64: ([2, 2, 2, 2, 2, 2], [4, 4, 4], [2, 2, 4, 4], [8, 4, 2], [8, 8], [16, 4], [16, 2, 2], [64]),
    128: ([2, 2, 2, 2, 2, 2, 2], [2, 4, 4, 4], [16, 8], [16, 2, 2, 2], [128]),
}
EXACT = [plan("block_merge", c, radices=r) for c, options in RADICES.items() for r in options]
EXACT += [plan("forward_substitution", c) for c in CHUNK_SIZES]


def name(p: Plan) -> str:
    return "-".join([p.method, str(p.chunk_size), *map(str, p.options.values())])


def exact(A: Tensor) -> Tensor:
    return torch.linalg.inv(torch.eye(A.shape[-1], dtype=A.dtype) - A)


@pytest.mark.parametrize("p", EXACT, ids=name)
def test_exact_methods_equal_lapack(p: Plan) -> None:
    A = random_A(p.chunk_size, heads=1 if p.method == "forward_substitution" else 3)
    T = invert(A, p)
    assert float(relative_error(exact(A), T).max()) < 1e-12
    assert torch.equal(T, T.tril())
    assert torch.equal(T.diagonal(dim1=-2, dim2=-1), torch.ones(A.shape[:-1], dtype=A.dtype))


@pytest.mark.parametrize("family", KEY_FAMILIES)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_the_default_is_exact_for_every_family_of_keys(family: str, chunk_size: int) -> None:
    A = random_A(chunk_size, family=family, seed=chunk_size)
    assert float(relative_error(exact(A), invert(A, plan("block_merge", chunk_size))).max()) < 1e-12


def direct_neumann(A: Tensor, order: int, band: int, terms: int) -> Tensor:
    """The published formulas on full matrices, powers one after the other."""
    size = A.shape[-1]
    eye = torch.eye(size, dtype=A.dtype)
    i, j = torch.arange(size)[:, None], torch.arange(size)[None, :]
    T0 = torch.zeros_like(A)
    power = eye.expand_as(A)
    for _ in range(order):
        T0, power = T0 + power, power @ A
    T0 = T0 * ((i - j <= band) & (i >= j))
    E = eye - (eye - A) @ T0
    total, power = torch.zeros_like(A), eye.expand_as(A)
    for _ in range(terms):
        total, power = total + power, power @ E
    return T0 @ total


@given(
    order=st.integers(2, 6), band=st.integers(1, 8), terms=st.integers(1, 17), chunk_size=st.sampled_from([16, 32, 64])
)
def test_neumann_is_the_published_formula(order: int, band: int, terms: int, chunk_size: int) -> None:
    A = random_A(chunk_size, family="correlated", seed=order + 10 * band)
    p = plan("neumann", chunk_size, order=order, band=band, residual_steps=terms)
    expected = direct_neumann(A, order, band, terms)
    scale = 1 + float(expected.abs().max())  # entries grow; rounding grows with them
    assert float((invert(A, p) - expected).abs().max()) < 1e-9 * scale


@pytest.mark.parametrize("terms", [1, 3, 8])
def test_neumann_at_128_is_two_blocks_of_64_joined(terms: int) -> None:
    A = random_A(128)
    first, second = (direct_neumann(A[:, s, s], 3, 3, terms) for s in (slice(0, 64), slice(64, 128)))
    T = torch.zeros_like(A)
    T[:, :64, :64], T[:, 64:, 64:] = first, second
    T[:, 64:, :64] = second @ A[:, 64:, :64] @ first
    assert torch.allclose(invert(A, plan("neumann", 128, residual_steps=terms)), T, atol=1e-12)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize(("order", "band"), [(3, 3), (2, 1), (4, 3), (3, 2)])
def test_neumann_is_exact_once_its_residual_is_nilpotent(chunk_size: int, order: int, band: int) -> None:
    A = random_A(chunk_size, width=64)
    first = min(order, band + 1)  # sub-diagonal where the residual begins
    enough = math.ceil(min(chunk_size, 64) / first)
    p = plan("neumann", chunk_size, order=order, band=band, residual_steps=enough)
    assert float(relative_error(exact(A), invert(A, p)).max()) < 1e-12


def test_the_published_truncation_is_not_exact_where_keys_correlate() -> None:
    A = random_A(64, family="correlated")
    assert float(relative_error(exact(A), invert(A, plan("neumann", 64))).max()) > 1e-3


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_one_level_of_block_merge_is_cayley_hamilton_doubling(chunk_size: int) -> None:
    A = random_A(chunk_size)
    eye = torch.eye(chunk_size, dtype=A.dtype)
    product, power, n = eye + A, A, 1
    while 2 * n < chunk_size:
        power, n = power @ power, 2 * n
        product = (eye + power) @ product
    assert torch.allclose(invert(A, plan("cayley_hamilton", chunk_size)), product, atol=1e-13)


@pytest.mark.parametrize("j", [1, 2, 3, 4])
def test_a_power_of_two_of_residual_terms_is_newton(j: int) -> None:
    A = random_A(64)
    eye = torch.eye(64, dtype=A.dtype)
    X = direct_neumann(A, 3, 3, 1)
    for _ in range(j):
        X = X @ (2 * eye - (eye - A) @ X)
    assert torch.allclose(invert(A, plan("neumann", 64, residual_steps=2**j)), X, atol=1e-12)


@pytest.mark.parametrize("method", ["block_merge", "neumann", "forward_substitution", "identity"])
def test_a_chunk_of_one_token_needs_no_steps(method: str) -> None:
    p = plan(method, 1)
    assert p.steps == ()
    assert str(p) == "T = I"
    assert torch.equal(invert(torch.zeros(3, 1, 1), p), torch.ones(3, 1, 1))


def test_identity_is_broken_on_purpose() -> None:
    A = random_A(16)
    assert torch.equal(invert(A, plan("identity", 16)), torch.eye(16, dtype=A.dtype).expand_as(A))


@pytest.mark.parametrize("method", ["block_merge", "neumann", "forward_substitution"])
@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_small_chunks(method: str, chunk_size: int) -> None:
    A = random_A(chunk_size)
    T = invert(A, plan(method, chunk_size))
    assert torch.allclose(T, exact(A), atol=1e-13)


def test_the_gradient_of_the_inverse() -> None:
    A = random_A(16, heads=1).requires_grad_()
    seed = torch.randn(1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((invert(A, plan("block_merge", 16)) * seed).sum(), A)
    T = exact(A.detach())
    assert torch.allclose(grad.tril(-1), (T.mT @ seed @ T.mT).tril(-1), atol=1e-10)


def test_leading_axes_broadcast() -> None:
    A = random_A(16, heads=6).reshape(3, 2, 16, 16)
    p = plan("block_merge", 16)
    assert torch.allclose(invert(A, p)[2, 1], invert(A[2, 1][None], p)[0], atol=1e-15)
    from qdeltanet.core import FloatArithmetic, Operand

    T = run_plan(p, Operand("A", A), FloatArithmetic())
    assert T is not None
    assert tuple(T.codes.shape) == (3, 2, 16, 16)

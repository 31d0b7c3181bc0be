"""What each method claims in exact arithmetic, and its counts.

Matrices of small whole numbers in float64: while everything stays below 2^53 no operation rounds, in whatever order, so
identities hold to the bit. `same` guards that.
"""

from __future__ import annotations

import pytest
import torch
from helpers import random_A
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeltanet.core import ObservingArithmetic, Operand, relative_error
from qdeltanet.inverse import (
    CHUNK_SIZES,
    Mask,
    Plan,
    invert,
    plan,
    register_ranges,
    run_plan,
)

EXACT = 2.0**53


def whole_numbers(size: int, seed: int = 0, density: float = 0.1, heads: int = 2) -> Tensor:
    """Strictly lower float64 [heads, C, C] of -1, 0 and 1, sparse: powers grow slowly."""
    make = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (heads, size, size), generator=make) * 2 - 1
    kept = torch.rand(heads, size, size, generator=make) < density
    return (signs * kept).double().tril(-1)


def inverse_by_rows(A: Tensor) -> Tensor:
    """(I - A)^-1 from its definition: row i of T is e_i + A_i T."""
    T = torch.eye(A.shape[-1], dtype=A.dtype).expand(A.shape).clone()
    for i in range(A.shape[-1]):
        T[..., i, :] += (A[..., i : i + 1, :] @ T)[..., 0, :] - A[..., i, i : i + 1] * T[..., i, :]
    return T


def same(A: Tensor, p: Plan, expected: Tensor) -> None:
    """To the bit, and nothing on the way was large enough to round."""
    assert max(register_ranges(p, A).values()) * A.shape[-1] < EXACT
    assert A.shape[-1] == 2 or (A @ A).any()
    assert torch.equal(invert(A, p), expected)


def by_steps(A: Tensor, p: Plan) -> Tensor:
    """T with its diagonal, by every step of a plan as it stands."""
    T = run_plan(p, Operand("A", A), ObservingArithmetic(lambda site, x, compact: None))
    assert T is not None
    return T.codes + torch.eye(A.shape[-1]).double()


# -- exact methods -----------------------------------------------------------------------------------------------------

EXACT_METHODS = [
    ("bunch_hopcroft", {}),
    ("cayley_hamilton", {}),
    ("mixed", {}),
    ("mixed", {"leaf": 4}),
    ("column_sweep", {"form": "vector"}),
    ("column_sweep", {"form": "matrix"}),
    ("newton_schulz", {"start": "identity"}),
    ("forward_substitution", {}),
    ("block_merge", {"join": "powers", "diagonal": "explicit"}),
]


@pytest.mark.parametrize(("method", "options"), EXACT_METHODS)
@pytest.mark.parametrize("chunk_size", [2, 4, 8, 16, 32, 64])
def test_exact_methods_are_exact(method: str, options: dict[str, object], chunk_size: int) -> None:
    A = whole_numbers(chunk_size, seed=3, density=max(2 / chunk_size, 0.8 - chunk_size / 40))
    same(A, plan(method, chunk_size, **options), inverse_by_rows(A))


RADICES = [[16], [8, 2], [2, 8], [4, 4], [2, 2, 4], [4, 2, 2], [2, 4, 2], [2, 2, 2, 2]]


@pytest.mark.parametrize("radices", RADICES)
@given(seed=st.integers(0, 10_000))
def test_every_factorisation_is_exact_with_either_diagonal(radices: list[int], seed: int) -> None:
    A = whole_numbers(16, seed, density=0.4)
    for diagonal in ("implicit", "explicit"):
        p = plan("block_merge", 16, radices=radices, join="powers", diagonal=diagonal)
        assert torch.equal(invert(A, p), inverse_by_rows(A))


@pytest.mark.parametrize("radices", [None, *RADICES])
@given(seed=st.integers(0, 10_000))
def test_eager_joins_are_exact_step_by_step(radices: list[int] | None, seed: int) -> None:
    """`invert` reads them as pairs; here every step runs."""
    A = whole_numbers(16, seed, density=0.4)
    assert torch.equal(by_steps(A, plan("block_merge", 16, radices=radices)), inverse_by_rows(A))


@pytest.mark.parametrize(("chunk_size", "radices"), [(32, None), (64, None), (64, [64]), (128, None), (64, [2, 8, 4])])
def test_eager_joins_are_exact_in_large_chunks(chunk_size: int, radices: list[int] | None) -> None:
    A = whole_numbers(chunk_size, seed=3, density=2 / chunk_size)
    p = plan("block_merge", chunk_size, radices=radices)
    assert torch.equal(by_steps(A, p), inverse_by_rows(A))
    same(A, p, inverse_by_rows(A))


@pytest.mark.parametrize("radices", [None, [4, 4, 4], [64], [16, 2, 2], [2, 8, 4]])
def test_explicit_is_implicit_on_real_numbers(radices: list[int] | None) -> None:
    """Up to rounding: one diagonal adds ones before it rounds, the other leaves them out."""
    A = random_A(64)
    one, other = (
        invert(A, plan("block_merge", 64, radices=radices, join="powers", diagonal=d)) for d in ("implicit", "explicit")
    )
    assert float(relative_error(one, other).max()) < 1e-13
    assert torch.equal(other.diagonal(dim1=-2, dim2=-1), torch.ones(3, 64).double())


@pytest.mark.parametrize("chunk_size", [4, 16, 32])
def test_the_truncated_series_is_exact_from_the_chunk_size_on(chunk_size: int) -> None:
    A = whole_numbers(chunk_size, density=min(0.8, 3 / chunk_size))
    for order in (chunk_size, chunk_size + 3):
        same(A, plan("truncated_neumann", chunk_size, order=order), inverse_by_rows(A))
    powers = torch.eye(chunk_size).double() + A + A @ A + A @ A @ A
    same(A, plan("truncated_neumann", chunk_size, order=4), powers)


# -- recurrences as they are written in the papers -------------------------------------------------------------------


def mch(M: Tensor) -> Tensor:
    """X = I - M, Y = M; repeat log2 n - 1 times: Y = Y^2, X += X Y."""
    size = M.shape[-1]
    X, Y = torch.eye(size).double() - M, M
    for _ in range(size.bit_length() - 2):
        Y = Y @ Y
        X = X + X @ Y
    return X


def mbh(M: Tensor, X: Tensor, block: int) -> Tensor:
    """From b = block: X = (L_X (-M) + I) R_X + L_X, L_X the second and R_X the first block of each pair."""
    size = M.shape[-1]
    eye = torch.eye(size).double()
    while block < size:
        second = (torch.arange(size) // block % 2 == 1).double()
        left, right = X * second, X * (1 - second)
        pair = (torch.arange(size)[:, None] // (2 * block) == torch.arange(size) // (2 * block)).double()
        X = (left @ (-M * pair) + eye) @ right + left
        block *= 2
    return X


def mxr(M: Tensor, leaf: int) -> Tensor:
    """MCH on the leaves, then MBH."""
    X = torch.zeros_like(M)
    for start in range(0, M.shape[-1], leaf):
        s = slice(start, start + leaf)
        X[..., s, s] = mch(M[..., s, s])
    return mbh(M, X, leaf)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_published_recurrences_are_points_of_block_merge(chunk_size: int) -> None:
    A = whole_numbers(chunk_size, seed=7, density=2 / chunk_size)
    eye = torch.eye(chunk_size).double().expand(A.shape)
    twos = [2] * (chunk_size.bit_length() - 1)
    for name, options, published, radices in (
        ("cayley_hamilton", {}, mch(-A), [chunk_size]),
        ("bunch_hopcroft", {}, mbh(-A, eye, 1), twos),
        ("mixed", {"leaf": 16}, mxr(-A, 16), [16, *twos[4:]]),
        ("mixed", {"leaf": 8}, mxr(-A, 8), [8, *twos[3:]]),
    ):
        p = plan(name, chunk_size, **options)
        assert (p.method, p.steps) == (
            name,
            plan("block_merge", chunk_size, radices=radices, join="powers", diagonal="explicit").steps,
        )
        same(A, p, published)
        implicit = plan(name, chunk_size, diagonal="implicit", **options)
        assert implicit.steps == plan("block_merge", chunk_size, radices=radices, join="powers").steps
        same(A, implicit, published)


def test_column_sweep_is_the_published_sweep() -> None:
    """x_k = b_k; b[:k] -= U[:k, k] x_k on the transposed system, for all right-hand sides at once."""
    A = whole_numbers(16, density=0.4)
    b = torch.eye(16).double().expand(A.shape).clone()
    for k in range(16):
        b[..., k + 1 :, :] += A[..., k + 1 :, k : k + 1] * b[..., k : k + 1, :]
    same(A, plan("column_sweep", 16), b)
    assert plan("column_sweep", 16, form="matrix").steps != plan("column_sweep", 16).steps


def newton(A: Tensor, X: Tensor, iterations: int) -> Tensor:
    """X = X (2I - (I - A) X)."""
    eye = torch.eye(A.shape[-1]).double()
    for _ in range(iterations):
        X = X @ (2 * eye - (eye - A) @ X)
    return X


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_newton_from_the_identity(iterations: int) -> None:
    """k iterations are the series up to A^(2^k - 1)."""
    A = whole_numbers(16, density=0.4)
    p = plan("newton_schulz", 16, start="identity", iterations=iterations)
    same(A, p, newton(A, torch.eye(16).double(), iterations))
    same(A, p, invert(A, plan("truncated_neumann", 16, order=2**iterations)))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("iterations", [1, 2, 5, None])
def test_newton_from_the_scaled_identity_is_the_published_iteration(chunk_size: int, iterations: int | None) -> None:
    """Up to its diagonal d. The factors r = d / (2 - d) are no binary fractions: float64 rounds."""
    A = random_A(chunk_size, width=64) / 2
    times = iterations or max(12, 2 * (chunk_size.bit_length() - 1))
    X = newton(A, torch.eye(chunk_size).double() / (2 * chunk_size), times)
    d = 1 - (1 - 1 / (2 * chunk_size)) ** (2**times)
    diagonal = X.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(diagonal, torch.full_like(diagonal, d), rtol=1e-10)
    T = invert(A, plan("newton_schulz", chunk_size, iterations=iterations))
    assert float(relative_error(X / d, T).max()) < 1e-12
    if iterations is None:
        assert float(relative_error(inverse_by_rows(A), T).max()) < 1e-12


# -- the published series ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("j", [1, 2, 3])
@pytest.mark.parametrize("band", [2, 3, "none"])
def test_a_power_of_two_of_residual_terms_is_newton_to_the_bit(j: int, band: int | str) -> None:
    A = whole_numbers(16, density=0.2)
    T0 = invert(A, plan("neumann", 16, band=band, residual_steps=1))
    same(A, plan("neumann", 16, band=band, residual_steps=2**j), newton(A, T0, j))


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("chunk_size", [8, 16])
def test_the_linear_sum_is_the_doubled_one(terms: int, chunk_size: int) -> None:
    A = whole_numbers(chunk_size, seed=1, density=3.2 / chunk_size)
    doubled, linear = (
        plan("neumann", chunk_size, order=3, band=2, residual_steps=terms, residual_sum=how)
        for how in ("doubled", "linear")
    )
    assert (doubled.steps == linear.steps) == (terms in (2, 3))
    same(A, linear, invert(A, doubled))
    assert linear.matmuls == 1 + 2 + terms - 2


def test_without_a_band_the_residual_is_a_power() -> None:
    """T0 = sum of A^n over n < order leaves E = A^order: steps terms reach order * steps powers."""
    A = whole_numbers(16, density=0.3)
    for order, steps in ((2, 3), (3, 4), (4, 4)):
        p = plan("neumann", 16, order=order, band="none", residual_steps=steps)
        same(A, p, invert(A, plan("truncated_neumann", 16, order=order * steps)))
    alone = plan("neumann", 16, order=5, band="none", residual_steps=1)
    assert alone.steps == plan("truncated_neumann", 16, order=5).steps
    wide = plan("neumann", 16, order=5, band=15, residual_steps=1)
    same(A, wide, invert(A, alone))


def test_128_as_two_blocks_or_directly() -> None:
    """Once the residual is nilpotent both are exact, so they are equal."""
    A = whole_numbers(128, density=0.006)
    split, direct = (plan("neumann", 128, residual_steps=64, block=b) for b in (64, 128))
    assert split.masks["E"] == Mask(1, 64)
    assert direct.masks["E"] == Mask(1, 128)
    expected = inverse_by_rows(A)
    for p in (split, direct):
        assert torch.equal(invert(A, p), expected)
    few = [invert(A.float(), plan("neumann", 128, residual_steps=2, block=b)) for b in (64, 128)]
    assert not torch.equal(*few)


# -- counts ------------------------------------------------------------------------------------------------------------

COUNTS = [  # method, options, matmuls and depth at n = 16, 32, 64, 128; as the paper counts matmuls
    ("cayley_hamilton", {}, (6, 8, 10, 12), (4, 5, 6, 7), (6, 8, 10, 12)),
    ("mixed", {}, (6, 8, 10, 12), (4, 6, 8, 10), (6, 8, 10, 12)),
    # the first level joins single tokens, whose inverse is I: two products that we do not form
    ("bunch_hopcroft", {}, (6, 8, 10, 12), (6, 8, 10, 12), (8, 10, 12, 14)),
    # so does the first iteration, from a diagonal matrix
    ("newton_schulz", {}, (22, 22, 22, 26), (22, 22, 22, 26), (24, 24, 24, 28)),
    # and the first elementary matrix is there already
    ("column_sweep", {"form": "matrix"}, (14, 30, 62, 126), (14, 30, 62, 126), (15, 31, 63, 127)),
    ("column_sweep", {"form": "vector"}, (0, 0, 0, 0), (14, 30, 62, 126), (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("method", "options", "matmuls", "depth", "paper"), COUNTS)
def test_the_paper_s_table(
    method: str, options: dict[str, str], matmuls: tuple[int, ...], depth: tuple[int, ...], paper: tuple[int, ...]
) -> None:
    plans = [plan(method, n, **options) for n in CHUNK_SIZES]
    assert tuple(p.matmuls for p in plans) == matmuls
    assert tuple(p.depth for p in plans) == depth
    free = {"bunch_hopcroft": 2, "newton_schulz": 2, "column_sweep": 1 if options.get("form") == "matrix" else 0}
    assert tuple(m + free.get(method, 0) for m in matmuls) == paper
    assert all(
        p.vector_steps == (d if options.get("form") == "vector" else 0) for p, d in zip(plans, depth, strict=True)
    )

"""Range analysis: what registers reach, and what provably they do not."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import KEY_FAMILIES, random_A, unit_keys, ut_system
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeltanet.inverse import plan, register_ranges


def ones(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return -torch.ones(1, size, size, dtype=dtype).tril(-1)


@given(
    family=st.sampled_from(KEY_FAMILIES),
    chunk_size=st.sampled_from([16, 32, 64, 128]),
    width=st.sampled_from([1, 4, 32]),
    beta_max=st.sampled_from([0.3, 1.0, 2.0]),
    beta_kind=st.sampled_from(["random", "largest", "steps"]),
    decay=st.sampled_from([0.0, 0.003, 0.5, 166.0]),
    noise=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300)
def test_registers_stay_within_the_largest_beta(
    family: str, chunk_size: int, width: int, beta_max: float, beta_kind: str, decay: float, noise: float, seed: int
) -> None:
    """Of radix 2 and of eager joins, whatever their radices."""
    make = torch.Generator().manual_seed(seed)
    keys = unit_keys(family, chunk_size, width, make)
    keys = keys + noise * torch.randn(keys.shape, generator=make, dtype=torch.float64)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    beta = torch.rand(chunk_size, generator=make, dtype=torch.float64)
    if beta_kind != "random":
        beta = torch.ones_like(beta) if beta_kind == "largest" else (beta > 0.5).double()
    beta = beta * beta_max
    g = -decay * torch.rand(chunk_size, generator=make, dtype=torch.float64)
    A = ut_system(keys, beta, g)[None]
    for radices in (None, [chunk_size], [4, chunk_size // 4], [2] * (chunk_size.bit_length() - 1)):
        p = plan("block_merge", chunk_size, radices=radices)
        reached = register_ranges(p, A)
        assert set(reached) == {"A", "T", *p.registers}
        assert max(reached.values()) <= float(beta.max()) * (1 + 1e-9)


@pytest.mark.parametrize("family", KEY_FAMILIES)
@pytest.mark.parametrize("p", [plan("block_merge", 64, radices=r, join=j)
                               for r in ([4, 4, 4], [8, 8], [16, 4], [64]) for j in ("eager", "powers")],
                         ids=lambda p: f"{p.options['radices']} {p.options['join']}")  # fmt: skip
def test_registers_that_a_plan_calls_bounded_are(p, family: str) -> None:  # type: ignore[no-untyped-def]
    A = random_A(64, family=family)  # beta below 1
    reached = register_ranges(p, A)
    assert all(reached[r] <= 1 + 1e-6 for r in p.bounded if r in reached)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_cayley_hamilton_grows_like_binomials(size: int) -> None:
    """A = -ones: |A^n| reaches C(size - 2, n - 1) while T stays within 1."""
    reached = register_ranges(plan("cayley_hamilton", size, diagonal="implicit"), ones(size))
    n = 2
    while n < size:
        assert reached[f"N{size}^{n}"] == pytest.approx(math.comb(size - 2, n - 1), rel=1e-9)
        n *= 2
    exact = register_ranges(plan("block_merge", size), ones(size))
    assert max(exact.values()) == 1.0


@pytest.mark.parametrize(("radices", "growth"), [([4, 4, 4], 2), ([8, 8], 20)])
def test_the_dynamic_range_law(radices: list[int], growth: int) -> None:
    """A level of radix r lets the powers grow by at most about max_n C(r - 2, n - 1)."""
    r = radices[0]
    assert growth == max(math.comb(r - 2, n - 1) for n in range(1, r))
    reached = register_ranges(plan("block_merge", 64, radices=radices, join="powers"), ones(64))
    assert 2 <= max(reached.values()) <= growth


def test_overflow_is_reported_as_it_is() -> None:
    reached = register_ranges(plan("cayley_hamilton", 128, diagonal="implicit"), 2 * ones(128, torch.float32))
    assert not all(math.isfinite(x) for x in reached.values())
    reached = register_ranges(plan("neumann", 64, residual_steps=32), 1e9 * ones(64, torch.float32))
    assert not math.isfinite(reached["T"])


def test_hard_decay_leaves_ranges_finite() -> None:
    make = torch.Generator().manual_seed(0)
    keys = unit_keys("correlated", 64, 16, make)
    A = ut_system(keys, torch.ones(64).double(), torch.full((64,), -166.0).double())[None].float()
    assert all(math.isfinite(x) for x in register_ranges(plan(), A).values())

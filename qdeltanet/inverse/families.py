"""Families of matrices A: what an inverse meets, from harmless to adversarial.

Each family is a kind of keys with a kind of gates: A = -tril(diag(beta) (k k^T) * D, -1) with D_ij = exp(c_i - c_j).
All but `uniform` are what the delta rule can make, so that |A_ij| and |T_ij| stay within max(beta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import unknown

KEY_DIM = 128  # of real models

# Quantiles of a real layer's gates at these levels: beta over tokens, and per kind of head the logarithmic range of -g.
LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BETA_SMALL = (0.02, 0.07, 0.13, 0.25, 0.42, 0.65, 0.98, 0.996, 0.999)  # a 0.8B model
BETA_LARGE = (0.004, 0.2, 0.3, 0.54, 0.83, 0.99, 0.9987, 0.9993, 0.9999)  # an 80B one
SLOW, MEDIUM, FAST, AT_ONCE = (-3.5, -2.5), (-2.0, -0.5), (0.2, 0.65), (2.1, 2.22)  # log10 of mean -g per token


@dataclass(frozen=True)
class Shape:
    """What a family is asked for: A is [heads, matrices, chunk_size, chunk_size]."""

    heads: int
    matrices: int
    chunk_size: int
    key_dim: int = KEY_DIM

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.heads, self.matrices, self.chunk_size


Keys = Callable[[Shape, torch.Generator], Tensor]
Gates = Callable[[Shape, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """keys: [H, M, C, K], not normalised yet; gates: (beta, g), each [H, M, C]. float64.

    limit: what |A_ij| and |T_ij| provably stay within, max(beta); None where nothing is proven.
    """

    name: str
    description: str
    keys: Keys
    gates: Gates
    limit: float | None = 1.0

    def matrices(self, shape: Shape, seed: int = 0) -> Tensor:
        """A, float64 [heads, matrices, C, C], strictly lower; deterministic for a seed."""
        make = torch.Generator().manual_seed(seed)
        return system(F.normalize(self.keys(shape, make), dim=-1), *self.gates(shape, make))


def system(keys: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """A = -tril(diag(beta) (k k^T) * D, -1) from unit keys [..., C, K] and gates [..., C]."""
    c = g.cumsum(-1)
    decay = (c[..., :, None] - c[..., None, :]).tril().exp()
    return -(beta[..., :, None] * (keys @ keys.mT) * decay).tril(-1)


# -- keys --------------------------------------------------------------------------------------------------------------


def _normal(*size: int, make: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=make, dtype=torch.float64)


def iid_keys(shape: Shape, make: torch.Generator) -> Tensor:
    return _normal(*shape.tokens, shape.key_dim, make=make)


def silu_keys(shape: Shape, make: torch.Generator) -> Tensor:
    return F.silu(iid_keys(shape, make))


def correlated_keys(shape: Shape, make: torch.Generator) -> Tensor:
    """A component that all tokens of a head share, as trained models have."""
    shared = _normal(shape.heads, 1, 1, shape.key_dim, make=make)
    return F.silu(0.5 * iid_keys(shape, make) + shared)


def repeated_keys(shape: Shape, make: torch.Generator) -> Tensor:
    """Eight tokens of a vocabulary, again and again, with a little noise."""
    vocabulary = F.silu(_normal(shape.heads, 8, shape.key_dim, make=make))
    which = torch.randint(0, 8, shape.tokens, generator=make)
    head = torch.arange(shape.heads)[:, None, None]
    return vocabulary[head, which] + 0.05 * iid_keys(shape, make)


def run_keys(shape: Shape, make: torch.Generator) -> Tensor:
    """Runs of one token, 8 long on average, from a vocabulary of 32."""
    vocabulary = F.silu(_normal(shape.heads, 32, shape.key_dim, make=make))
    starts = torch.rand(shape.tokens, generator=make) < 1 / 8
    drawn = torch.randint(0, 32, shape.tokens, generator=make)
    which = drawn.gather(-1, starts.cumsum(-1).clamp(max=shape.chunk_size - 1))
    return vocabulary[torch.arange(shape.heads)[:, None, None], which]


def equal_keys(shape: Shape, make: torch.Generator) -> Tensor:
    """One channel only, so that products of normalised keys are 1 to the bit."""
    return torch.eye(1, shape.key_dim, dtype=torch.float64).expand(*shape.tokens, shape.key_dim)


def orthogonal_keys(shape: Shape, make: torch.Generator) -> Tensor:
    """Orthonormal rows, in turn where there are more tokens than channels: A = 0 within key_dim tokens."""
    eye = torch.eye(shape.key_dim, dtype=torch.float64)
    return eye[torch.arange(shape.chunk_size) % shape.key_dim].expand(*shape.tokens, shape.key_dim)


# -- gates -------------------------------------------------------------------------------------------------------------


def _quantile_sample(levels: tuple[float, ...], values: tuple[float, ...], at: Tensor) -> Tensor:
    """The quantile function through (levels, values), piecewise linear."""
    x, y = torch.tensor(levels, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    i = torch.searchsorted(x, at.contiguous(), right=True).clamp(1, len(levels) - 1)
    return y[i - 1] + (at - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])


def real_gates(quantiles: tuple[float, ...], kinds: tuple[tuple[float, float], ...]) -> Gates:
    """Gates after published quantiles: beta over tokens and heads, heads taking the kinds of decay in turn.

    Heads differ and so do their tokens: the level of a token is the mean of one number of its head and one of its own,
    both uniform, through the distribution function of such means, so that levels are uniform over all heads. -g is
    lognormal around the mean of its head.
    """

    def gates(shape: Shape, make: torch.Generator) -> tuple[Tensor, Tensor]:
        head = torch.rand(shape.heads, 1, 1, generator=make, dtype=torch.float64)
        own = torch.rand(shape.tokens, generator=make, dtype=torch.float64)
        x = (head + own) / 2
        level = torch.where(x < 0.5, 2 * x.square(), 1 - 2 * (1 - x).square())
        beta = _quantile_sample(LEVELS, quantiles, level)
        low, high = torch.tensor([kinds[h % len(kinds)] for h in range(shape.heads)], dtype=torch.float64).T
        mean = 10 ** (low + (high - low) * torch.rand(shape.heads, generator=make, dtype=torch.float64))
        spread = torch.exp(_normal(*shape.tokens, make=make) - 0.5)  # of mean 1
        return beta, -mean[:, None, None] * spread

    return gates


def no_decay(shape: Shape, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """beta anywhere in (0, 1), g = 0: nothing is ever forgotten."""
    beta = torch.rand(shape.tokens, generator=make, dtype=torch.float64)
    return beta, torch.zeros(shape.tokens, dtype=torch.float64)


def full_writes(shape: Shape, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """beta = 1, g = 0."""
    return torch.ones(shape.tokens, dtype=torch.float64), torch.zeros(shape.tokens, dtype=torch.float64)


slow_gates = real_gates(BETA_LARGE, (SLOW, SLOW, MEDIUM, SLOW))
hard_decay = real_gates(BETA_LARGE, (FAST, AT_ONCE, MEDIUM, AT_ONCE))
gates_small = real_gates(BETA_SMALL, (SLOW, SLOW, MEDIUM, FAST))
gates_large = real_gates(BETA_LARGE, (SLOW, SLOW, MEDIUM, AT_ONCE))


class _Uniform(Family):
    """Made entry by entry; its keys and gates are not read."""

    def matrices(self, shape: Shape, seed: int = 0) -> Tensor:
        make = torch.Generator().manual_seed(seed)
        size = (*shape.tokens, shape.chunk_size)
        return -(0.5 * torch.rand(size, generator=make, dtype=torch.float64)).tril(-1)


_EVERY = (
    Family("iid", "independent normal keys, slow gates", iid_keys, slow_gates),
    Family("silu", "SiLU of independent normal keys, slow gates", silu_keys, slow_gates),
    Family("correlated", "SiLU keys with a component that all tokens share, slow gates", correlated_keys, slow_gates),
    Family("repeated", "eight tokens again and again, slow gates", repeated_keys, slow_gates),
    Family("runs", "runs of one token, slow gates", run_keys, slow_gates),
    Family("ones", "equal keys, beta = 1, no decay: A = -1 everywhere", equal_keys, full_writes),
    Family("orthogonal", "orthonormal keys: A = 0", orthogonal_keys, full_writes),
    Family("hard_decay", "correlated keys, heads that forget in a few tokens or at once", correlated_keys, hard_decay),
    Family("no_decay", "correlated keys, g = 0", correlated_keys, no_decay),
    Family("gates_small", "correlated keys, gates after the quantiles of Qwen3.5-0.8B", correlated_keys, gates_small),
    Family("gates_large", "correlated keys, gates after the quantiles of Qwen3-Next", correlated_keys, gates_large),
)
FAMILIES: dict[str, Family] = {f.name: f for f in _EVERY}
# What the published error table is of: no delta rule makes it, and no range of T is proven for it.
UNIFORM = _Uniform("uniform", "entries of -A uniform in [0, 0.5)", iid_keys, full_writes, None)


def family(name: str) -> Family:
    """Raises QDeltaNetError with the nearest name."""
    every = FAMILIES | {UNIFORM.name: UNIFORM}
    if name not in every:
        raise unknown("family", name, every)
    return every[name]

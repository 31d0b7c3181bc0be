"""Newton-Schulz iteration: corrects itself, and costs two products each time."""

from __future__ import annotations

from typing import Literal

from ..mask import Mask
from ..plan import INPUT, OUTPUT, Plan, Step
from .checks import check_choice, check_least

STARTS = ("scaled", "identity")


def newton_schulz(
    chunk_size: int, iterations: int | None = None, start: Literal["scaled", "identity"] = "scaled"
) -> Plan:
    """Newton-Schulz iteration: X <- X (2I - (I - A) X), from X = I / (2n) (NS of arXiv 2605.21325).

    The diagonal of X is a number d that is known beforehand. With X = d (I + L), W = A + A L - L and r = d / (2 - d)
    the iteration is L <- L + r W + L (r W), d <- d (2 - d): registers hold L and W, and r is a factor of a scale. The
    result is I + L: the last d, 1 - (1 - 1/(2n))^(2^iterations), is left out.

    Two products an iteration but none in the first, where X is diagonal: 22 / 22 / 22 / 26 at n = 16 / 32 / 64 / 128,
    as many deep (the paper counts 24 / 24 / 24 / 28).

    iterations: None for max(12, 2 log2(n)), from the identity log2(n), which is exact. start: `scaled` for I / (2n);
    `identity` for I: all r are 1. Raises QDeltaNetError for less than 1 iteration or another start.
    """
    check_choice("newton_schulz", "start", start, STARTS)
    doublings = chunk_size.bit_length() - 1
    if iterations is None:
        iterations = doublings if start == "identity" else max(12, 2 * doublings)
    check_least("newton_schulz", 1, iterations=iterations)
    d = 1.0 if start == "identity" else 1 / (2 * chunk_size)
    steps: list[Step] = []
    for k in range(1, iterations + 1):
        out = OUTPUT if k == iterations else f"L{k}"
        steps += _iteration(k, out, d / (2 - d), Mask(1, chunk_size))
        d *= 2 - d
    exact = start == "identity" and iterations >= doublings
    bounded = frozenset((INPUT, OUTPUT) if exact else (INPUT,))
    return Plan("newton_schulz", chunk_size, tuple(steps), {"iterations": iterations, "start": start}, bounded)


def _iteration(k: int, out: str, r: float, mask: Mask) -> list[Step]:
    """From L_(k-1) to `out`; before the first iteration L is 0 and W is A."""
    if k == 1:
        return [Step(out, mask, INPUT, factor=r)]
    L, W = f"L{k - 1}", f"W{k}"
    steps = [Step(W, mask, INPUT, L, ((INPUT, 1), (L, -1)))]
    if r == 1 and k == 2:  # L is A itself
        steps = [Step(W, mask, INPUT, INPUT)]
    if r != 1:
        steps.append(Step(f"r{W}", mask, W, factor=r))
        W = f"r{W}"
    return [*steps, Step(out, mask, L, W, ((L, 1), (W, 1)))]

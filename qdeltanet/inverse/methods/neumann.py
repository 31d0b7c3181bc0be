"""Truncated Neumann series with a band mask and parallel residual correction: the published method."""

from __future__ import annotations

from ...core import QDeltaNetError
from ..plan import INPUT, OUTPUT, Mask, Plan, Step
from .block_merge import merge_level

PUBLISHED_BLOCK = 64


def neumann(chunk_size: int, order: int = 3, band: int = 3, residual_steps: int = 8) -> Plan:
    """T = T0 sum over 0 <= s < residual_steps of E^s, with E = I - (I - A) T0 (arXiv 2606.06034).

    T0 = I + sum over 1 <= n < order of A^n, masked to i - j <= band. order: terms of the truncated series (A^0
    counts). band: kept sub-diagonals. residual_steps: terms of the residual sum, 1 for T0 alone; by doubling where it
    is a power of two, with one product more where it is one above. A chunk of 128 is cut into blocks of 64 that are
    then joined, as published.

    Raises QDeltaNetError for an order below 2, a band below 1 or residual_steps below 1.
    """
    for name, value, least in (("order", order, 2), ("band", band, 1), ("residual_steps", residual_steps, 1)):
        if value < least:
            raise QDeltaNetError(f"neumann: {name} = {value}; it must be at least {least}")
    block = min(chunk_size, PUBLISHED_BLOCK)
    blocks = Mask(1, block)
    banded = Mask(1, block, band=band)
    split = chunk_size > block
    final = f"L{block}" if split else OUTPUT
    steps = _truncated(order, banded, final if residual_steps == 1 else "T0")
    if residual_steps > 1:
        steps.append(Step("E", blocks, INPUT, "T0", ((INPUT, 1), ("T0", -1))))
        total, more = _residual_sum(residual_steps, blocks)
        steps += [*more, Step(final, blocks, "T0", total, (("T0", 1), (total, 1)))]
    options = {"order": order, "band": band, "residual_steps": residual_steps}
    merged = final
    while split and block < chunk_size:
        merged, join, _ = merge_level(block, 2, merged, last=2 * block == chunk_size)
        steps += join
        block *= 2
    return Plan("neumann", chunk_size, tuple(steps), options, frozenset((INPUT,)))


def _truncated(order: int, banded: Mask, out: str) -> list[Step]:
    """out = sum over 1 <= n < order of A^n within the band; the last power is added up in its own accumulator."""
    if order == 2:
        return [Step(out, banded, INPUT)]
    steps = []
    powers = [INPUT]
    for n in range(2, order - 1):
        powers.append(f"P{n}")
        steps.append(Step(powers[-1], Mask(1, banded.outer), powers[-2], INPUT))
    addends = tuple((p, 1) for p in powers)
    return [*steps, Step(out, banded, powers[-1], INPUT, addends)]


def _residual_sum(terms: int, mask: Mask) -> tuple[str, list[Step]]:
    """Register of S - I for S = sum over 0 <= s < terms of E^s, terms >= 2, and its steps.

    With S_m = sum over s < m and p the largest power of two below m: S_m = S_p + E^p S_(m-p).
    """
    steps: list[Step] = []
    powers = {1: "E"}
    done = {2: "E"}

    def power(n: int) -> str:
        if n not in powers:
            half = power(n // 2)
            powers[n] = f"E^{n}"
            steps.append(Step(powers[n], mask, half, half))
        return powers[n]

    def total(m: int) -> str:
        if m in done:
            return done[m]
        p = 1 << ((m - 1).bit_length() - 1)
        first = total(p)
        if m - p == 1:  # S_1 = I: the last power is added up in its own accumulator
            half = power(p // 2)
            steps.append(Step(f"S{m}", mask, half, half, ((first, 1),)))
        else:
            rest, high = total(m - p), power(p)
            steps.append(Step(f"S{m}", mask, high, rest, ((high, 1), (first, 1))))
        done[m] = f"S{m}"
        return done[m]

    return total(terms), steps

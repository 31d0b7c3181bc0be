"""Truncated Neumann series: alone, and as published with a band mask and parallel residual correction."""

from __future__ import annotations

from typing import Any, Literal

from ...core import QDeltaNetError
from ..mask import Mask
from ..plan import INPUT, OUTPUT, Plan, Step
from .block_merge import merge_level
from .checks import check_block, check_choice, check_least

PUBLISHED_BLOCK = 64
NO_BAND = "none"
RESIDUAL_SUMS = ("doubled", "linear")


def neumann(
    chunk_size: int,
    order: int = 3,
    band: int | Literal["none"] = 3,
    residual_steps: int = 8,
    residual_sum: Literal["doubled", "linear"] = "doubled",
    block: int = PUBLISHED_BLOCK,
) -> Plan:
    """T = T0 sum over 0 <= s < residual_steps of E^s, with E = I - (I - A) T0 (arXiv 2606.06034).

    T0 = I + sum over 1 <= n < order of A^n, masked to i - j <= band. order: terms of the truncated series (A^0
    counts). band: kept sub-diagonals, `none` for all of them. residual_steps: terms of the residual sum, 1 for T0
    alone. residual_sum: `doubled`, as (I + E)(I + E^2)(I + E^4).. where residual_steps is a power of two, with one
    product more where it is one above; `linear`, as S <- I + E S. Chunks above `block` are cut into blocks of that
    size, which are then joined in pairs; 128 is cut into blocks of 64 as published, or inverted directly with
    block = 128.

    Products for a chunk of up to `block`: order - 2, and from 2 residual steps on 2 more than the sum takes: 2 j - 2
    for 2^j terms doubled, residual_steps - 2 linear. Order 3 with 8 terms: 7 products, 6 deep (linear 9 and 9). A chunk
    of 128 in two blocks takes 2 more of both.

    Raises QDeltaNetError for an order below 2, a band below 1, residual_steps below 1, another residual_sum, or a
    block that is no power of two.
    """
    check_least("neumann", 2, order=order)
    check_least("neumann", 1, residual_steps=residual_steps)
    check_choice("neumann", "residual_sum", residual_sum, RESIDUAL_SUMS)
    check_block("neumann", "block", block)
    size = min(chunk_size, block)
    final = f"L{size}" if chunk_size > size else OUTPUT
    banded = Mask(1, size, band=_kept(band))
    steps = truncated(order, banded, final if residual_steps == 1 else "T0")
    if residual_steps > 1:
        steps += _corrected(residual_steps, residual_sum, Mask(1, size), final)
    options: dict[str, Any] = {"order": order, "band": band, "residual_steps": residual_steps}
    options |= {"residual_sum": residual_sum, "block": block}
    while size < chunk_size:
        final, join, _ = merge_level(size, 2, final, last=2 * size == chunk_size)
        steps += join
        size *= 2
    return Plan("neumann", chunk_size, tuple(steps), options, frozenset((INPUT,)))


def _kept(band: int | str) -> int | None:
    if band == NO_BAND:
        return None
    if not isinstance(band, int):
        raise QDeltaNetError(f"neumann: band = {band!r}; it must be a number of sub-diagonals or {NO_BAND}")
    check_least("neumann", 1, band=band)
    return band


def truncated_neumann(chunk_size: int, order: int = 3) -> Plan:
    """The truncated Neumann series alone: T = sum over 0 <= n < order of A^n.

    The point order, band = none, residual_steps = 1, block = chunk_size of `neumann` (arXiv 2606.06034 before its mask
    and correction). order - 2 products, as many deep, one power after the other; exact from order = chunk_size on.

    Raises QDeltaNetError for an order below 2.
    """
    check_least("truncated_neumann", 2, order=order)
    steps = truncated(order, Mask(1, chunk_size), OUTPUT)
    bounded = frozenset((INPUT, OUTPUT) if order >= chunk_size else (INPUT,))
    return Plan("truncated_neumann", chunk_size, tuple(steps), {"order": order}, bounded)


def truncated(order: int, banded: Mask, out: str) -> list[Step]:
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


def _corrected(terms: int, how: str, blocks: Mask, out: str) -> list[Step]:
    """out = T0 S - I for the residual sum S of at least two terms."""
    total, steps = _linear_sum(terms, blocks) if how == "linear" else _doubled_sum(terms, blocks)
    residual = Step("E", blocks, INPUT, "T0", ((INPUT, 1), ("T0", -1)))
    return [residual, *steps, Step(out, blocks, "T0", total, (("T0", 1), (total, 1)))]


def _linear_sum(terms: int, mask: Mask) -> tuple[str, list[Step]]:
    """Register of S - I for S = sum over 0 <= s < terms of E^s, and its steps: S_m = I + E S_(m-1), S_2 - I = E."""
    steps = []
    total = "E"
    for m in range(3, terms + 1):
        steps.append(Step(f"S{m}", mask, "E", total, (("E", 1),)))
        total = f"S{m}"
    return total, steps


def _doubled_sum(terms: int, mask: Mask) -> tuple[str, list[Step]]:
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

"""Block merging: the default method, exact, with any radices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...core import QDeltaNetError
from ..plan import INPUT, OUTPUT, Mask, Plan, Step


def block_merge(chunk_size: int, radices: Sequence[int] | None = None) -> Plan:
    """Join r inverted diagonal blocks of size b at each level, for each radix r.

    With (I + L) the inverted blocks, N = (I + L) A_off is strictly block-lower, so N^r = 0 and
    (I - N)^-1 (I + L) = (I + N)(I + N^2)(I + N^4)...(I + L), exactly. Radices (2, 2, ...) are Bunch-Hopcroft block
    doubling (MBH of arXiv 2605.21325), (chunk_size,) is Cayley-Hamilton doubling (MCH), (16, 2, 2) the mixed method
    (MXR). With radix 2 every register stays within max(beta).

    radices: powers of two with product chunk_size; None for radix 2 throughout.
    Raises QDeltaNetError for radices that do not fit.
    """
    radices = list(radices) if radices is not None else [2] * (chunk_size.bit_length() - 1)
    _check(chunk_size, radices)
    steps: list[Step] = []
    bounded = {INPUT, OUTPUT}
    merged = ""  # register of the inverted blocks so far; none while blocks are single tokens
    block = 1
    for radix in radices:
        merged, new, limited = merge_level(block, radix, merged, last=block * radix == chunk_size)
        steps += new
        bounded |= limited
        block *= radix
    return Plan("block_merge", chunk_size, tuple(steps), {"radices": tuple(radices)}, frozenset(bounded))


def merge_level(block: int, radix: int, merged: str, last: bool) -> tuple[str, list[Step], set[str]]:
    """One level: r blocks of size `block`, inverted in register `merged`, into one. Returns (register, steps, bounded).

    R = (I + N)(I + L) - I, then R <- (I + N^2)(I + R) - I, (I + N^4) ...: the powers of N and the products with R run
    side by side, so a level is log2(r) + 1 products deep.
    """
    outer = block * radix
    off, full = Mask(block, outer), Mask(1, outer)
    out = OUTPUT if last else f"L{outer}"
    if not merged and radix == 2:
        return out, [Step(out, full, INPUT)], {out}
    N = f"N{outer}"
    steps = [Step(N, off, merged, INPUT, ((INPUT, 1),)) if merged else Step(N, off, INPUT)]
    doublings = radix.bit_length() - 1
    register = merged or N
    power = N
    if merged:
        register = out if doublings == 1 else f"R{outer}_1"
        steps.append(Step(register, full, N, merged, ((N, 1), (merged, 1))))
    for j in range(1, doublings):
        square = f"N{outer}^{2**j}"
        steps.append(Step(square, off, power, power))
        target = out if j == doublings - 1 else f"R{outer}_{2**j}"
        mask = full if merged else off
        mask = full if target == out else mask
        steps.append(Step(target, mask, square, register, ((square, 1), (register, 1))))
        register, power = target, square
    return out, steps, {N, out}


def _check(chunk_size: int, radices: Sequence[int]) -> None:
    shape = ", ".join(map(str, radices))
    if any(r < 2 or r & (r - 1) for r in radices) or math.prod(radices) != chunk_size:
        raise QDeltaNetError(
            f"radices ({shape}): need powers of two whose product is the chunk size {chunk_size}, "
            f"e.g. {[2] * (chunk_size.bit_length() - 1)}"
        )

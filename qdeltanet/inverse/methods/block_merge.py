"""Block merging: the default method, exact, with any radices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ...core import QDeltaNetError
from ..mask import Mask
from ..plan import IDENTITY, INPUT, OUTPUT, Plan, Step
from .checks import check_choice
from .eager import eager_level

Join = Literal["eager", "powers"]
JOINS = ("eager", "powers")
Diagonal = Literal["implicit", "explicit"]
DIAGONALS = ("implicit", "explicit")
TILE = 16  # of matrix units: what the default inverts first


def block_merge(
    chunk_size: int, radices: Sequence[int] | None = None, join: Join = "eager", diagonal: Diagonal = "implicit"
) -> Plan:
    """Join r inverted diagonal blocks of size b at each level, for each radix r.

    With (I + L) the inverted blocks, N = (I + L) A_off is strictly block-lower, so N^r = 0 and
    (I - N)^-1 (I + L) = (I + N)(I + N^2)(I + N^4)...(I + L), exactly.

    join `powers` multiplies these factors as they stand: radices (2, 2, ...) are Bunch-Hopcroft block doubling (MBH of
    arXiv 2605.21325), (chunk_size,) is Cayley-Hamilton doubling (MCH), (16, 2, 2) the mixed method (MXR). A level of
    radix r is 2 log2(r) products and log2(r) + 1 deep; the first level is free of the products with single tokens, so
    that any radices take 2 log2(n) - 2 products: 6 / 8 / 10 / 12 at n = 16 / 32 / 64 / 128. Depth: the same for radix
    2, log2(n) for (n,). Powers grow like binomials; with radix 2 every register stays within max(beta).

    join `eager` (`eager_level`) takes log2(r) products for the first level and log2(r) + 1 for the others, as many
    deep, and every register stays within max(beta) whatever the radices: the default takes 4 / 6 / 7 / 8 products. A
    level of radix 2 is the same under either.

    radices: powers of two with product chunk_size; None for tiles of 16 and then all of these at once. diagonal:
    `explicit` registers hold I + L, as published, instead of L; the products are the same (join `powers` only). Raises
    QDeltaNetError for radices that do not fit, another join or another diagonal.
    """
    radices = list(radices) if radices is not None else radices_of(chunk_size, TILE, chunk_size)
    _check(chunk_size, radices)
    check_choice("block_merge", "join", join, JOINS)
    check_choice("block_merge", "diagonal", diagonal, DIAGONALS)
    if join == "eager" and diagonal == "explicit":
        raise QDeltaNetError("block_merge: diagonal = 'explicit' needs join = 'powers'")
    steps: list[Step] = []
    bounded = {INPUT, OUTPUT}
    merged = ""  # register of the inverted blocks so far; none while blocks are single tokens
    block = 1
    for radix in radices:
        last = block * radix == chunk_size
        if join == "eager" and radix > 2:
            merged, new = eager_level(block, radix, merged, last)
            limited = {s.out for s in new if not s.is_copy}
        else:
            merged, new, limited = merge_level(block, radix, merged, last, explicit=diagonal == "explicit")
        steps += new
        bounded |= limited
        block *= radix
    options = {"radices": tuple(radices), "join": join, "diagonal": diagonal}
    return Plan("block_merge", chunk_size, tuple(steps), options, frozenset(bounded))


def radices_of(chunk_size: int, first: int, *rest: int) -> list[int]:
    """These radices in order, the last one again and again, each at most what is left to join.

    >>> radices_of(32, 4), radices_of(128, 16, 128)
    ([4, 4, 2], [16, 8])
    """
    wanted, found, left = [*rest[::-1], first], [], chunk_size
    while left > 1:
        found.append(min(wanted.pop() if len(wanted) > 1 else wanted[0], left))
        left //= found[-1]
    return found


def merge_level(
    block: int, radix: int, merged: str, last: bool, explicit: bool = False
) -> tuple[str, list[Step], set[str]]:
    """One level: r blocks of size `block`, inverted in register `merged`, into one. Returns (register, steps, bounded).

    R = (I + N)(I + L) - I, then R <- (I + N^2)(I + R) - I, (I + N^4) ...: the powers of N and the products with R run
    side by side, so a level is log2(r) + 1 products deep. explicit: registers L and R hold I + L and I + R.
    """
    outer = block * radix
    off, doublings = Mask(block, outer), radix.bit_length() - 1
    out = OUTPUT if last else f"L{outer}"
    full = Mask(1, outer, diagonal=explicit)

    def raised(target: str, power: str, register: str) -> Step:
        """(I + power)(I + register), less I unless explicit."""
        addends = ((register, 1),) if explicit else ((power, 1), (register, 1))
        return Step(target, Mask(1, outer) if target == OUTPUT else full, power, register, addends)

    if not merged and radix == 2:
        add = ((IDENTITY, 1),) if explicit and not last else ()
        return out, [Step(out, full if add else Mask(1, outer), INPUT, None, add)], _bounded(out, explicit)
    power = N = f"N{outer}"
    register = N
    steps = [Step(N, off, INPUT)]
    if merged:
        steps = [Step(N, off, merged, INPUT, () if explicit else ((INPUT, 1),))]
        register = out if doublings == 1 else f"R{outer}_1"
        steps.append(raised(register, N, merged))
    elif explicit:
        register = f"R{outer}_1"
        steps.append(Step(register, full, N, None, ((IDENTITY, 1),)))
    for j in range(1, doublings):
        square = f"N{outer}^{2**j}"
        steps.append(Step(square, off, power, power))
        target = out if j == doublings - 1 else f"R{outer}_{2**j}"
        steps.append(raised(target, square, register))
        register, power = target, square
    return out, steps, {N} | _bounded(out, explicit)


def _bounded(out: str, explicit: bool) -> set[str]:
    """A diagonal of ones is beyond max(beta)."""
    return set() if explicit and out != OUTPUT else {out}


def _check(chunk_size: int, radices: Sequence[int]) -> None:
    shape = ", ".join(map(str, radices))
    if any(r < 2 or r & (r - 1) for r in radices) or math.prod(radices) != chunk_size:
        raise QDeltaNetError(
            f"radices ({shape}): need powers of two whose product is the chunk size {chunk_size}, "
            f"e.g. {[2] * (chunk_size.bit_length() - 1)}"
        )

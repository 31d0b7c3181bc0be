"""Eager joins: a level of block merging whose registers all stay within max(beta), one product per doubling."""

from __future__ import annotations

from ..mask import Mask
from ..plan import INPUT, OUTPUT, Step


def eager_level(block: int, radix: int, merged: str, last: bool) -> tuple[str, list[Step]]:
    """Joins r inverted blocks of size b; returns (register, steps). Arguments as `merge_level`.

    A register Q holds, beside the inverses L of its blocks on the diagonal, what is left of them multiplied already:
    Q = L + (I + L) A_off. A doubling from b to 2b takes the pairs N = Q masked to b:2b and multiplies all of the rows,

        Q <- (I + N) Q,

    since (I + N)(I + L) inverts the larger blocks, N^2 = 0, and what stands left of them is multiplied by the same
    factor. From single tokens (b = 1) Q is A itself, so that r tokens take log2(r) products, as many deep; from larger
    blocks one product more, (I + L) A_off. Radix 2 in pairs multiplies late what this multiplies at once: it needs two
    products one after the other for each doubling.

    Entry (i, j) of any Q is -beta_i k_i^T P k_j exp(c_i - c_j) with P the product of (I - beta k k^T) over the tokens
    of i's block that lie between j and i. These are contractions for beta in [0, 2] and unit keys, so |Q_ij| <= beta_i:
    the bound of radix 2 holds for every register whatever the radices.
    """
    outer = block * radix
    full = Mask(1, outer)
    steps: list[Step] = []
    register = INPUT
    if merged:
        off, register = f"A{outer}", f"Q{outer}_{block}"
        steps.append(Step(off, Mask(block, outer), INPUT))
        steps.append(Step(register, full, merged, off, ((off, 1), (merged, 1))))
    while block < outer:
        pairs = f"N{outer}_{2 * block}"
        steps.append(Step(pairs, Mask(block, 2 * block), register))
        done = 2 * block == outer
        out = (OUTPUT if last else f"L{outer}") if done else f"Q{outer}_{2 * block}"
        steps.append(Step(out, full, pairs, register, ((register, 1),)))
        register, block = out, 2 * block
    return register, steps

"""Exact methods as published: points of block merging under the names that they have in the literature."""

from __future__ import annotations

from dataclasses import replace

from ..plan import Plan
from .block_merge import DIAGONALS, Diagonal, block_merge
from .checks import check_block, check_choice


def cayley_hamilton(chunk_size: int, diagonal: Diagonal = "explicit") -> Plan:
    """Cayley-Hamilton doubling: one level of block merging.

    X = I + A, Y = A; then Y <- Y^2, X <- X + X Y, log2(n) - 1 times (MCH of arXiv 2605.21325, with A = -M). 6 / 8 / 10
    / 12 products at n = 16 / 32 / 64 / 128, as in the paper, log2(n) deep. The powers grow like binomials.

    diagonal: as in `block_merge`. Raises QDeltaNetError for another one.
    """
    return _point("cayley_hamilton", chunk_size, chunk_size, diagonal)


def bunch_hopcroft(chunk_size: int, diagonal: Diagonal = "explicit") -> Plan:
    """Bunch-Hopcroft block doubling: block merging with radix 2 throughout.

    X = I; for b = 1, 2, 4 .. n/2: X <- (X_2 A + I) X_1 + X_2, with X_1 and X_2 the first and the second block of size b
    of each pair (MBH of arXiv 2605.21325, with A = -M). 6 / 8 / 10 / 12 products at n = 16 / 32 / 64 / 128, as many
    deep. The paper counts 8 / 10 / 12 / 14, all levels alike; with blocks of one token X is I, and we form no product.

    diagonal: as in `block_merge`. Raises QDeltaNetError for another one.
    """
    return _point("bunch_hopcroft", chunk_size, 2, diagonal)


def mixed(chunk_size: int, leaf: int = 16, diagonal: Diagonal = "explicit") -> Plan:
    """The mixed method: Cayley-Hamilton doubling on leaves, joined in pairs.

    MXR of arXiv 2605.21325: MCH on the diagonal blocks of size `leaf`, then MBH from there on. 6 / 8 / 10 / 12 products
    at n = 16 / 32 / 64 / 128, as in the paper; with leaves of 16, 4 / 6 / 8 / 10 deep.

    leaf: a power of two; a chunk that is smaller is one leaf. diagonal: as in `block_merge`. Raises QDeltaNetError for
    another leaf or diagonal.
    """
    check_block("mixed", "leaf", leaf)
    return _point("mixed", chunk_size, leaf, diagonal, leaf=leaf)


def _point(method: str, chunk_size: int, first: int, diagonal: Diagonal, **options: int) -> Plan:
    """Block merging with one radix and then pairs, under another name."""
    check_choice(method, "diagonal", diagonal, DIAGONALS)
    first = min(first, chunk_size)
    joins = [2] * ((chunk_size // first).bit_length() - 1)
    p = block_merge(chunk_size, [first, *joins], "powers", diagonal)
    return replace(p, method=method, options={**options, "diagonal": diagonal})

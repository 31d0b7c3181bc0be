"""The float reader of plans that end in joins: inverted blocks are merged, in place.

A join is radix 2 of block_merge, the pair of steps N = (I + L) A_off, L' = (I + N)(I + L) - I. In floating point its
registers need no scale of their own: they take the place of the entries of A that they were made of. Eager joins are
the same products in an order that shortens the chain of dependent ones, which a CPU does not feel: they are read as
pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .mask import Mask
from .plan import INPUT, Plan, Step

TILE = 16
MATRICES = 512  # at a time, so that what one step writes the next finds in cache


@lru_cache(maxsize=256)
def head_length(plan: Plan) -> int:
    """Number of steps before the joins that end a plan; all of them if it ends otherwise."""
    n = len(plan.steps)
    if plan.method == "block_merge" and plan.options["join"] == "eager" and n > 1:
        return 1
    if any(s.factor != 1 for s in plan.steps):  # the blocks of a join are taken as they are
        return n
    masks = {INPUT: Mask(1, plan.chunk_size)} | {s.out: s.mask for s in plan.steps}
    while n >= 3 and _is_join(plan.steps[n - 2], plan.steps[n - 1], masks):
        n -= 2
    return n


def _is_join(first: Step, second: Step, masks: dict[str, Mask]) -> bool:
    block, merged = first.mask.inner, first.left
    return (
        first.right is not None
        and first == Step(first.out, Mask(block, 2 * block), merged, INPUT, ((INPUT, 1),))
        and second == Step(second.out, Mask(1, 2 * block), first.out, merged, ((first.out, 1), (merged, 1)))
        and masks[merged] == Mask(1, block)
    )


def diagonal_view(x: Tensor, block: int) -> Tensor:
    """The diagonal blocks of [M, C, C] as a view [M, n, block, block]."""
    n = x.shape[-1] // block
    return x.unflatten(-1, (n, block)).unflatten(-3, (n, block)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def joined(A: Tensor, merged: Tensor | None, block: int) -> Tensor:
    """(I - A)^-1, [M, C, C] with its diagonal, of A [M, C, C] whose diagonal blocks of size `block` are inverted.

    merged: those blocks less I, [M, n, b, b]; None where they are A's own, as in pairs.
    """
    T = torch.zeros_like(A, memory_format=torch.contiguous_format)
    for start in range(0, A.shape[0], MATRICES):
        some = slice(start, start + MATRICES)
        _join(A[some], None if merged is None else merged[some], block, T[some])
    return T


def _join(A: Tensor, merged: Tensor | None, block: int, T: Tensor) -> None:
    """Small blocks are joined in tiles that are gathered once; above that, rows of tiles follow one another, which
    gives the same T with operands that need no gathering."""
    size = A.shape[-1]
    tile = min(size, max(TILE, block))
    tiles = diagonal_view(A, tile).clone(memory_format=torch.contiguous_format).flatten(0, 1)
    if merged is not None:
        diagonal_view(tiles, block).copy_(merged.reshape(-1, tile // block, block, block))
    _join_pairs(tiles, block)
    tiles.diagonal(dim1=-2, dim2=-1).fill_(1)
    diagonal_view(T, tile).copy_(tiles.unflatten(0, (-1, size // tile)))
    for start in range(tile, size, tile):
        rows = slice(start, start + tile)
        T[:, rows, :start] = T[:, rows, rows] @ (A[:, rows, :start] @ T[:, :start, :start])


def _join_pairs(buffer: Tensor, block: int) -> None:
    """(I + L_2) A_21 (I + L_1) for all pairs of neighbouring blocks at once, until one block is left."""
    while block < buffer.shape[-1]:
        pairs = diagonal_view(buffer, 2 * block)
        upper, lower = pairs[..., :block, :block], pairs[..., block:, block:]
        place = pairs[..., block:, :block]
        if block == 2:  # each of the two has one entry
            place[..., 1, :].addcmul_(lower[..., 1, :1], place[..., 0, :])
            place[..., 0].addcmul_(place[..., 1], upper[..., 1, :1])
        else:
            off, first, second = (x.reshape(-1, block, block) for x in (place, lower, upper))
            N = torch.baddbmm(off, first, off)
            place.copy_(torch.baddbmm(N, N, second).view(place.shape))
        block *= 2

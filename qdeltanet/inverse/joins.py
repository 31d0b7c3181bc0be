"""The float reader of plans that end in joins: inverted blocks are merged pairwise, in place.

A join is radix 2 of block_merge, the pair of steps N = (I + L) A_off, L' = (I + N)(I + L) - I. In floating point its
registers need no scale of their own, so L, N and what is left of A share one buffer that starts as A and ends as T.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .plan import INPUT, Mask, Plan, Step

TILE = 16


@lru_cache(maxsize=256)
def head_length(plan: Plan) -> int:
    """Number of steps before the joins that end a plan; all of them if it ends otherwise."""
    n = len(plan.steps)
    masks = {INPUT: Mask(1, plan.chunk_size)} | {s.out: s.mask for s in plan.steps}
    while n >= 3 and _is_join(plan.steps[n - 2], plan.steps[n - 1], masks):
        n -= 2
    return n


def _is_join(first: Step, second: Step, masks: dict[str, Mask]) -> bool:
    block, merged = first.mask.inner, first.left
    return (
        first == Step(first.out, Mask(block, 2 * block), merged, INPUT, ((INPUT, 1),))
        and second == Step(second.out, Mask(1, 2 * block), first.out, merged, ((first.out, 1), (merged, 1)))
        and masks[merged] == Mask(1, block)
    )


def diagonal_view(x: Tensor, block: int) -> Tensor:
    """The diagonal blocks of [M, C, C] as a view [M, n, block, block]."""
    n = x.shape[-1] // block
    return x.unflatten(-1, (n, block)).unflatten(-3, (n, block)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def join_blocks(buffer: Tensor, block: int) -> None:
    """buffer [M, C, C], contiguous: inverted blocks of size `block` on its diagonal, A below them. In place.

    Small blocks are joined in tiles that are gathered once; above that, rows of tiles follow one another, which gives
    the same T with operands that need no gathering.
    """
    size = buffer.shape[-1]
    if block < TILE < size:
        place = diagonal_view(buffer, TILE)
        tiles = place.reshape(-1, TILE, TILE)
        _join_pairs(tiles, block)
        place.copy_(tiles.view(place.shape))
        block = TILE
    if block < TILE:
        _join_pairs(buffer, block)
    else:
        _join_rows(buffer, block)


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


def _join_rows(buffer: Tensor, block: int) -> None:
    """Row i of blocks: (I + L_i) A_i (I + L), with L the inverse of everything above it."""
    for start in range(block, buffer.shape[-1], block):
        stop = start + block
        place = buffer[:, start:stop, :start]
        row = torch.baddbmm(place, place, buffer[:, :start, :start])
        place.copy_(torch.baddbmm(row, buffer[:, start:stop, start:stop], row))

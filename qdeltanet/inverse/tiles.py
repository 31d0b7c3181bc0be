"""Which tiles of a chunk's matrix each step of a plan has to touch: what a matrix unit cannot skip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import IDENTITY, OUTPUT, Plan, Step, constant_masks


@dataclass(frozen=True)
class StepTiles:
    """Numbers of tiles. products: tile products; left, right: tiles read for them; accumulators: tiles they end in.

    stored: tiles that the step's mask leaves; addends: those of them that each summand reaches (the identity is a
    constant and none).
    """

    products: int
    left: int
    right: int
    accumulators: int
    stored: int
    addends: tuple[int, ...]


@lru_cache(maxsize=512)
def step_tiles(plan: Plan, edge: int) -> tuple[StepTiles, ...]:
    """One entry per step for tiles [edge, edge]; copies, T excepted, have zeros.

    A tile counts where it can be non-zero: patterns of entries are carried from register to register, so that N^2 of
    block merging, whose first block diagonal is empty, counts less than N. A tile product counts where both operands'
    tiles do and its place lies within the blocks of the step's mask. A band is applied where the sum is stored, as
    published and as our runners do: it spares the products that read the banded register, not those that make it.
    """
    size = plan.chunk_size
    patterns = {name: mask.matrix(size) > 0 for name, mask in constant_masks(size).items()}
    result = []
    for step in plan.steps:
        tiles, patterns[step.out] = _step(step, patterns, edge)
        result.append(tiles)
    return tuple(result)


def tile_products(plan: Plan, edge: int = 16) -> int:
    """Tile products of the whole plan, on either unit.

    >>> from qdeltanet.inverse import plan
    >>> tile_products(plan("bunch_hopcroft", 64)), tile_products(plan("neumann", 64))
    (40, 132)
    """
    return sum(t.products for t in step_tiles(plan, edge))


def tiled(pattern: Tensor, edge: int) -> Tensor:
    """bool [R, C] -> float32 [ceil(R / edge), ceil(C / edge)], 1 where a tile can be non-zero."""
    rows, columns = pattern.shape
    padded = F.pad(pattern, (0, -columns % edge, 0, -rows % edge))
    return padded.unflatten(0, (-1, edge)).unflatten(2, (-1, edge)).any(3).any(1).float()


def product_tiles(left: Tensor, right: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Tiles {0, 1} [M, K], [K, N], [M, N] of a product -> (tile products, left, right and result tiles touched)."""
    met = torch.einsum("mk,kn,mn->mkn", left, right, out)
    left_met, right_met, out_met = (int(met.amax(axis).sum()) for axis in (2, 0, 1))
    return int(met.sum()), left_met, right_met, out_met


def _step(step: Step, patterns: dict[str, Tensor], edge: int) -> tuple[StepTiles, Tensor]:
    mask = step.mask.matrix(patterns[step.left].shape[0]) > 0
    if step.is_copy:
        kept = patterns[step.left] & mask
        n = int(tiled(kept, edge).sum()) if step.out == OUTPUT else 0  # T is a site of its own: stored like a sum
        return StepTiles(0, 0, 0, 0, n, (n,) if n else ()), kept
    reach = torch.zeros_like(mask)
    counts = (0, 0, 0, 0)
    if step.right is not None:
        left, right = patterns[step.left], patterns[step.right]
        reach = left.float() @ right.float() > 0
        blocks = replace(step.mask, band=None).matrix(mask.shape[0]) > 0
        counts = product_tiles(tiled(left, edge), tiled(right, edge), tiled(blocks, edge))
    for register, _ in step.summands:
        reach = reach | patterns[register]
    kept = reach & mask
    stored = tiled(kept, edge)
    addends = tuple(
        0 if register == IDENTITY else int((tiled(patterns[register], edge) * stored).sum())
        for register, _ in step.summands
    )
    return StepTiles(*counts, stored=int(stored.sum()), addends=addends), kept

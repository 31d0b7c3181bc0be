from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdeltanet.core import IntFormat, Operand, diagonal_blocks, repeat_heads, whole

SCALES = {"none": None, "head": (3, 1, 1), "row": (3, 8, 1), "column": (3, 1, 8), "dynamic row": (2, 3, 8, 1)}


def operand(layout: str, size: int = 8) -> Operand:
    make = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (2, 3, size, size), generator=make).float()
    shape = SCALES[layout]
    scale = None if shape is None else 0.1 + torch.rand(shape, generator=make)
    return Operand("x", codes, scale, None if scale is None else IntFormat(8))


def blocks_of(x: Tensor, b: int) -> Tensor:
    return torch.stack([x[..., i : i + b, i : i + b] for i in range(0, x.shape[-1], b)], dim=-3)


@pytest.mark.parametrize("layout", SCALES)
@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_diagonal_blocks_carry_their_scales(layout: str, block: int) -> None:
    x = operand(layout)
    compact = diagonal_blocks(x, block)
    assert compact.compact
    assert tuple(compact.codes.shape) == (2, 3, 8 // block, block, block)
    assert torch.equal(compact.real(), blocks_of(x.real(), block))
    assert diagonal_blocks(compact, block) is compact


@pytest.mark.parametrize("layout", SCALES)
@pytest.mark.parametrize(("small", "large"), [(2, 4), (2, 8), (4, 8)])
def test_small_blocks_embed_into_large_ones(layout: str, small: int, large: int) -> None:
    x = operand(layout)
    inside = diagonal_blocks(x, small)
    embedded = diagonal_blocks(inside, large)
    mask = torch.block_diag(*[torch.ones(small, small)] * (8 // small))
    assert torch.equal(embedded.real(), blocks_of(x.real() * mask, large))


@pytest.mark.parametrize("layout", SCALES)
def test_one_block_is_the_whole_matrix(layout: str) -> None:
    x = operand(layout)
    again = whole(diagonal_blocks(x, 8))
    assert not again.compact
    assert torch.equal(again.codes, x.codes)
    assert torch.equal(again.real(), x.real())
    assert whole(x) is x


@pytest.mark.parametrize("layout", SCALES)
def test_parts_and_transposes_carry_their_scales(layout: str) -> None:
    x = operand(layout)
    assert torch.equal(x.mT.real(), x.real().mT)
    part = x.part(slice(2, 5), slice(1, 8))
    assert torch.equal(part.real(), x.real()[..., 2:5, 1:8])
    assert torch.equal(x[1].real(), x.real()[1])


def test_key_heads_serve_consecutive_value_heads() -> None:
    x = torch.arange(2.0).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert repeat_heads(x, 4)[0, :, 0, 0].tolist() == [0, 0, 1, 1]
    assert repeat_heads(x, 2) is x
    shared = torch.ones(1, 1, 1)
    assert repeat_heads(shared, 4) is shared

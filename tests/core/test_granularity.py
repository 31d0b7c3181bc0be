from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeltanet.core import TINY, Granularity, IntFormat, Operand, diagonal_blocks, dynamic_scale, fit_scale, grouped

RESOLVED = [g for g in Granularity if g is not Granularity.FINEST]
STATIC = {
    Granularity.PER_TENSOR: lambda h, r, c: (1, 1, 1),
    Granularity.PER_HEAD: lambda h, r, c: (h, 1, 1),
    Granularity.PER_TOKEN: lambda h, r, c: (h, r, 1),
    Granularity.PER_CHANNEL: lambda h, r, c: (h, 1, c),
}


def block_diagonal(blocks: Tensor) -> Tensor:
    """[..., n, b, b] -> [..., n b, n b], by a loop."""
    *lead, n, b, _ = blocks.shape
    full = blocks.new_zeros(*lead, n * b, n * b)
    for i in range(n):
        full[..., i * b : (i + 1) * b, i * b : (i + 1) * b] = blocks[..., i, :, :]
    return full


def slow_static_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest |element| per scale of [..., H, R, C], element by element."""
    h, r, c = x.shape[-3:]
    out = torch.zeros(STATIC[granularity](h, r, c))
    for observation in x.abs().reshape(-1, h, r, c):
        for index in torch.cartesian_prod(torch.arange(h), torch.arange(r), torch.arange(c)).tolist():
            at = tuple(i if size > 1 else 0 for i, size in zip(index, out.shape, strict=True))
            out[at] = max(out[at].item(), observation[tuple(index)].item())
    return out


@given(
    granularity=st.sampled_from(RESOLVED),
    lead=st.sampled_from([(), (2,), (3, 2)]),
    size=st.tuples(*[st.integers(2, 4)] * 3),
)
def test_grouped_shows_every_element_to_its_scale(
    granularity: Granularity, lead: tuple[int, ...], size: tuple[int, int, int]
) -> None:
    x = torch.randn(*lead, *size, generator=torch.Generator().manual_seed(sum(size)))
    view = grouped(x, granularity)
    assert view.dim() == 5
    assert tuple(view.shape[1:4]) == STATIC[granularity](*size)
    assert view.numel() == x.numel()
    assert torch.equal(view.abs().amax((0, -1)), slow_static_amax(x, granularity))


@given(granularity=st.sampled_from(RESOLVED), lead=st.sampled_from([(), (2,), (3, 2)]), n=st.sampled_from([1, 2, 4]))
def test_compact_registers_have_the_scales_of_the_whole_matrix(
    granularity: Granularity, lead: tuple[int, ...], n: int
) -> None:
    blocks = torch.randn(*lead, 3, n, 4, 4, generator=torch.Generator().manual_seed(n))
    whole = block_diagonal(blocks)
    compact = grouped(blocks.abs(), granularity, compact=True).amax((0, -1))
    assert torch.equal(compact, grouped(whole.abs(), granularity).amax((0, -1)))
    # dynamic: the scale that broadcasts against the blocks gives each element the scale it has in the whole matrix
    fine = dynamic_scale(blocks, 127, granularity, compact=True).expand_as(blocks)
    full = dynamic_scale(whole, 127, granularity).expand_as(whole)
    assert torch.equal(fine, diagonal_blocks(Operand("x", full), 4).codes)
    # and so does the static one
    static = compact / 127
    fitted = fit_scale(static, blocks.shape, compact=True).expand_as(blocks)
    assert torch.equal(fitted, diagonal_blocks(Operand("x", static.expand_as(whole)), 4).codes)


@pytest.mark.parametrize("granularity", RESOLVED)
def test_dynamic_scale_keeps_leading_axes(granularity: Granularity) -> None:
    x = torch.randn(5, 2, 3, 4, 6)
    scale = dynamic_scale(x, 7, granularity)
    assert tuple(scale.shape) == (5, 2, *STATIC[granularity](3, 4, 6))
    assert scale.dtype is torch.float32
    for n in range(5):
        for b in range(2):
            assert torch.equal(scale[n, b], slow_static_amax(x[n, b], granularity) / 7)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_zero_tensors_have_a_scale(bits: int) -> None:
    qmax = IntFormat(bits).qmax
    scale = dynamic_scale(torch.zeros(2, 3, 3), qmax, Granularity.PER_HEAD)
    assert torch.equal(scale, torch.full((2, 1, 1), TINY) / qmax)


def test_finest_has_to_be_resolved_first() -> None:
    with pytest.raises(ValueError, match="finest must be resolved"):
        dynamic_scale(torch.ones(1, 2, 2), 7, Granularity.FINEST)
    with pytest.raises(ValueError, match="finest must be resolved"):
        grouped(torch.ones(1, 2, 2), Granularity.FINEST)


def test_a_shorter_chunk_takes_the_largest_of_the_scales() -> None:
    scale = torch.tensor([[[1.0], [4.0], [2.0]]])
    assert fit_scale(scale, (2, 1, 1, 8)).tolist() == [[[4.0]]]
    assert fit_scale(scale, (2, 1, 3, 8)) is scale
    assert fit_scale(scale.mT, (1, 8, 1)).tolist() == [[[4.0]]]

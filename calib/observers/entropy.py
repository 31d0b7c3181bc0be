"""The range of least Kullback-Leibler divergence, from exact counts of |x|."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import TINY
from .clipping import HistogramObserver
from .histogram import lower_edge

OCTAVES = 5  # the largest, in which cells are bins: 128 an octave
LINEAR = 128  # cells of one width below
CELLS = LINEAR + OCTAVES * 128
LEAST = torch.finfo(torch.float64).tiny
FINER = 4096  # codes beyond this are finer than the finest cell


class KlObserver(HistogramObserver):
    """The clip whose quantized distribution has the least Kullback-Leibler divergence from what was seen ("entropy").

    As TensorRT's calibration (S. Migacz, "8-bit inference with TensorRT", 2017), whose 2048 equal bins are here cells
    of 2^-11 of the maximum's power of two up to a 16th of that, and bins of 7 bits of mantissa above. P counts the
    cells within the clip, what lies beyond in the last of them; Q is the count of each code (of P without that
    addition), spread by width over those cells of the code that hold anything; both normalised. Zeros, which every
    scale keeps, are left out. Tried are the maximum and every fourth upper edge (3% apart) down to a 16th of it; of
    equals the widest. Codes finer than cells (INT14 to INT16) have nothing to lose and keep the maximum. qmax: of the
    codes. Raises QDeltaNetError for more than 8192 scales.
    """

    TRIED, STRIDE = 4 * 128, 4

    def __init__(self, qmax: int) -> None:
        super().__init__()
        self.qmax = qmax

    def _proposed(self, first: int, top: Tensor, counts: Tensor, zeros: Tensor) -> Tensor:
        if self.qmax >= FINER:
            return top
        cells = Cells.of(first, top, counts)
        last = (top.view(torch.int32) >> self.SHIFT).long()
        best, least = top, torch.full(top.shape, float("inf"), dtype=torch.float64, device=top.device)
        for beyond in range(0, self.TRIED, self.STRIDE):
            clip = lower_edge(last - beyond + 1) if beyond else top
            loss = cells.divergence(CELLS - beyond, clip, self.qmax)
            better = loss < least
            best, least = torch.where(better, clip, best), torch.where(better, loss, least)
        return torch.where(top > TINY, best, top)


@dataclass(frozen=True)
class Cells:
    """All float64. middles [scales, CELLS]; sums from the left, [scales, CELLS + 1]: counts; width, of the cells that
    hold anything; entropy, of n log(n / width)."""

    middles: Tensor
    counts: Tensor
    width: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, first: int, top: Tensor, counts: Tensor) -> Cells:
        """counts: of the bins from `first` on, [scales, bins]."""
        held, edges = _cells(first, top, counts)
        width = edges.diff(dim=1)
        parts = held, width * (held > 0), torch.xlogy(held, held / width.clamp(min=LEAST))
        return cls((edges[:, 1:] + edges[:, :-1]) / 2, *(F.pad(x.cumsum(1), (1, 0)) for x in parts))

    def divergence(self, inside: int, clip: Tensor, qmax: int) -> Tensor:
        """KL(P | Q) in nats per scale, for a clip [scales] at the end of the cell before `inside`.

        With n of a cell, N and W of the cells of its code, M within the clip of L altogether:
        L KL = sum n (log(n / width) - log(N / W)) + L log(M / L), and what lies beyond changes n of the last cell.
        """
        borders = (torch.arange(qmax, device=clip.device) + 0.5) * (clip.double()[:, None] / qmax)
        cuts = torch.searchsorted(self.middles[:, :inside].contiguous(), borders, right=True)
        ends = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=inside)
        n, width = (x.gather(1, ends).diff(dim=1) for x in (self.counts, self.width))
        density = n / width.clamp(min=LEAST)
        total, within = self.counts[:, -1], self.counts[:, inside]
        loss = self.entropy[:, inside] - torch.xlogy(n, density).sum(1) + total * (within / total).log()
        beyond, held = total - within, within - self.counts[:, inside - 1]
        own = self.width[:, inside] - self.width[:, inside - 1]
        last = density.gather(1, (cuts < inside).sum(1, keepdim=True))[:, 0]
        moved = torch.xlogy(held + beyond, (held + beyond) / own) - torch.xlogy(held, held / own) - beyond * last.log()
        loss = torch.where(beyond > 0, loss + moved, loss) / total
        return torch.where((beyond > 0) & (held == 0), float("inf"), loss)


def _cells(first: int, top: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [scales, CELLS] and edges [scales, CELLS + 1] of each scale's cells, float64; the last holds its maximum.

    counts: of the bins from `first` on, [scales, bins]. Cells below the first have no width and hold nothing.
    """
    last = (top.view(torch.int32) >> 16).long()[:, None]
    start = ((last >> 7) - OCTAVES + 1) << 7  # the lowest bin that is a cell
    width = _edge(start) / LINEAR
    end = LINEAR + last - start
    bins = first + torch.arange(counts.shape[1], device=top.device)
    cell = torch.where(bins >= start, LINEAR + bins - start, (_edge(bins) / width).long())
    column = (cell - end + CELLS - 1).clamp(max=CELLS - 1)  # other scales may have seen larger values
    held = torch.zeros(len(top), CELLS, dtype=torch.float64, device=top.device)
    held.scatter_add_(1, column, counts.double())
    cells = end + torch.arange(1 - CELLS, 2, device=top.device)
    edges = torch.where(cells >= LINEAR, _edge(start + cells - LINEAR), cells.clamp(min=0) * width)
    return held, edges


def _edge(bins: Tensor) -> Tensor:
    """Least value of each bin of shift 16 in float64, as if float32 had no least exponent."""
    return torch.ldexp(1 + (bins & 127).double() / 128, (bins >> 7).double() - 127)

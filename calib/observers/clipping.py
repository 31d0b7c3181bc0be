"""Observers that may clip the tail: they propose a range from exact counts of |x|."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core import TINY
from .histogram import Histogram
from .minmax import MinMaxObserver

BLOCK = 2**21  # counts that are looked at together


class HistogramObserver:
    """The true maximum and a histogram. A kind of observer says how they make a range."""

    SHIFT = 16

    def __init__(self) -> None:
        self._max = MinMaxObserver()
        self._histogram = Histogram(self.SHIFT)

    def update(self, groups: Tensor) -> Tensor:
        top = self._max.update(groups)
        self._histogram.update(groups, top)
        return top

    def state(self) -> dict[str, Tensor]:
        return self._max.state() | self._histogram.state()

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self._max.merge(state)
        self._histogram.merge(state)

    def amax(self) -> Tensor:
        top = self._max.amax()
        first, counts, zeros = self._histogram.rows()
        if not counts.shape[1]:  # nothing but zeros
            return top
        rows = max(1, BLOCK // max(counts.shape[1], 2048))
        blocks = zip(top.flatten().split(rows), counts.split(rows), zeros.split(rows), strict=True)
        return torch.cat([self._proposed(first, *block) for block in blocks]).view(top.shape)

    def _proposed(self, first: int, top: Tensor, counts: Tensor, zeros: Tensor) -> Tensor:
        """Ranges [scales] from maxima [scales], counts [scales, bins] of the bins from `first` on, zeros [scales]."""
        raise NotImplementedError


class PercentileObserver(HistogramObserver):
    """A percentile of |x| over everything that one scale covers.

    The proposal is the upper edge of the bin that the percentile falls into (at most 0.8% above it), and the true
    maximum for 100. Raises QDeltaNetError for more than 8192 scales.
    """

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def _proposed(self, first: int, top: Tensor, counts: Tensor, zeros: Tensor) -> Tensor:
        reached = torch.cat([zeros[:, None], counts], 1).cumsum(1)
        wanted = torch.ceil(reached[:, -1:].double() * self.percentile / 100).long().clamp(min=1)
        index = (reached < wanted).sum(1)
        bins = torch.where(index > 0, index - 1 + first, 0)
        edge = (((bins + 1) << self.SHIFT) - 1).to(torch.int32).view(torch.float32)
        return torch.minimum(edge, top)


class MseObserver(HistogramObserver):
    """The range whose codes lie nearest to what was seen: clipping the tail may round the rest more finely.

    Minimises the mean square of x - s clamp(round(x / s)) over s = ratio * max / qmax, from counts in logarithmic bins
    3% wide between 2^-32 and 2^24, each taken at its middle. qmax: of the codes. Raises QDeltaNetError for more than
    32768 scales.
    """

    SHIFT = 18  # 5 bits of the mantissa
    LOWEST, BINS = (127 - 32) << 5, (24 + 32) << 5
    RATIOS = tuple(0.02 * i for i in range(10, 51))

    def __init__(self, qmax: int) -> None:
        super().__init__()
        self.qmax = qmax

    def _proposed(self, first: int, top: Tensor, counts: Tensor, zeros: Tensor) -> Tensor:
        counts = self._in_range(first, counts, zeros)
        bins = torch.arange(self.BINS, device=top.device) + self.LOWEST
        middles = ((bins << self.SHIFT) + (1 << (self.SHIFT - 1))).to(torch.int32).view(torch.float32)
        best, least = top, torch.full_like(top, float("inf"))
        for ratio in reversed(self.RATIOS):  # of equals the widest
            error = self._error(middles, counts, ratio * top)
            best, least = torch.where(error < least, ratio * top, best), torch.minimum(error, least)
        return best

    def _in_range(self, first: int, counts: Tensor, zeros: Tensor) -> Tensor:
        """[scales, BINS]: what lies beyond LOWEST or the last bin is counted there."""
        held = counts.new_zeros(len(counts), self.BINS)
        bins = torch.arange(counts.shape[1], device=counts.device) + (first - self.LOWEST)
        held.index_add_(1, bins.clamp(0, self.BINS - 1), counts)
        held[:, 0] += zeros
        return held

    def _error(self, middles: Tensor, counts: Tensor, amax: Tensor) -> Tensor:
        """Sum of squared differences per scale, [scales]."""
        scale = amax.clamp(min=TINY)[:, None] / self.qmax
        codes = torch.round(middles / scale).clamp(max=self.qmax)
        return ((middles - codes * scale).square() * counts).sum(-1)

"""Observers see a site's tensors and propose a range per scale.

They always get `[observations, *scale shape, group]` (core.grouped), so min-max is one amax for every granularity.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core import TINY, Granularity, QDeltaNetError, unknown

BINS = 2**15  # the top 16 bits of |x| as float32: no range has to be known, and the sign bit is 0


class Observer(Protocol):
    """`update` with observations, then `amax` proposes the largest magnitude that the scale has to hold."""

    def update(self, groups: Tensor) -> None:
        """groups: [observations, h, r, c, group]."""
        ...

    def amax(self) -> Tensor:
        """[h, r, c] float32."""
        ...


class MinMaxObserver:
    """The largest |x| ever seen: nothing clips on the calibration set. Batches are never averaged."""

    def __init__(self) -> None:
        self._amax: Tensor | None = None

    def update(self, groups: Tensor) -> None:
        top = groups.abs().amax(dim=(0, -1))
        self._amax = top if self._amax is None else torch.maximum(self._amax, top)

    def amax(self) -> Tensor:
        if self._amax is None:
            raise QDeltaNetError("nothing was observed: the calibration set is empty")
        return self._amax


class _Counts:
    """Exact counts of |x| per scale in logarithmic bins: the top bits of its float32 pattern, `lowest` and below in the
    first of `bins`, what lies beyond in the last."""

    def __init__(self, shift: int, lowest: int, bins: int) -> None:
        self.shift, self.lowest, self.bins = shift, lowest, bins
        self._counts: Tensor | None = None

    def update(self, groups: Tensor) -> None:
        shape = groups.shape[1:-1]
        n = shape.numel()
        values = groups.movedim(-1, 1).reshape(-1, n).abs().to(torch.float32).contiguous()
        index = ((values.view(torch.int32) >> self.shift) - self.lowest).clamp(0, self.bins - 1)
        flat = (index.long() + torch.arange(n, device=index.device) * self.bins).flatten()
        counts = torch.bincount(flat, minlength=n * self.bins).view(*shape, self.bins)
        self._counts = counts if self._counts is None else self._counts + counts

    @property
    def counts(self) -> Tensor:
        """[h, r, c, bins] int64."""
        assert self._counts is not None
        return self._counts


class PercentileObserver:
    """A percentile of |x| over everything that one scale covers, from exact counts in logarithmic bins.

    The proposal is the upper edge of the bin that the percentile falls into (at most 0.8% above it), and the true
    maximum for 100. Raises QDeltaNetError if more than 4096 scales would each need a histogram.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self._histogram = _Counts(16, 0, BINS)
        self._max = MinMaxObserver()

    def update(self, groups: Tensor) -> None:
        self._max.update(groups)
        if groups.shape[1:-1].numel() > 4096:
            raise QDeltaNetError(
                "the percentile observer needs per_tensor or per_head scales; use observer.kind=minmax or mse"
            )
        self._histogram.update(groups)

    def amax(self) -> Tensor:
        top = self._max.amax()
        counts = self._histogram.counts
        total = counts.sum(-1, keepdim=True)
        wanted = torch.ceil(total.double() * self.percentile / 100).long().clamp(min=1)
        index = (counts.cumsum(-1) < wanted).sum(-1)
        edge = (((index + 1) << 16) - 1).to(torch.int32).view(torch.float32)
        return torch.minimum(edge, top)


class MseObserver:
    """The range whose codes lie nearest to what was seen: clipping the tail may round the rest more finely.

    Minimises the mean square of x - s clamp(round(x / s)) over s = ratio * max / qmax, from counts in logarithmic bins
    3% wide between 2^-32 and 2^24, each taken at its middle. qmax: of the codes.
    """

    SHIFT = 18  # 5 bits of the mantissa
    LOWEST, BINS = (127 - 32) << 5, (24 + 32) << 5
    RATIOS = tuple(0.02 * i for i in range(10, 51))

    def __init__(self, qmax: int) -> None:
        self.qmax = qmax
        self._histogram = _Counts(self.SHIFT, self.LOWEST, self.BINS)
        self._max = MinMaxObserver()

    def update(self, groups: Tensor) -> None:
        self._max.update(groups)
        self._histogram.update(groups)

    def amax(self) -> Tensor:
        top = self._max.amax()
        edges = (torch.arange(self.BINS, device=top.device) + self.LOWEST) << self.SHIFT
        middles = (edges + (1 << (self.SHIFT - 1))).to(torch.int32).view(torch.float32)
        best, least = top, torch.full_like(top, float("inf"))
        for ratio in reversed(self.RATIOS):  # of equals the widest
            error = self._error(middles, ratio * top)
            best, least = torch.where(error < least, ratio * top, best), torch.minimum(error, least)
        return best

    def _error(self, middles: Tensor, amax: Tensor) -> Tensor:
        """Sum of squared differences per scale, [h, r, c]."""
        scale = amax.clamp(min=TINY)[..., None] / self.qmax
        codes = torch.round(middles / scale).clamp(max=self.qmax)
        return ((middles - codes * scale).square() * self._histogram.counts).sum(-1)


def make_observer(kind: str, percentile: float, qmax: int) -> Observer:
    """qmax: of the codes that the range is for. Raises QDeltaNetError for an unknown kind."""
    if kind == "minmax":
        return MinMaxObserver()
    if kind == "percentile":
        return PercentileObserver(percentile)
    if kind == "mse":
        return MseObserver(qmax)
    raise unknown("observer", kind, ("minmax", "percentile", "mse"))


Key = tuple[str, Granularity]

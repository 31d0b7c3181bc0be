"""Exact counts of |x| in logarithmic bins: mergeable to the bit, in bounded memory, with no range known beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core import QDeltaNetError

COUNTS = 2**24  # of one observer at most: 64 MiB, or 128 where a count may pass 2^31
OCTAVES = 16  # that a histogram spans at least: the range of INT16


class Histogram:
    """Counts of |x| per scale. Bin b holds the values whose float32 pattern, without its sign, is b after `shift`.

    shift: 16 keeps 7 bits of the mantissa (128 bins an octave, 0.8% wide), 18 keeps 5. Held is the window of bins that
    occurred in any scale, and of those the largest COUNTS / scales; what lies below goes into the lowest of them. Zeros
    (bin 0: below 2^-133) are counted apart. Counts, window and lowest bin depend on what was seen and not on its order
    or its division, since both the union of windows and that floor are maxima or minima of bins.

    Raises QDeltaNetError for so many scales that OCTAVES would not fit: 8192 with shift 16, 32768 with 18.
    """

    def __init__(self, shift: int = 16) -> None:
        self.shift = shift
        self._shape = torch.Size()
        self._seen = 0  # values per scale
        self._first, self._width = 1, 0  # bins _first .. _first + _width - 1; the column behind them counts zeros
        self._counts = torch.zeros(0, 1, dtype=torch.int32)

    def update(self, groups: Tensor, top: Tensor) -> None:
        """groups: [observations, h, r, c, group]. top: their largest |x|, [h, r, c]."""
        self._begin(groups.shape[1:-1], groups.device, groups.shape[0] * groups.shape[-1])
        bins = self._less_one(groups)  # bin - 1, and zeros beyond all
        high = int(top.amax().view(torch.int32)) >> self.shift
        if high:
            self._cover(int(bins.amin()) + 1, high)
        bins.clamp_(self._first - 1, self._first - 1 + self._width)
        scales = torch.arange(self._shape.numel(), device=bins.device, dtype=torch.int32).view(self._shape)
        bins.add_((scales * (self._width + 1) - (self._first - 1)).unsqueeze(-1))
        index = _flat(bins).long()
        one = torch.ones((), dtype=self._counts.dtype, device=bins.device)
        self._counts.view(-1).scatter_add_(0, index, one.expand_as(index))

    def _less_one(self, x: Tensor) -> Tensor:
        """Bin - 1, int32; 2^(31 - shift) - 1 for bin 0."""
        bins = x.to(torch.float32).view(torch.int32) >> self.shift
        return bins.sub_(1).bitwise_and_((1 << (31 - self.shift)) - 1)

    def _begin(self, shape: torch.Size, device: torch.device, seen: int) -> None:
        """Room for `seen` more values per scale."""
        if not self._seen:
            most = COUNTS // (OCTAVES << (23 - self.shift))
            if shape.numel() > most:
                raise QDeltaNetError(
                    f"{shape.numel()} scales of one site are more histograms than the {most} that fit into memory; "
                    "use observer.kind=minmax there, or granularity: per_head"
                )
            self._shape = shape
            self._counts = torch.zeros(shape.numel(), 1, dtype=torch.int32)
        self._counts = self._counts.to(device)
        self._seen += seen
        if self._seen > torch.iinfo(torch.int32).max:
            self._counts = self._counts.long()

    def _cover(self, low: int, high: int) -> None:
        """Widen the window by bins low .. high."""
        if self._width:
            low, high = min(low, self._first), max(high, self._first + self._width - 1)
        low = max(low, high - COUNTS // len(self._counts) + 1)
        if (low, high - low + 1) == (self._first, self._width):
            return
        old, first = self._counts, self._first
        self._first, self._width = low, high - low + 1
        self._counts = old.new_zeros(len(old), self._width + 1)
        self._add(first, old[:, :-1], old[:, -1])

    def _add(self, first: int, counts: Tensor, zeros: Tensor) -> None:
        """Counts of the bins from `first` on, [scales, bins], of which none lies beyond the window."""
        below = min(max(self._first - first, 0), counts.shape[1])
        start = max(first - self._first, 0)
        self._counts[:, start : start + counts.shape[1] - below] += counts[:, below:]
        if below:
            self._counts[:, 0] += counts[:, :below].sum(1)
        self._counts[:, -1] += zeros

    def state(self) -> dict[str, Tensor]:
        """counts [h, r, c, bins] and zeros [h, r, c], int32 while they fit; first, the lowest bin, int64 []."""
        if not self._seen:
            return {}
        counts = self._counts.cpu().view(*self._shape, -1)
        first = torch.tensor(self._first if self._width else 0)
        return {"counts": counts[..., :-1].contiguous(), "zeros": counts[..., -1].contiguous(), "first": first}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the counts of a `state()` with the same scales."""
        if not state:
            return
        counts, zeros, first = state["counts"], state["zeros"], int(state["first"])
        device = self._counts.device if self._seen else counts.device
        rows = zeros.numel()
        counts, zeros = counts.to(device).view(rows, counts.shape[-1]), zeros.to(device).view(rows)
        self._begin(state["zeros"].shape, device, int(counts[0].sum()) + int(zeros[0]))
        if counts.shape[1]:
            self._cover(first, first + counts.shape[1] - 1)
        self._add(first, counts, zeros)

    def rows(self) -> tuple[int, Tensor, Tensor]:
        """Number of the lowest bin, counts [scales, bins] and zeros [scales]."""
        return self._first, self._counts[:, :-1], self._counts[:, -1]


def _flat(x: Tensor) -> Tensor:
    """All elements in the order in which they lie in memory: a view where x has no gaps."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


def lower_edge(bins: Tensor, shift: int = 16) -> Tensor:
    """Least value of each bin, float32."""
    return (bins << shift).to(torch.int32).view(torch.float32)

"""Observers see a site's tensors and propose a range per scale.

They always get `[observations, *scale shape, group]` (core.grouped), so min-max is one amax for every granularity.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core import Granularity, QDeltaNetError, unknown

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


class PercentileObserver:
    """A percentile of |x| over everything that one scale covers, from exact counts in logarithmic bins.

    The proposal is the upper edge of the bin that the percentile falls into (at most 0.8% above it), and the true
    maximum for 100. Raises QDeltaNetError if more than 4096 scales would each need a histogram.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self._counts: Tensor | None = None
        self._max = MinMaxObserver()

    def update(self, groups: Tensor) -> None:
        self._max.update(groups)
        shape = groups.shape[1:-1]
        n = shape.numel()
        if n > 4096:
            raise QDeltaNetError(
                "the percentile observer needs per_tensor or per_head scales; use observer.kind=minmax"
            )
        values = groups.movedim(-1, 1).reshape(-1, n).abs().to(torch.float32).contiguous()
        bins = values.view(torch.int32) >> 16
        flat = (bins.long() + torch.arange(n, device=bins.device) * BINS).flatten()
        counts = torch.bincount(flat, minlength=n * BINS).view(*shape, BINS)
        self._counts = counts if self._counts is None else self._counts + counts

    def amax(self) -> Tensor:
        top = self._max.amax()
        assert self._counts is not None
        total = self._counts.sum(-1, keepdim=True)
        wanted = torch.ceil(total.double() * self.percentile / 100).long().clamp(min=1)
        index = (self._counts.cumsum(-1) < wanted).sum(-1)
        edge = (((index + 1) << 16) - 1).to(torch.int32).view(torch.float32)
        return torch.minimum(edge, top)


def make_observer(kind: str, percentile: float) -> Observer:
    """Raises QDeltaNetError for an unknown kind."""
    if kind == "minmax":
        return MinMaxObserver()
    if kind == "percentile":
        return PercentileObserver(percentile)
    raise unknown("observer", kind, ("minmax", "percentile"))


Key = tuple[str, Granularity]

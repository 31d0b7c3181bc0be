"""Observers see a site's tensors and propose a range per scale.

They always get `[observations, *scale shape, group]` (core.grouped), so min-max is one amax for every granularity. They
keep integer counts and maxima only: any division of the data among observers, merged in any order, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ...core import Granularity, unknown
from .clipping import MseObserver, PercentileObserver
from .entropy import KlObserver
from .minmax import MinMaxObserver, largest

__all__ = [
    "Key",
    "KlObserver",
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "largest",
    "make_observer",
]

Key = tuple[str, Granularity]


class Observer(Protocol):
    """`update` with observations, then `amax` proposes the largest magnitude that the scale has to hold."""

    def update(self, groups: Tensor) -> Tensor:
        """groups: [observations, h, r, c, group]. Returns their own largest |x|, float32 [h, r, c], NaN if any is."""
        ...

    def amax(self) -> Tensor:
        """[h, r, c] float32. Raises QDeltaNetError if nothing was observed."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything seen, as contiguous tensors on the CPU; empty if that is nothing."""
        ...

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what another observer of the same kind saw: a `state()`. Raises QDeltaNetError for other scales."""
        ...


def make_observer(kind: str, percentile: float, qmax: int) -> Observer:
    """qmax: of the codes that the range is for. Raises QDeltaNetError for an unknown kind."""
    if kind == "minmax":
        return MinMaxObserver()
    if kind == "percentile":
        return PercentileObserver(percentile)
    if kind == "mse":
        return MseObserver(qmax)
    if kind == "kl":
        return KlObserver(qmax)
    raise unknown("observer", kind, ("minmax", "percentile", "mse", "kl"))

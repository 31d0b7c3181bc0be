"""The largest magnitude ever seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core import QDeltaNetError


def largest(groups: Tensor) -> Tensor:
    """max |x| per scale, float32 [h, r, c]; NaN or infinity where there is one. groups: [observations, h, r, c, group].

    Two reductions and no copy: on a CPU |x| would be written out first, and reducing both axes at once is 50 times
    slower where the group is not the axis that lies together in memory.
    """
    top = torch.maximum(groups.amax(-1), -groups.amin(-1)).amax(0)
    return top.abs().to(torch.float32)  # the sign of a zero goes


class MinMaxObserver:
    """The largest |x| ever seen: nothing clips on the calibration set. Batches are never averaged."""

    def __init__(self) -> None:
        self._amax: Tensor | None = None

    def update(self, groups: Tensor) -> Tensor:
        top = largest(groups)
        self._take(top)
        return top

    def _take(self, top: Tensor) -> None:
        self._amax = top if self._amax is None else torch.maximum(self._amax.to(top.device), top)

    def amax(self) -> Tensor:
        if self._amax is None:
            raise QDeltaNetError("nothing was observed: the calibration set is empty")
        return self._amax

    def state(self) -> dict[str, Tensor]:
        return {} if self._amax is None else {"amax": self._amax.cpu().contiguous()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        top = state["amax"]
        if self._amax is not None:
            top = top.to(self._amax.device)
            if top.shape != self._amax.shape:
                raise QDeltaNetError(
                    f"an observer of {list(self._amax.shape)} scales cannot merge a state of {list(top.shape)}: "
                    "it is another recipe's or another model's"
                )
        self._take(top)

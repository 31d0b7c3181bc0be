"""Static scales of a layer as buffers, so that they travel in its state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose float buffers follow the model to another device, but never to another dtype.

    `model.to(torch.bfloat16)` would otherwise round every scale.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != torch.float32:
                self._buffers[name] = old.to(new.device)
        return self


class Scales(Float32Buffers):
    """Buffers by site: `scales.q`, `scales.inverse.L16`, `scales.state/right`; float32 [H or 1, R or 1, C or 1]."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.keys = tuple(shapes)
        for key, shape in shapes.items():
            holder, name = self._holder(key)
            holder.register_buffer(name, torch.ones(shape, dtype=torch.float32))

    def _holder(self, key: str) -> tuple[nn.Module, str]:
        if not key.startswith("inverse."):
            return self, key
        if not hasattr(self, "inverse"):
            self.inverse = Float32Buffers()
        return self.inverse, key.removeprefix("inverse.")

    def fill(self, scales: Mapping[str, Tensor]) -> None:
        """Take values (and shapes) from a calibration."""
        for key in self.keys:
            holder, name = self._holder(key)
            old = holder.get_buffer(name)
            setattr(holder, name, scales[key].to(old.device, torch.float32))

    def as_dict(self) -> dict[str, Tensor]:
        return dict(self.items())

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.keys:
            holder, name = self._holder(key)
            yield key, holder.get_buffer(name)

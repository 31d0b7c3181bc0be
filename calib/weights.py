"""Weights that are coded for their inputs: the Hessians of GPTQ, summed exactly."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import NonFiniteError, QDeltaNetError
from ..models import QuantizedLayer, materialised
from ..nn import QuantLinear, gptq_weight

BIN = 16  # binary orders of magnitude
BITS = 44  # of the largest entry of a batch; int64 then holds 2^19 batches


class Hessians:
    """X^T X of the inputs of every projection of a decoder layer that GPTQ codes.

    The product of a batch (float32) is rounded to whole numbers of a unit that the batch alone decides: 2^-44 of the
    power of 2^16 above its largest entry. What has one unit is added in int64, so that the sums are the same to the bit
    for any order of batches and any number of processes. Projections that are given the same tensor (q, k and v; gate
    and up) share one sum. Memory: 8 bytes per pair of input channels and sum, seldom two units of it.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        self.projections = {n: p for n, p in layer.projections.items() if p.scheme.method == "gptq"}
        self.index, self.prefix = layer.index, layer.prefix
        self._first: dict[str, str] = {}  # of those that share a sum, the first to be called
        self._sums: dict[str, dict[int, Tensor]] = {}  # by it, then by the exponent of the unit
        self._last: tuple[str, weakref.ref[Tensor]] | None = None  # a layer's inputs are not to be kept for a pass

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        """Nothing: the rule has no weights."""

    def projection(self, name: str, x: Tensor) -> None:
        """Called with the inputs [..., in] of a projection. Raises NonFiniteError for NaN or infinity."""
        if name not in self.projections:
            return
        if self._last is not None and self._last[1]() is x:
            self._first[name] = self._last[0]
            return
        self._first[name], self._last = name, (name, weakref.ref(x))
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._add(name, (rows.T @ rows).double())

    def _add(self, name: str, product: Tensor) -> None:
        largest = float(product.diagonal().max())
        if not math.isfinite(largest):
            raise NonFiniteError(name, f"layer {self.index}, ")
        exponent = -BITS + BIN * math.ceil(math.frexp(largest)[1] / BIN)
        codes = torch.round(product * 2.0**-exponent).long()
        self._sum(name, exponent, codes)

    def _sum(self, name: str, exponent: int, codes: Tensor) -> None:
        units = self._sums.setdefault(name, {})
        units[exponent] = codes + units[exponent].to(codes.device) if exponent in units else codes

    def state(self) -> dict[str, Any]:
        """`sharing`: the projections of each sum; `<the first of them>@<exponent>`: int64 [in, in]."""
        sums = {f"{n}@{e}": x.cpu() for n, units in self._sums.items() for e, x in units.items()}
        return {"sharing": dict(self._first), **sums}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what other ones of this layer saw."""
        self._first |= state.get("sharing", {})
        for key, codes in state.items():
            name, _, exponent = key.rpartition("@")
            if name:
                self._sum(name, int(exponent), codes)

    def hessian(self, name: str) -> Tensor:
        """float64 [in, in]. Raises QDeltaNetError if the projection was never called."""
        if name not in self._first:
            raise QDeltaNetError(f"{self.prefix}{name}: no input reached it, so method gptq cannot code it; use mse")
        units = self._sums[self._first[name]]
        total = sum(units[e].double() * 2.0**e for e in sorted(units))
        assert isinstance(total, Tensor)
        return (total + total.T) / 2  # a product need not be symmetric in its last bit

    def weights(self) -> dict[str, Tensor]:
        """Codes and scales by `layers.<i>.<projection>.codes` and `.scale`."""
        result: dict[str, Tensor] = {}
        for name, projection in self.projections.items():
            codes, scale = _coded(projection, self.hessian(name))
            result |= {f"{self.prefix}{name}.codes": codes.cpu(), f"{self.prefix}{name}.scale": scale.cpu()}
        return result


def _coded(projection: QuantLinear, hessian: Tensor) -> tuple[Tensor, Tensor]:
    original, scheme = projection.original, projection.scheme
    assert original is not None
    with materialised(original):
        return gptq_weight(original.weight, hessian, scheme.weight, scheme.group)

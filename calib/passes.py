"""The passes of a calibration: what watches each decoder layer over all batches, and what is made of it at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..models import QuantizedLayer
from ..recipe import Recipe
from .quality import Quality
from .ranges import LayerRanges
from .session import Summing
from .weights import Hessians

Layers = Mapping[int, QuantizedLayer]


class Watcher(Protocol):
    """What is shown the inside of one decoder layer."""

    def site(self, site: str, x: Tensor, compact: bool) -> None: ...

    def projection(self, name: str, x: Tensor) -> None: ...


class SummingWatcher(Watcher, Summing, Protocol):
    """One whose sums do not depend on the order of batches, nor on which process saw them."""


@dataclass
class Made:
    """What the passes make. scales, weights: as Calibration has them. layers: their part of the report, by layer
    index."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)


class Pass(Protocol):
    """One run over all batches. It may build on what the passes before it made, or put into the layers."""

    name: str  # of its state files

    def watchers(self, layers: Layers) -> Mapping[int, SummingWatcher]:
        """Fresh ones by layer index, for all layers of which this pass wants to know."""
        ...

    def finish(self, layers: Layers, watchers: Mapping[int, SummingWatcher], made: Made) -> None:
        """Called once, with watchers that saw every batch."""
        ...


class RangesPass:
    """Static scales; they stand in the layers afterwards."""

    name = "ranges"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def watchers(self, layers: Layers) -> Mapping[int, LayerRanges]:
        return {index: LayerRanges(layer, self.recipe) for index, layer in layers.items()}

    def finish(self, layers: Layers, watchers: Mapping[int, Any], made: Made) -> None:
        for index, layer in layers.items():
            made.scales |= watchers[index].scales()
            fill_scales(layer, made.scales)


class QualityPass:
    """What each scale costs, for the report."""

    name = "quality"

    def watchers(self, layers: Layers) -> Mapping[int, Quality]:
        return {index: Quality(x.delta_net) for index, x in layers.items() if x.delta_net is not None}

    def finish(self, layers: Layers, watchers: Mapping[int, Any], made: Made) -> None:
        made.layers |= {str(index): watcher.report() for index, watcher in watchers.items()}


class GptqPass:
    """Codes of the projections whose method is gptq. Their inputs are those of the float model."""

    name = "gptq"

    def watchers(self, layers: Layers) -> Mapping[int, Hessians]:
        found = {index: Hessians(layer) for index, layer in layers.items()}
        return {index: watcher for index, watcher in found.items() if watcher.projections}

    def finish(self, layers: Layers, watchers: Mapping[int, Any], made: Made) -> None:
        for watcher in watchers.values():
            made.weights |= watcher.weights()


def passes(recipe: Recipe) -> list[Pass]:
    """In the order in which they run."""
    coding: list[Pass] = [GptqPass()] if recipe.codes_by_data else []
    return [RangesPass(recipe), QualityPass(), *coding]


def fill_scales(layer: QuantizedLayer, scales: Mapping[str, Tensor]) -> None:
    """Put the static scales of a layer's rule in place, for the pass that measures them."""
    if layer.delta_net is not None:
        own = layer.delta_net.scales
        own.fill({key: scales[layer.prefix + key] for key in own.keys})

"""The calibration pass: run the float model over the data, watch every site, propose scales, measure what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint import Calibration
from ..core import QDeltaNetError
from ..models import QuantizedLayer, model_fingerprint, quantize_model, quantized_layers, set_execution
from ..recipe import Recipe
from .data import Samples
from .quality import Quality
from .ranges import LayerRanges

Progress = Callable[[int, int], None]


class Watcher(Protocol):
    """What is shown the inside of one decoder layer."""

    def site(self, site: str, x: Tensor, compact: bool) -> None: ...

    def projection(self, name: str, x: Tensor) -> None: ...


def calibrate(
    model: Any,
    recipe: Recipe,
    samples: Samples,
    *,
    model_name: str = "",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Calibration:
    """Quantize `model` in place (execution stays float) and calibrate it.

    Two passes over the samples: one proposes ranges, one measures SQNR and saturation of each site at its scale.
    progress(done, total) counts batches. Raises QDeltaNetError for a batch size below 1, and NonFiniteError that names
    layer and site where NaN or Inf appears.
    """
    if batch_size < 1:
        raise QDeltaNetError(f"batch size {batch_size}: must be at least 1")
    if not quantized_layers(model):
        quantize_model(model, recipe)
    layers = quantized_layers(model)
    batches = samples.tokens.split(batch_size)
    tick = Ticker(progress, 2 * len(batches))

    ranges = {index: LayerRanges(layer, recipe) for index, layer in layers.items()}
    run_watched(model, ranges, batches, tick)
    scales: dict[str, Tensor] = {}
    for index, layer in layers.items():
        scales |= ranges[index].scales()
        fill_scales(layer, scales)

    quality = {index: Quality(x.delta_net) for index, x in layers.items() if x.delta_net is not None}
    run_watched(model, quality, batches, tick)
    report = {
        "version": 1,
        "model": {"name": model_name, "fingerprint": model_fingerprint(model)},
        "recipe": {"name": recipe.name, "fingerprint": recipe.fingerprint},
        "dataset": {
            "name": samples.name,
            "samples": samples.tokens.shape[0],
            "seq_len": samples.tokens.shape[1],
            "batch_size": batch_size,
            "sha256": samples.digest,
        },
        "layers": {str(index): q.report() for index, q in quality.items()},
    }
    calibration = Calibration(recipe, scales, report)
    calibration.apply(model)
    return calibration


def fill_scales(layer: QuantizedLayer, scales: Mapping[str, Tensor]) -> None:
    """Put the static scales of a layer's rule in place, for the pass that measures them."""
    if layer.delta_net is not None:
        own = layer.delta_net.scales
        own.fill({key: scales[layer.prefix + key] for key in own.keys})


class Ticker:
    """progress(done, total), one call after the other."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@contextmanager
def watching(model: Any, watchers: Mapping[int, Watcher]) -> Iterator[None]:
    """The model runs in float and shows the inside of these layers; watchers come off whatever happens."""
    layers = {index: layer for index, layer in quantized_layers(model).items() if index in watchers}
    set_execution(model, "observe")
    for index, layer in layers.items():
        layer.observe(watchers[index].site, watchers[index].projection)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.stop_observing()
        set_execution(model, "float")


def run_watched(model: Any, watchers: Mapping[int, Watcher], batches: Iterable[Tensor], tick: Ticker) -> None:
    """One float pass over batches [B, T] with watchers by layer."""
    with watching(model, watchers):
        for batch in batches:
            with torch.no_grad():
                model(input_ids=batch.to(model.device), use_cache=False)
            tick()

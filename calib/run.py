"""The calibration pass: run the float model over the data, watch every site, propose scales, measure what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Calibration
from ..core import NonFiniteError, QDeltaNetError, grouped
from ..delta_rule import make_scales
from ..models import delta_net_layers, model_fingerprint, quantize_model, set_execution
from ..nn import GatedDeltaNet
from ..recipe import Recipe
from .data import Samples
from .observers import Key, MinMaxObserver, Observer, make_observer
from .quality import Quality

Progress = Callable[[int, int], None]


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
    layers = delta_net_layers(model) or quantize_model(model, recipe)
    batches = samples.tokens.split(batch_size)
    tick = _Ticker(progress, 2 * len(batches))

    ranges = {index: LayerObserver(layer, recipe) for index, layer in layers.items()}
    _observe(model, layers, ranges, batches, tick)
    scales: dict[str, Tensor] = {}
    for index, layer in layers.items():
        scales |= {f"layers.{index}.{key}": scale.cpu() for key, scale in ranges[index].scales().items()}
        layer.scales.fill({key: scales[f"layers.{index}.{key}"] for key in layer.scales.keys})

    quality = {index: Quality(layer) for index, layer in layers.items()}
    _observe(model, layers, quality, batches, tick)
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


class LayerObserver:
    """Observers of one layer: one per (site, granularity) that a static scale needs, one per static projection."""

    def __init__(self, layer: GatedDeltaNet, recipe: Recipe) -> None:
        self.layer, self.recipe = layer, recipe
        self.observers: dict[Key, Observer] = {}
        self._by_site: dict[str, list[Key]] = {}
        chosen = recipe.observers(layer.layer_idx)
        # Where a carried site and its operand keep the same axes they share a range: the wider format's.
        for spec in sorted(layer.specs, key=lambda s: -s.format.bits):
            key = (spec.site, spec.granularity)
            if not spec.bound and key not in self.observers:
                config = chosen[spec.site]
                self.observers[key] = make_observer(config.kind, config.percentile, spec.format.qmax)
                self._by_site.setdefault(spec.site, []).append(key)
        self.inputs = {name: MinMaxObserver() for name, p in layer.named_children() if getattr(p, "is_static", False)}

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        if not bool(x.abs().amax().isfinite()):
            raise NonFiniteError(site)
        for key in self._by_site.get(site, ()):
            self.observers[key].update(grouped(x, key[1], compact))

    def projection(self, name: str, x: Tensor) -> None:
        if name in self.inputs:
            self.inputs[name].update(x.float().reshape(1, 1, 1, 1, -1))

    def scales(self) -> dict[str, Tensor]:
        """Static scales by key, and `<projection>.input_scale`."""
        amax = {key: observer.amax() for key, observer in self.observers.items()}
        result = make_scales(
            self.layer.specs,
            amax,
            shared=self.layer.scheme.shared_rescale,
            power_of_two=self.recipe.requantize == "power_of_two",
            beta_max=self.layer.dims.beta_max,
            headroom=self.layer.scheme.headroom,
            proven=self.layer.scheme.plan.bounded,
        )
        for name, observer in self.inputs.items():
            fmt = getattr(self.layer, name).scheme.activation.format
            result[f"{name}.input_scale"] = observer.amax().reshape(1).clamp(min=2.0**-100) / fmt.qmax
        return result


class _Ticker:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _observe(
    model: Any,
    layers: Mapping[int, GatedDeltaNet],
    observers: Mapping[int, LayerObserver] | Mapping[int, Quality],
    batches: Iterable[Tensor],
    tick: _Ticker,
) -> None:
    """One float pass with observers attached; they come off whatever happens."""
    set_execution(model, "observe")
    for index, layer in layers.items():
        layer.observe = observers[index].site
        for name, child in layer.named_children():
            if child in layer.projections():
                child.observe = _bind(observers[index], name)
    try:
        for batch in batches:
            with torch.no_grad():
                model(input_ids=batch.to(model.device), use_cache=False)
            tick()
    finally:
        for layer in layers.values():
            layer.observe = None
            for projection in layer.projections():
                projection.observe = None
        set_execution(model, "float")


def _bind(observer: LayerObserver | Quality, name: str) -> Callable[[Tensor], None]:
    return lambda x: observer.projection(name, x)

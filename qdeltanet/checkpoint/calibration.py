"""A calibration on disk: calibration.safetensors (scales), recipe.yaml (fully resolved), calibration.json (report)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import QDeltaNetError, check_scale
from ..core.files import whole_directory
from ..models import QuantizedLayer, model_fingerprint, quantize_model, quantized_layers
from ..nn import quantize_weight
from ..recipe import Recipe, load_recipe

SCALES, RECIPE, REPORT = "calibration.safetensors", "recipe.yaml", "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Scales by `layers.<i>.<site key>` and `layers.<i>.<projection>.input_scale`, with their recipe and report."""

    recipe: Recipe
    scales: Mapping[str, Tensor]
    report: Mapping[str, Any]

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the directory whole or not at all. Raises QDeltaNetError."""
        with whole_directory(path, overwrite) as folder:
            save_file({k: v.contiguous() for k, v in self.scales.items()}, folder / SCALES)
            (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            (folder / REPORT).write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def apply(self, model: Any) -> None:
        """Quantize a float model with this calibration: layers replaced, scales filled, weights coded.

        Raises QDeltaNetError that says what differs if the calibration is of another model.
        """
        own, other = model_fingerprint(model), self.report["model"]["fingerprint"]
        if own != other:
            raise QDeltaNetError(
                f"the calibration is of model {self.report['model']['name']!r} (fingerprint {other[:12]}), "
                f"this model's fingerprint is {own[:12]}: calibrate this model"
            )
        if not quantized_layers(model):
            quantize_model(model, self.recipe)
        layers = quantized_layers(model)
        for layer in layers.values():
            self._fill(layer)
        calibrate_weights(layers)

    def _fill(self, layer: QuantizedLayer) -> None:
        keys = () if layer.delta_net is None else layer.delta_net.scales.keys
        static = [name for name, p in layer.projections.items() if p.is_static]
        wanted = [*keys, *(f"{name}.input_scale" for name in static)]
        missing = [k for k in wanted if layer.prefix + k not in self.scales]
        if missing:
            raise QDeltaNetError(f"the calibration lacks scales of {layer.prefix[:-1]}: {', '.join(missing)}")
        if layer.delta_net is not None:
            layer.delta_net.scales.fill({k: self.scales[layer.prefix + k] for k in keys})
        for name in static:
            layer.projections[name].input_scale = self.scales[f"{layer.prefix}{name}.input_scale"]


def calibrate_weights(layers: Mapping[int, QuantizedLayer]) -> None:
    """Code the weights of all quantized projections (Brevitas, per output channel)."""
    for layer in layers.values():
        for projection in layer.projections.values():
            if projection.original is not None:
                codes, scale = quantize_weight(projection.original.weight, projection.scheme.weight)
                projection.codes, projection.scale = codes, scale


def needs_calibration(recipe: Recipe, layers: Mapping[int, QuantizedLayer]) -> bool:
    """Whether any layer has a static scale that only data can give."""
    rules = [layer.delta_net for layer in layers.values() if layer.delta_net is not None]
    static = any(not spec.bound for delta_net in rules for spec in delta_net.specs)
    return static or any(p.is_static for layer in layers.values() for p in layer.projections.values())


def load_calibration(path: Path) -> Calibration:
    """Read a calibration directory. Raises QDeltaNetError that names the file that is missing or damaged."""
    for name in (SCALES, RECIPE, REPORT):
        if not (path / name).is_file():
            raise QDeltaNetError(f"{path} is no calibration: {name} is missing; make one with `qdeltanet calibrate`")
    try:
        scales = load_file(path / SCALES)
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
        report["model"]["fingerprint"], report["recipe"]["fingerprint"]
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise QDeltaNetError(f"{path}: damaged ({e}); calibrate again") from e
    for key, scale in scales.items():
        if scale.dtype != torch.float32:
            raise QDeltaNetError(f"{path / SCALES}: {key} is {scale.dtype}, scales are float32; calibrate again")
        try:
            check_scale(scale)
        except QDeltaNetError as e:
            raise QDeltaNetError(f"{path / SCALES}: {key}: {e}; calibrate again") from e
    recipe = load_recipe(path / RECIPE)
    if recipe.fingerprint != report["recipe"]["fingerprint"]:
        raise QDeltaNetError(f"{path / RECIPE} was changed after the calibration: calibrate again with that recipe")
    return Calibration(recipe, scales, report)

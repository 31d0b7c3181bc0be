"""A calibration on disk: calibration.safetensors (scales), recipe.yaml (fully resolved), calibration.json (report), and
weights.safetensors (codes that only data can give) where a projection's method is gptq."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core import QDeltaNetError, check_scale
from ..core.files import whole_directory
from ..models import QuantizedLayer, ensure_quantized, materialised, model_fingerprint
from ..nn import QuantLinear, quantize_weight
from ..recipe import Recipe, load_recipe

SCALES, RECIPE, REPORT = "calibration.safetensors", "recipe.yaml", "calibration.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Calibration:
    """Scales by `layers.<i>.<site key>` and `layers.<i>.<projection>.input_scale`, with their recipe and report.

    weights: `layers.<i>.<projection>.codes` and `.scale` of the projections that GPTQ has coded; the codes of others
    follow from their weights.
    """

    recipe: Recipe
    scales: Mapping[str, Tensor]
    report: Mapping[str, Any]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the directory whole or not at all. Raises QDeltaNetError."""
        with whole_directory(path, overwrite) as folder:
            save_file({k: v.contiguous() for k, v in self.scales.items()}, folder / SCALES)
            if self.weights:
                save_file({k: v.contiguous() for k, v in self.weights.items()}, folder / WEIGHTS)
            (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            (folder / REPORT).write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def apply(self, model: Any) -> None:
        """Quantize a float model with this calibration: layers replaced, scales filled, weights coded.

        Raises QDeltaNetError that says what differs if the calibration is of another model, and for one that another
        recipe has quantized.
        """
        own, other = model_fingerprint(model), self.report["model"]["fingerprint"]
        if own != other:
            raise QDeltaNetError(
                f"the calibration is of model {self.report['model']['name']!r} (fingerprint {other[:12]}), "
                f"this model's fingerprint is {own[:12]}: calibrate this model"
            )
        layers = ensure_quantized(model, self.recipe)
        for layer in layers.values():
            self._fill(layer)
        calibrate_weights(layers, self.weights)

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


def calibrate_weights(layers: Mapping[int, QuantizedLayer], coded: Mapping[str, Tensor] | None = None) -> None:
    """Code the weights of all quantized projections by their methods (Brevitas).

    coded: what a calibration holds of them, for methods that need data. Raises QDeltaNetError where it holds none, or
    codes that do not fit.
    """
    for layer in layers.values():
        for name, projection in layer.projections.items():
            if projection.original is not None:
                with materialised(projection.original):
                    _code(f"{layer.prefix}{name}", projection, projection.original, coded or {})


def _code(name: str, projection: QuantLinear, original: nn.Linear, coded: Mapping[str, Tensor]) -> None:
    """Codes and scales (and a bias) stay in memory, whatever is offloaded."""
    scheme, device = projection.scheme, projection.codes.device
    if scheme.method == "gptq":
        codes, scale = _coded(name, projection, coded)
    else:
        codes, scale = quantize_weight(original.weight, scheme.weight, scheme.group, scheme.method)
    projection.codes, projection.scale = codes.to(device), scale.to(device)
    if projection.bias is not None and projection.bias.is_meta:
        projection.bias = nn.Parameter(original.bias.detach().to(device, copy=True))


def _coded(name: str, projection: QuantLinear, coded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    codes, scale = coded.get(f"{name}.codes"), coded.get(f"{name}.scale")
    if codes is None or scale is None:
        raise QDeltaNetError(f"the calibration lacks the weights of {name}, whose method is gptq; calibrate again")
    own = projection.codes
    fits = codes.dtype == own.dtype and codes.shape == own.shape and scale.shape == projection.scale.shape
    if not fits or int(codes.long().abs().amax()) > projection.scheme.weight.qmax:
        raise QDeltaNetError(
            f"the calibration's weights of {name} ({codes.dtype} {list(codes.shape)}, scales {list(scale.shape)}) do "
            "not fit the model or their format; calibrate again"
        )
    return codes, scale


def needs_calibration(layers: Mapping[int, QuantizedLayer]) -> bool:
    """Whether any layer has a static scale, or codes, that only data can give."""
    rules = [layer.delta_net for layer in layers.values() if layer.delta_net is not None]
    static = any(not spec.bound for delta_net in rules for spec in delta_net.specs)
    projections = [p for layer in layers.values() for p in layer.projections.values()]
    return static or any(p.is_static or p.scheme.method == "gptq" for p in projections)


def load_calibration(path: Path) -> Calibration:
    """Read a calibration directory. Raises QDeltaNetError that names the file that is missing or damaged."""
    for name in (SCALES, RECIPE, REPORT):
        if not (path / name).is_file():
            raise QDeltaNetError(f"{path} is no calibration: {name} is missing; make one with `qdeltanet calibrate`")
    try:
        scales = load_file(path / SCALES)
        weights = load_file(path / WEIGHTS) if (path / WEIGHTS).is_file() else {}
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
        report["model"]["fingerprint"], report["recipe"]["fingerprint"]
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise QDeltaNetError(f"{path}: damaged ({e}); calibrate again") from e
    _check_scales(path / SCALES, scales)
    _check_scales(path / WEIGHTS, {k: v for k, v in weights.items() if k.endswith(".scale")})
    recipe = load_recipe(path / RECIPE)
    if recipe.fingerprint != report["recipe"]["fingerprint"]:
        raise QDeltaNetError(f"{path / RECIPE} was changed after the calibration: calibrate again with that recipe")
    return Calibration(recipe, scales, report, weights)


def _check_scales(file: Path, scales: Mapping[str, Tensor]) -> None:
    for key, scale in scales.items():
        if scale.dtype != torch.float32:
            raise QDeltaNetError(f"{file}: {key} is {scale.dtype}, scales are float32; calibrate again")
        try:
            check_scale(scale)
        except QDeltaNetError as e:
            raise QDeltaNetError(f"{file}: {key}: {e}; calibrate again") from e

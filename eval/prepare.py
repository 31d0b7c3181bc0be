"""From a name, a recipe and a calibration to a model that executes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backends import AUTO
from ..checkpoint import (
    Calibration,
    calibrate_weights,
    is_foreign,
    load_calibration,
    load_foreign,
    needs_calibration,
)
from ..core import QDeltaNetError
from ..delta_rule import make_scales
from ..models import QuantizedLayer, delta_net_layers, load_model, quantize_model, quantized_layers, set_execution
from ..nn import Execution
from ..recipe import Recipe, differences, load_recipe
from .embedded import model_path


def prepare_model(
    name: str,
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    execution: Execution = "integer",
    backend: str = AUTO,
    dtype: str = "float32",
    device: str = "cpu",
) -> Any:
    """Load a model (embedded name, directory or hub id), quantize it and choose its execution.

    An exported checkpoint brings its own recipe and scales, in whichever format. recipe None leaves a float model as
    transformers made it.
    Raises QDeltaNetError if the recipe needs a calibration that is not given, or the calibration is of another recipe.
    """
    path = Path(model_path(name))
    model = (
        load_foreign(path, dtype).to(device) if is_foreign(path) else load_model(str(path), dtype=dtype, device=device)
    )
    if delta_net_layers(model):
        if recipe is not None:
            raise QDeltaNetError(f"{name} is an exported checkpoint with its own recipe; leave --recipe out")
        set_execution(model, execution, backend)
        return model
    if recipe is None:
        return model
    quantize_model(model, recipe)
    layers = quantized_layers(model)
    if calibration is not None:
        check_recipe(calibration, recipe)
        calibration.apply(model)
    elif needs_calibration(layers):
        if execution != "float":
            asks = "weights coded by GPTQ" if recipe.codes_by_data else "static scales"
            raise QDeltaNetError(f"recipe {recipe.name} has {asks}: pass --calibration DIR (see `qdeltanet calibrate`)")
    else:
        calibrate_weights(layers)
        _fill_bounds(layers)
    set_execution(model, "float" if recipe.is_float else execution, backend)
    return model


def check_recipe(calibration: Calibration, recipe: Recipe) -> None:
    """Raises QDeltaNetError that says what differs if a calibration is of another recipe."""
    if calibration.recipe.fingerprint != recipe.fingerprint:
        differs = "; ".join(differences(calibration.recipe, recipe))
        raise QDeltaNetError(
            f"the calibration is of another recipe than {recipe.name} (calibration / asked: {differs}): "
            "calibrate with this recipe"
        )


def _fill_bounds(layers: Mapping[int, QuantizedLayer]) -> None:
    """Scales of proven ranges need no data."""
    for layer in (x.delta_net for x in layers.values()):
        if layer is not None and layer.specs and all(spec.bound for spec in layer.specs):
            layer.scales.fill(make_scales(layer.specs, {}, beta_max=layer.dims.beta_max))


def saturation(model: Any) -> Counter[str]:
    """Clipped elements per `layer.site` since execution was chosen."""
    total: Counter[str] = Counter()
    for index, layer in quantized_layers(model).items():
        total.update({f"{index}.{site}": n for site, n in layer.saturated.items()})
    return total


def prepare_from_args(pretrained: str, recipe: str | None, calibration: str | None, **kwargs: Any) -> Any:
    """`prepare_model` from lm-eval's --model_args strings: recipe name or file, calibration directory."""
    loaded = None if calibration is None else load_calibration(Path(calibration))
    chosen = load_recipe(recipe) if recipe is not None else (loaded.recipe if loaded is not None else None)
    return prepare_model(pretrained, chosen, loaded, **kwargs)

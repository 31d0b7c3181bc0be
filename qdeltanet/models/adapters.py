"""Find and replace the Gated DeltaNet layers of a model. A family is one short file in this folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..core import QDeltaNetError
from ..delta_rule import LayerScheme
from ..nn import GatedDeltaNet
from ..recipe import Recipe
from .delta_net import DELTA_NET
from .family import Adapter
from .layers import QuantizedLayer, quantized_layers
from .linears import quantize_linears
from .olmo_hybrid import OLMO_HYBRID
from .placement import execution_device, take_over_hook
from .qwen3_5 import QWEN3_5
from .qwen3_next import QWEN3_NEXT

ADAPTERS: tuple[Adapter, ...] = (QWEN3_5, QWEN3_NEXT, OLMO_HYBRID, DELTA_NET)


def adapter_for(config: Any) -> Adapter:
    """The adapter of a model config. Raises QDeltaNetError that lists the known families."""
    types = {getattr(c, "model_type", None) for c in (config, getattr(config, "text_config", None)) if c is not None}
    for adapter in ADAPTERS:
        if types & set(adapter.model_types):
            return adapter
    known = ", ".join(t for a in ADAPTERS for t in a.model_types)
    family = getattr(config, "model_type", "?")
    raise QDeltaNetError(
        f"model family {family!r} is not supported (known: {known}); add qdeltanet/models/{family}.py and name it in "
        "ADAPTERS of qdeltanet/models/adapters.py"
    )


def quantize_model(model: Any, recipe: Recipe) -> dict[int, GatedDeltaNet]:
    """Replace every Gated DeltaNet of a loaded or meta-device model in place, and the other linears that the recipe
    quantizes; weights are kept, scales still empty.

    Execution starts as float. Returns the new layers by index. Raises QDeltaNetError for a family or a model that has
    none and for a recipe that names layers which the model lacks, and BindingError where the recipe cannot be bound to
    a layer. Layers that accelerate has placed or offloaded (`device_map`) stay so.
    """
    adapter = adapter_for(model.config)
    found = list(_find(model, adapter))
    _check_layers(model.config, [int(module.layer_idx) for _, _, module in found], recipe)
    replaced = {}
    for parent, name, module in found:
        index = int(module.layer_idx)
        new = _replacement(module, adapter, recipe.layer(index), index)
        new.train(module.training)
        setattr(parent, name, new)
        replaced[index] = new
    quantize_linears(model, adapter.linears, recipe)
    return replaced


def ensure_quantized(model: Any, recipe: Recipe) -> dict[int, QuantizedLayer]:
    """`quantize_model` where nothing is quantized yet; returns what is, by decoder layer index.

    Raises QDeltaNetError for a model that another recipe has quantized: its scales would go by the wrong name.
    """
    if not quantized_layers(model):
        quantize_model(model, recipe)
    layers = quantized_layers(model)
    for index, layer in layers.items():
        if layer.delta_net is not None and layer.delta_net.scheme != recipe.layer(index):
            raise QDeltaNetError(
                f"the model is quantized already, and its layer {index} is not recipe {recipe.name}'s: load the float "
                "model again"
            )
    return layers


def _check_layers(config: Any, found: list[int], recipe: Recipe) -> None:
    """Raises QDeltaNetError for a model without Gated DeltaNet layers, and for a recipe that names layers it lacks."""
    text = getattr(config, "text_config", None) or config
    if not found:
        types = Counter(getattr(text, "layer_types", None) or ())
        kinds = ", ".join(f"{count} {kind}" for kind, count in types.items()) or "none of any known type"
        raise QDeltaNetError(f"the model has no Gated DeltaNet (linear_attention) layer to quantize: it has {kinds}")
    for key, override in recipe.layers.items():
        others = range(text.num_hidden_layers) if override.projections else ()  # of attention and MLPs, too
        if not any(fnmatchcase(str(index), key) for index in (*found, *others)):
            layers = ", ".join(map(str, found))
            raise QDeltaNetError(
                f"recipe {recipe.name}: layers {key!r} is no Gated DeltaNet layer of the model ({layers})"
            )


def _find(model: nn.Module, adapter: Adapter) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if adapter.is_layer(child):
                yield parent, name, child


def _replacement(module: Any, adapter: Adapter, scheme: LayerScheme, index: int) -> GatedDeltaNet:
    parts = adapter.parts(module)
    with torch.device(execution_device(module)):
        new = GatedDeltaNet(parts, adapter.dimensions(module), scheme, index, adapter.role_names, adapter.wiring)
    take_over_hook(module, new)
    return new

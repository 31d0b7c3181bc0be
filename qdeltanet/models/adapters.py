"""Find and replace the Gated DeltaNet layers of a model. A family is one short file in this folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..core import QDeltaNetError
from ..delta_rule import Dimensions, LayerScheme
from ..nn import GatedDeltaNet
from ..recipe import Recipe
from .qwen3_5 import Qwen3_5Adapter


class Adapter(Protocol):
    """What qdeltanet has to know about a family.

    model_types: values of `config.model_type`. role_names: recipe roles to attribute names.
    """

    @property
    def model_types(self) -> tuple[str, ...]: ...

    @property
    def role_names(self) -> Mapping[str, str]: ...

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is the family's Gated DeltaNet."""
        ...

    def dimensions(self, module: Any) -> Dimensions: ...

    def parts(self, module: Any) -> dict[str, nn.Module | nn.Parameter]:
        """Sub-modules and parameters to take over, by the names they keep in the state dict."""
        ...


ADAPTERS: tuple[Adapter, ...] = (Qwen3_5Adapter(),)


def adapter_for(config: Any) -> Adapter:
    """The adapter of a model config. Raises QDeltaNetError that lists the known families."""
    types = {getattr(c, "model_type", None) for c in (config, getattr(config, "text_config", None)) if c is not None}
    for adapter in ADAPTERS:
        if types & set(adapter.model_types):
            return adapter
    known = ", ".join(t for a in ADAPTERS for t in a.model_types)
    family = getattr(config, "model_type", "?")
    raise QDeltaNetError(f"model family {family!r} is not supported (known: {known}); add qdeltanet/models/{family}.py")


def quantize_model(model: Any, recipe: Recipe) -> dict[int, GatedDeltaNet]:
    """Replace every Gated DeltaNet of a loaded or meta-device model in place; weights are kept, scales still empty.

    Execution starts as float. Returns the new layers by index. Raises QDeltaNetError for a family or a model that has
    none, and BindingError where the recipe cannot be bound to a layer.
    """
    adapter = adapter_for(model.config)
    found = list(_find(model, adapter))
    if not found:
        raise QDeltaNetError("the model has no Gated DeltaNet (linear_attention) layer to quantize")
    replaced = {}
    for parent, name, module in found:
        index = int(module.layer_idx)
        new = _replacement(module, adapter, recipe.layer(index), index)
        new.train(module.training)
        setattr(parent, name, new)
        replaced[index] = new
    return replaced


def _find(model: nn.Module, adapter: Adapter) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if adapter.is_layer(child):
                yield parent, name, child


def _replacement(module: Any, adapter: Adapter, scheme: LayerScheme, index: int) -> GatedDeltaNet:
    parts = adapter.parts(module)
    device = next(module.parameters()).device
    with torch.device(device):
        return GatedDeltaNet(parts, adapter.dimensions(module), scheme, index, adapter.role_names)

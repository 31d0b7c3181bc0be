"""The linears of decoder layers beside their Gated DeltaNet: attention and MLP, by the roles of a recipe."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping

from torch import nn

from ..core import BindingError, ProjectionScheme
from ..nn import GatedDeltaNet, QuantLinear
from ..nn.wiring import module_schemes
from ..recipe import Recipe
from .family import LINEARS
from .placement import execution_device

_DELTA_NET = re.compile(r"^((?:.+\.)?layers)\.\d+\.")
EXPERTS_STAY = "the recipe's mlp projections: experts that are slices of one 3-D tensor stay in float"
NOT_THERE = (
    "the recipe's {}: this family has no such linears, or none that can be quantized; what there is stays in float"
)


def quantize_linears(model: nn.Module, linears: Mapping[str, tuple[str, ...]], recipe: Recipe) -> None:
    """Replace the linears that a recipe quantizes, in every decoder layer of the stack that holds Gated DeltaNets.

    linears: paths in a decoder layer by role, of which it may lack some. Warns where experts stay in float, and of
    roles that the recipe names and no layer has. Raises BindingError, with the linear's name, where its scheme does not
    fit it.
    """
    experts, absent = False, set(LINEARS)
    for index, layer in _decoder_layers(model):
        found = {path: m for path, m in layer.named_modules() if isinstance(m, nn.Linear)}
        schemes = module_schemes(recipe.layer(index).projections, linears, found)
        for path, scheme in schemes.items():
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, _quantized(found[path], scheme, f"layer {index}, {path}"))
        roles = {role for role in linears if role.startswith("mlp.") and role in recipe.layer(index).projections}
        experts |= bool(roles) and any(p.dim() == 3 and n.startswith("mlp.") for n, p in layer.named_parameters())
        absent -= {role for role, paths in linears.items() if any(path in found for path in paths)}
    if experts:
        warnings.warn(EXPERTS_STAY, stacklevel=3)
    absent &= {role for scheme in recipe.schemes for role in scheme.projections}
    if absent:
        warnings.warn(NOT_THERE.format(", ".join(sorted(absent))), stacklevel=3)


def _decoder_layers(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(index, decoder layer) of the text model: a vision tower has layers, too, but no Gated DeltaNet."""
    inside = [_DELTA_NET.match(path) for path, m in model.named_modules() if isinstance(m, GatedDeltaNet)]
    for stack in dict.fromkeys(match[1] for match in inside if match is not None):
        for name, layer in model.get_submodule(stack).named_children():
            yield int(name), layer


def _quantized(linear: nn.Linear, scheme: ProjectionScheme, where: str) -> QuantLinear:
    try:
        with execution_device(linear):
            new = QuantLinear(linear.in_features, linear.out_features, scheme, linear)
    except BindingError as e:
        raise BindingError(f"{where}: {e}") from e
    return new.train(linear.training)

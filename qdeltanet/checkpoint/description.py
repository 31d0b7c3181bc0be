"""What a checkpoint executes, as plain data: sites, plan, projections, resolved. A reader needs neither the recipe's
rules nor the methods' builders."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..core import IntFormat, QDeltaNetError, SiteScheme
from ..inverse import Plan
from ..models import QuantizedLayer, quantized_layers
from ..nn import GatedDeltaNet, QuantLinear
from ..recipe import flat

SHOWN = 20  # differences that an error names one by one
_IN_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")


def describe_layers(model: nn.Module) -> list[dict[str, Any]]:
    """One entry per distinct scheme, each with the decoder layers that it holds for (docs/checkpoint.md)."""
    paths = {id(m): path for path, m in model.named_modules() if isinstance(m, GatedDeltaNet | QuantLinear)}
    found: list[dict[str, Any]] = []
    for index, layer in quantized_layers(model).items():
        scheme = _layer(layer, paths)
        same = next((entry for entry in found if {**entry, "layers": None} == {**scheme, "layers": None}), None)
        if same is None:
            found.append({"layers": [index], **scheme})
        else:
            same["layers"].append(index)
    return found


def check_description(found: Any, model: nn.Module, where: str) -> None:
    """Compare what a file says with what its recipe makes of this model.

    Raises QDeltaNetError that lists what differs.
    """
    try:
        theirs = _by_layer(found)
    except (KeyError, TypeError, AttributeError) as e:
        raise QDeltaNetError(f"{where}: damaged ({type(e).__name__}: {e}); export the model again") from e
    ours = _by_layer(describe_layers(model))
    differs = [
        f"{key}: {theirs.get(key)!r}, by the recipe {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differs:
        more = f"; and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        raise QDeltaNetError(f"{where} is not what its recipe gives: {'; '.join(differs[:SHOWN])}{more}")


def _by_layer(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dotted keys, `layer 0.rule.sites.q.format`; steps one by one."""
    content: dict[str, Any] = {}
    for entry in entries:
        rest = {k: v for k, v in entry.items() if k != "layers"}
        if rest.get("plan"):
            steps = {str(i): step for i, step in enumerate(rest["plan"]["steps"])}
            rest["plan"] = {**rest["plan"], "steps": steps}
        content |= {f"layer {index}": rest for index in entry["layers"]}
    return flat(content)


def _layer(layer: QuantizedLayer, paths: Mapping[int, str]) -> dict[str, Any]:
    delta_net, entry = layer.delta_net, dict[str, Any]()
    if delta_net is not None:
        entry["module"] = _in_layer(paths[id(delta_net)])
        entry["dimensions"] = dataclasses.asdict(delta_net.dims)
    if delta_net is not None and delta_net.bound is not None:
        rule = delta_net.bound
        entry["rule"] = {
            "requantize": rule.requantize,
            "accumulator_bits": rule.accumulator_bits,
            "decay": rule.decay,
            "rotate": sorted(rule.rotate),
            "sites": {name: _site(scheme) for name, scheme in rule.sites.items()},
            "scales": list(delta_net.scales.keys),
        }
        entry["plan"] = describe_plan(delta_net.scheme.plan)
    entry["projections"] = {_in_layer(paths[id(p)]): _projection(p) for p in layer.projections.values()}
    return entry


def _in_layer(path: str) -> str:
    match = _IN_LAYER.search(path)
    return path if match is None else match[1]


def _format(fmt: IntFormat | None) -> str:
    return "float" if fmt is None else fmt.name


def _site(scheme: SiteScheme) -> dict[str, Any]:
    entry = {"format": _format(scheme.format)}
    if scheme.format is not None:
        entry |= {"scale": scheme.scale, "granularity": scheme.granularity.value}
    entry |= {k: _format(v) for k, v in (("carry", scheme.carry), ("feedback", scheme.feedback)) if v is not None}
    return entry


def _projection(linear: QuantLinear) -> dict[str, Any]:
    scheme = linear.scheme
    entry: dict[str, Any] = {"weight": scheme.weight.name, "activation": _format(scheme.activation.format)}
    entry |= {} if scheme.activation.format is None else {"scale": scheme.activation.scale}
    return entry | ({} if scheme.group is None else {"group": scheme.group}) | {"method": scheme.method}


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as data; fields that have their default are left out."""
    return {"method": plan.method, "chunk_size": plan.chunk_size, "steps": [_plain(s) for s in plan.steps]}


def _plain(part: Any) -> dict[str, Any]:
    """A step or a mask, without defaults."""
    entry: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            value = _plain(value)
        entry[field.name] = [list(v) for v in value] if isinstance(value, tuple) else value
    return entry

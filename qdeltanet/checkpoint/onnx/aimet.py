"""Encodings for Qualcomm's AIMET (1.0.0): calibrated ranges as overrides, by the names of tensors of a float graph.

Tried with aimet-onnx 2.42: `load_encodings_to_sim(sim, file, strict=False)` and `encodings_to_onnx_qdq` take these
files, and what they make of them computes what the graphs of `export_onnx` do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from ..._version import __version__
from ...nn import GatedDeltaNet, QuantLinear
from ...recipe import Recipe
from .folder import Request, save_graph, write_folder
from .rule import Kind
from .sites import EncodedSites, encoding
from .symbol import HADAMARD

ENCODINGS_VERSION = "1.0.0"


def export_aimet(
    model: Any,
    recipe: Recipe,
    path: Path,
    *,
    layer: int | None = None,
    chunks: int = 4,
    batch: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write float graphs whose tensors are called as the sites, `layers.<i>.<kind>.onnx`, each with the encodings of
    those tensors, `layers.<i>.<kind>.encodings`, and export.json.

    Where the recipe quantizes projections, `projections.encodings` has their weights' encodings, by the names that they
    have in the model (`model.layers.0.linear_attn.in_proj_z.weight`) and keep in an export of the whole model.
    Arguments, result and errors as `export_onnx`.
    """
    request = Request(model, recipe, layer, chunks, batch)

    def write(delta_net: GatedDeltaNet, kind: Kind, folder: Path) -> dict[str, Any]:
        sites, name = EncodedSites(), f"layers.{delta_net.layer_idx}.{kind}"
        graph = request.graph(delta_net, kind, sites)
        return save_graph(graph, folder / f"{name}.onnx") | _save(graph_encodings(graph, sites), folder, name)

    def weights(layers: Sequence[GatedDeltaNet], folder: Path) -> dict[str, Any]:
        found = weight_encodings(model, layers)
        return {"projections": _save(_content({}, found), folder, "projections")["encodings"]} if found else {}

    return write_folder(path, overwrite, "aimet", request, write, weights)


def graph_encodings(graph: onnx.ModelProto, sites: EncodedSites) -> dict[str, Any]:
    """The encodings file of a graph: every tensor of it that stands at a site (a decode step lacks some), and the
    matrices of rotations, whose entries are all one number but for the sign."""
    present = {name for node in graph.graph.node for name in node.output}
    activations = {name: e for name, e in sites.encodings.items() if name in present}
    rotations = [x for x in graph.graph.initializer if x.name.startswith(f"{HADAMARD}.")]
    return _content(activations, {x.name: encoding(8, x.dims[-1] ** -0.5) for x in rotations})


def weight_encodings(model: Any, layers: Sequence[GatedDeltaNet]) -> dict[str, dict[str, Any]]:
    """Encodings of the quantized projections' weights [out, in] by their parameters' names: one scale per output
    channel, or per block of input channels of each."""
    owned = {id(projection) for layer in layers for projection in layer.projections()}
    return {
        f"{path}.weight": _weight_encoding(module)
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear) and id(module) in owned
    }


def _weight_encoding(projection: QuantLinear) -> dict[str, Any]:
    entry = encoding(projection.scheme.weight.bits, projection.scale.flatten().tolist())
    group = projection.scheme.group
    return entry if group is None else {**entry, "enc_type": "PER_BLOCK", "block_size": group}


def _content(activations: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": ENCODINGS_VERSION,
        "producer": {"package": "qdeltanet", "version": __version__},
        "activation_encodings": [{"name": name, **e} for name, e in activations.items()],
        "param_encodings": [{"name": name, **e} for name, e in parameters.items()],
    }


def _save(content: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.encodings"
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    counts = {section: len(content[f"{section}_encodings"]) for section in ("activation", "param")}
    return {"encodings": {"file": file.name, **counts}}

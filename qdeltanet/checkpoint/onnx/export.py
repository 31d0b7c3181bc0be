"""Export of the delta rule to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...nn import GatedDeltaNet
from ...recipe import Recipe
from .folder import Request, save_graph, write_folder
from .rule import Kind
from .sites import QdqSites


def export_onnx(
    model: Any,
    recipe: Recipe,
    path: Path,
    *,
    layer: int | None = None,
    chunks: int = 4,
    batch: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `layers.<i>.prefill.onnx` and `layers.<i>.decode.onnx`, with QuantizeLinear and DequantizeLinear at every
    site, and export.json, which lists them.

    model: quantized in memory, or an exported checkpoint. layer: index of a decoder layer; None: every Gated DeltaNet
    whose rule is quantized. chunks: of a prefill. batch: sequences at a time. Returns the content of export.json.
    Raises QDeltaNetError for a layer that has no quantized rule, a recipe without a form in ONNX (naming sites), or a
    directory that may not be written.
    """
    request = Request(model, recipe, layer, chunks, batch)

    def write(delta_net: GatedDeltaNet, kind: Kind, folder: Path) -> dict[str, Any]:
        graph = request.graph(delta_net, kind, QdqSites())
        return save_graph(graph, folder / f"layers.{delta_net.layer_idx}.{kind}.onnx")

    return write_folder(path, overwrite, "onnx", request, write)

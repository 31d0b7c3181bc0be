"""A folder of exported graphs: which layers, what stands in a model file, and the manifest export.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnx

from ..._version import __version__
from ...core import QDeltaNetError
from ...core.files import sha256_file, whole_directory
from ...models import delta_net_layers
from ...nn import GatedDeltaNet
from ...recipe import Recipe
from .graph import OPSET
from .rule import KINDS, Kind, write_rule
from .sites import Sites

FORMAT_VERSION = 1
MANIFEST = "export.json"
Form = Literal["onnx", "aimet"]


@dataclass(frozen=True)
class Request:
    """What is exported: the layer of this index (None: every Gated DeltaNet whose rule is quantized), a prefill of so
    many chunks, so many sequences at a time."""

    model: Any
    recipe: Recipe
    layer: int | None
    chunks: int
    batch: int

    def layers(self) -> list[GatedDeltaNet]:
        """Raises QDeltaNetError where there is nothing to export, or sizes that are none."""
        for name, n in (("chunks", self.chunks), ("batch", self.batch)):
            if n < 1:
                raise QDeltaNetError(f"{name} {n}: must be at least 1")
        found = delta_net_layers(self.model)
        if not found:
            raise QDeltaNetError("the model is not quantized: apply a calibration before exporting")
        if self.layer is not None and self.layer not in found:
            known = ", ".join(map(str, sorted(found)))
            raise QDeltaNetError(f"layer {self.layer} is no Gated DeltaNet; those of this model are {known}")
        chosen = [x for i, x in sorted(found.items()) if self.layer in (None, i) and x.bound is not None]
        if not chosen:
            where = "" if self.layer is None else f" of layer {self.layer}"
            raise QDeltaNetError(f"recipe {self.recipe.name} leaves the rule{where} in float: nothing to export")
        return chosen

    def graph(self, layer: GatedDeltaNet, kind: Kind, sites: Sites) -> onnx.ModelProto:
        """One graph, with what it was made of among its properties."""
        plan = layer.decode_plan if kind == "decode" else layer.scheme.plan
        made_of = {
            "qdeltanet.version": __version__,
            "qdeltanet.recipe": self.recipe.name,
            "qdeltanet.recipe_fingerprint": self.recipe.fingerprint,
            "qdeltanet.chunk_size": str(plan.chunk_size),
            "qdeltanet.plan": str(plan),
        }
        return write_rule(layer, kind, sites, made_of, self.chunks, self.batch)


def write_folder(
    path: Path,
    overwrite: bool,
    form: Form,
    request: Request,
    write: Callable[[GatedDeltaNet, Kind, Path], dict[str, Any]],
    extra: Callable[[Sequence[GatedDeltaNet], Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Both graphs of every layer, then the manifest: whole or not at all. write, extra: give their parts of it."""
    layers = request.layers()
    with whole_directory(path, overwrite) as folder:
        graphs = [{"layer": x.layer_idx, "kind": kind, **write(x, kind, folder)} for x in layers for kind in KINDS]
        manifest = {
            "format": form,
            "version": FORMAT_VERSION,
            "made_by": {"qdeltanet": __version__, "onnx": version("onnx"), "opset": OPSET},
            "recipe": {"name": request.recipe.name, "fingerprint": request.recipe.fingerprint},
            "chunks": request.chunks,
            "batch": request.batch,
            "graphs": graphs,
            **(extra(layers, folder) if extra else {}),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def save_graph(model: onnx.ModelProto, file: Path) -> dict[str, Any]:
    """Write a model file; what the manifest says of it."""
    onnx.save(model, str(file))
    operations = Counter(node.op_type for node in model.graph.node)
    return {
        "file": file.name,
        "sha256": sha256_file(file),
        "bytes": file.stat().st_size,
        "nodes": sum(operations.values()),
        "operations": dict(sorted(operations.items())),
        "inputs": {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read export.json and compare every file with what was exported, all mismatches at once. Raises QDeltaNetError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = (manifest["format"], manifest["version"]) == ("onnx", FORMAT_VERSION)
        listed = {g["file"]: g["sha256"] for g in manifest["graphs"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise QDeltaNetError(f"{folder} is no ONNX export: {MANIFEST} is missing or damaged; export again") from e
    if not known:
        raise QDeltaNetError(
            f"{folder / MANIFEST}: {manifest['format']} version {manifest['version']}, this qdeltanet runs onnx "
            f"version {FORMAT_VERSION}; export again"
        )
    problems = [f"{name} is missing" for name in listed if not (folder / name).is_file()]
    present = {name: digest for name, digest in listed.items() if (folder / name).is_file()}
    problems += [f"{n} is not the file that was exported" for n, d in present.items() if sha256_file(folder / n) != d]
    if problems:
        raise QDeltaNetError(f"{folder}: {'; '.join(problems)}; export again")
    return manifest

"""Exported graphs in ONNX Runtime, in the place of a model's own rule: what was exported is what is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import Operand, QDeltaNetError
from ...models import delta_net_layers
from .folder import read_manifest
from .rule import INPUTS, OUTPUTS


def run_in_onnxruntime(model: Any, folder: Path, threads: int = 1) -> list[int]:
    """Let every layer that `export_onnx` wrote into the folder run its rule in ONNX Runtime on the CPU.

    The layers' execution is taken back by the next `set_execution`. Returns their indices. Raises QDeltaNetError for a
    folder that is no export, a file that is not the one exported, or a model that lacks one of the layers.
    """
    manifest = read_manifest(folder)
    files: dict[int, dict[str, Path]] = {}
    for graph in manifest["graphs"]:
        files.setdefault(graph["layer"], {})[graph["kind"]] = folder / graph["file"]
    layers = delta_net_layers(model)
    if missing := sorted(files.keys() - layers.keys()):
        raise QDeltaNetError(f"{folder} has graphs of layers {missing}, which the model lacks: it is of another model")
    for index, paths in files.items():
        layers[index].foreign = OnnxRule(paths, threads)
    return sorted(files)


class OnnxRule:
    """A layer's rule: prefills of as many tokens as the graph takes, the last one padded with tokens that change
    nothing, or a decode step. files: of both graphs, by kind. The state is float32, on the grid of its codes."""

    def __init__(self, files: Mapping[str, Path], threads: int = 1) -> None:
        self.sessions = {kind: session(path, threads) for kind, path in files.items()}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Operand | None
    ) -> tuple[Tensor, Operand]:
        """Shapes as `run_rule`; float32 output [B, T, H, V]."""
        tokens = q.shape[1]
        graph = self.sessions["decode" if tokens == 1 and state is not None else "prefill"]
        batch, size = graph.get_inputs()[0].shape[:2]
        if q.shape[0] % batch:
            raise QDeltaNetError(
                f"the graph takes batches of {batch}, here are {q.shape[0]} sequences; export with batch 1"
            )
        carried = v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state.real()
        padded = [F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, -tokens % size)) for x in (q, k, v, g, beta)]
        outputs, states = [], []
        for rows in zip(*(x.split(batch) for x in (*padded, carried)), strict=True):
            *inputs, held = rows
            parts = []
            for block in zip(*(x.split(size, dim=1) for x in inputs), strict=True):
                part, held = run(graph, dict(zip(INPUTS, (*block, held), strict=True)))
                parts.append(part)
            outputs.append(torch.cat(parts, dim=1))
            states.append(held)
        return torch.cat(outputs)[:, :tokens], Operand("state", torch.cat(states))


def session(path: Path, threads: int = 1) -> Any:
    """A session on the CPU. Raises QDeltaNetError where the package is missing or does not take the file."""
    try:
        import onnxruntime
    except ImportError as e:
        raise QDeltaNetError("running a graph needs onnxruntime: pip install 'qdeltanet[onnx]'") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # every error of the runtime is its own class
        raise QDeltaNetError(f"{path}: ONNX Runtime does not take it ({str(e).splitlines()[0]}); export again") from e


def run(graph: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(output, new state) of one call."""
    arrays = {name: x.detach().contiguous().numpy() for name, x in inputs.items()}
    output, state = (torch.from_numpy(x) for x in graph.run(list(OUTPUTS), arrays))
    return output, state

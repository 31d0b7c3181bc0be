"""Exported graphs and fake quantization side by side, code by code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qdeltanet.backends import get_backend
from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.conformance.recording import Recording
from qdeltanet.core import FloatArithmetic
from qdeltanet.delta_rule import chunk_gated_delta_rule, run_rule
from qdeltanet.models import delta_net_layers
from qdeltanet.nn import GatedDeltaNet
from qdeltanet.recipe import Recipe

TOKENS = torch.randint(0, 100, (4, 130), generator=torch.Generator().manual_seed(1))


def calibrated(make: Any, recipe: Recipe, layer: int = 0) -> tuple[Any, GatedDeltaNet, dict[str, Tensor]]:
    """A quantized model, one of its layers, and what enters that layer's rule: two chunks of calibration data."""
    model = make()
    calibrate(model, recipe, Samples("random", TOKENS, "digest"))
    delta_net = delta_net_layers(model)[layer]
    plan, seen = delta_net.scheme.plan, []

    def rule(*inputs: Any) -> Any:
        seen.append(inputs[:5])
        return run_rule(
            *inputs, arithmetic=FloatArithmetic(), plan=plan, normalise=True, chunk_size=plan.chunk_size
        )  # fmt: skip

    delta_net.foreign = rule
    with torch.no_grad():
        model(TOKENS[:1, : 2 * plan.chunk_size], use_cache=False)
    delta_net.foreign = None
    inputs = dict(zip(("query", "key", "value", "g", "beta"), seen[0], strict=True))
    d = delta_net.dims
    state = torch.randn(1, d.value_heads, d.key_dim, d.value_dim, generator=torch.Generator().manual_seed(0))
    return model, delta_net, {name: x.float() for name, x in inputs.items()} | {"state": 1e-3 * state}


def first_token(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a decode step."""
    return {name: x if name == "state" else x[:, :1] for name, x in inputs.items()}


def run_graph(model: onnx.ModelProto, inputs: Mapping[str, Tensor], optimized: bool = True) -> dict[str, np.ndarray]:
    """Every output of a model in ONNX Runtime, by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(None, {name: x.detach().contiguous().numpy() for name, x in inputs.items()})
    return dict(zip([x.name for x in session.get_outputs()], values, strict=True))


def site_codes(model: onnx.ModelProto) -> list[str]:
    """Tensors of codes in the order of the graph, without coefficients and moved copies."""
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return [n for n in names if "coefficient" not in n and ".mT" not in n and ".chunk" not in n]


def showing(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the codes of every site, and what was rounded to them, as further outputs (INT4 as INT8)."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    infos = {x.name: x for x in model.graph.value_info}
    inputs = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    rounded = {inputs[name] for name in site_codes(model)} - {x.name for x in model.graph.input}
    shown.graph.output.extend(infos[name] for name in sorted(rounded))
    for name in site_codes(model):
        shape = [d.dim_value for d in infos[name].type.tensor_type.shape.dim]
        shown.graph.node.append(helper.make_node("Cast", [name], [f"{name}.int32"], to=TensorProto.INT32))
        shown.graph.output.append(helper.make_tensor_value_info(f"{name}.int32", TensorProto.INT32, shape))
    return shown


def fake_codes(
    layer: GatedDeltaNet, inputs: Mapping[str, Tensor], decode: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Codes by tensor name as the graph has them, output and state of the layer's fake quantization."""
    plan = layer.decode_plan if decode else layer.scheme.plan
    arithmetic = Recording(layer.bound, layer.scales.as_dict(), get_backend("fake"), allow_float=True)
    with torch.no_grad():
        output, state = chunk_gated_delta_rule(
            *(inputs[name] for name in ("query", "key", "value", "g", "beta")), plan.chunk_size, inputs["state"],
            True, True, arithmetic=arithmetic, plan=plan,
        )  # fmt: skip
    seen: Counter[str] = Counter()
    codes = {}
    for site, x, _ in arithmetic.seen:
        number = f".{seen[site]}" if seen[site] else ""
        codes[f"layers.{layer.layer_idx}.{site}{number}.codes"] = _whole(x, plan.chunk_size)
        seen[site] += 1
    return codes, output, state


def _whole(codes: Tensor, size: int) -> Tensor:
    """Registers of the inverse, [N, B, H, n, b, b] blocks on the diagonal, with their zeros."""
    if codes.dim() < 6:
        return codes
    blocks, width = codes.shape[-3], codes.shape[-1]
    full = codes.new_zeros(*codes.shape[:-3], size, size)
    for i in range(blocks):
        full[..., i * width : (i + 1) * width, i * width : (i + 1) * width] = codes[..., i, :, :]
    return full

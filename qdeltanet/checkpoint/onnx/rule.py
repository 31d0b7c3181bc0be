"""The two graphs of a layer: the prefill of a fixed number of chunks, and the decode step of one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import onnx
from torch import Tensor

from ...core import QDeltaNetError, RuleScheme
from ...delta_rule import chunk_gated_delta_rule
from ...nn import GatedDeltaNet
from .arithmetic import OnnxArithmetic
from .graph import Graph
from .sites import Sites
from .symbol import Symbol

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")
INPUTS = ("query", "key", "value", "g", "beta", "state")
OUTPUTS = ("output", "new_state")


def input_shapes(layer: GatedDeltaNet, kind: Kind, chunks: int, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs by name: query, key [B, T, HK, K] before normalisation, value [B, T, H, V], log decay
    g and write strength beta [B, T, H], state [B, H, K, V]; all float32."""
    d = layer.dims
    tokens = 1 if kind == "decode" else chunks * layer.scheme.plan.chunk_size
    keys, gates = (batch, tokens, d.key_heads, d.key_dim), (batch, tokens, d.value_heads)
    shapes = (keys, keys, (*gates, d.value_dim), gates, gates, (batch, d.value_heads, d.key_dim, d.value_dim))
    return dict(zip(INPUTS, shapes, strict=True))


def write_rule(
    layer: GatedDeltaNet, kind: Kind, sites: Sites, metadata: Mapping[str, str], chunks: int, batch: int = 1
) -> onnx.ModelProto:
    """The quantized delta rule of one layer as a graph. sites: what stands at each site; the graph is what
    `chunk_gated_delta_rule` does to the inputs.

    Raises QDeltaNetError where the recipe has no form in ONNX (`inexpressible`).
    """
    assert layer.bound is not None
    prefix = f"layers.{layer.layer_idx}."
    plan = layer.decode_plan if kind == "decode" else layer.scheme.plan
    if problems := inexpressible(layer.bound):
        raise QDeltaNetError(f"{prefix[:-1]} has no form in ONNX: {'; '.join(problems)}")
    graph = Graph()
    shapes = input_shapes(layer, kind, chunks, batch)
    query, key, value, g, beta, state = (
        cast(Tensor, Symbol(graph, graph.input(name, shape))) for name, shape in shapes.items()
    )
    output, final = chunk_gated_delta_rule(
        query, key, value, g, beta, plan.chunk_size, state, output_final_state=True, use_qk_l2norm_in_kernel=True,
        arithmetic=OnnxArithmetic(layer.bound, layer.scales.as_dict(), prefix, sites), plan=plan,
    )  # fmt: skip
    results = (cast(Any, x).value for x in (output, final))
    return graph.model(prefix + kind, dict(zip(OUTPUTS, results, strict=True)), metadata)


def inexpressible(scheme: RuleScheme) -> list[str]:
    """What of a bound scheme QuantizeLinear and its like cannot say, and what would mend it."""
    problems = []
    dynamic = [site for site, s in scheme.sites.items() if s.format is not None and s.scale == "dynamic"]
    if dynamic:
        problems.append(
            f"dynamic scales at {', '.join(dynamic)}; QuantizeLinear takes constants: use a recipe with static scales, "
            "such as int8, int16 or int4-static"
        )
    if scheme.requantize != "float":
        problems.append(
            f"requantize: {scheme.requantize} rounds halves away from zero, QuantizeLinear to even: use float"
        )
    if scheme.decay != "exp":
        problems.append(f"decay: {scheme.decay} is made of integer shifts: use decay: exp")
    return problems

"""Encodings for AIMET: by the rules of its format, and the same codes as the QDQ graph where they are applied.

AIMET itself is too large for a test; release 2.42 took such files (see the exporter).
"""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_runs import calibrated, first_token, run_graph

from qdeltanet.checkpoint.onnx import export_aimet, export_onnx
from qdeltanet.core import QDeltaNetError
from qdeltanet.delta_rule import rule_sites
from qdeltanet.models import quantize_model
from qdeltanet.recipe import load_recipe

PER_TENSOR = ("sites.*.granularity=per_tensor", "inverse.granularity=per_tensor")
W4 = tuple(f"projections.proj.z.{option}" for option in ("weight=int4", "activation=float", "group=32"))
FIELDS = {"name", "dtype", "bw", "is_sym", "scale", "offset", "enc_type"}


def check(content: dict, graph: onnx.GraphProto | None) -> None:
    """The published rules of version 1.0.0, as AIMET's own loader checks them, and that every name is a tensor."""
    assert content["version"] == "1.0.0"
    assert set(content) == {"version", "producer", "activation_encodings", "param_encodings"}
    entries = content["activation_encodings"] + content["param_encodings"]
    names = [e["name"] for e in entries]
    assert len(set(names)) == len(names)
    for e in entries:
        assert set(e) - {"block_size"} == FIELDS
        assert e["dtype"] == "INT"
        assert isinstance(e["is_sym"], bool)
        assert 2 <= e["bw"] <= 32
        assert e["enc_type"] in ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK")
        assert ("block_size" in e) == (e["enc_type"] == "PER_BLOCK")
        assert len(e["scale"]) == len(e["offset"]) >= 1
        assert (len(e["scale"]) == 1) or e["enc_type"] != "PER_TENSOR"
        assert all(s > 0 for s in e["scale"])
        assert all(o == (-(2 ** (e["bw"] - 1)) if e["is_sym"] else 0) for o in e["offset"])
    if graph is not None:
        produced = {name for node in graph.node for name in node.output}
        assert {e["name"] for e in content["activation_encodings"]} <= produced
        assert {e["name"] for e in content["param_encodings"]} <= {x.name for x in graph.initializer}


def applied(model: onnx.ModelProto, content: dict) -> onnx.ModelProto:
    """What a consumer of the encodings does: x = (clamp(round(x / scale) + 2^(bw - 1)) - 2^(bw - 1)) scale."""
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    del graph.node[:]
    renamed: dict[str, str] = {}
    entries = {e["name"]: e for e in content["activation_encodings"] + content["param_encodings"]}
    for name in [x.name for x in graph.initializer if x.name in entries]:
        graph.node.extend(_pair(graph, entries[name]))
        renamed[name] = f"{name}.q"
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(x, x) for x in node.input]
        graph.node.append(copy)
        for name in set(node.output) & set(entries):
            graph.node.extend(_pair(graph, entries[name]))
            renamed[name] = f"{name}.q"
    return quantized


def _pair(graph: onnx.GraphProto, e: dict) -> list[onnx.NodeProto]:
    kind = {(4, True): TensorProto.INT4, (8, True): TensorProto.INT8, (16, True): TensorProto.INT16}
    container = kind.get((e["bw"], e["is_sym"]), TensorProto.UINT16)
    graph.initializer.append(helper.make_tensor(f"{e['name']}.s", TensorProto.FLOAT, [], e["scale"]))
    graph.initializer.append(helper.make_tensor(f"{e['name']}.z", container, [], [0]))
    scale = [f"{e['name']}.s", f"{e['name']}.z"]
    return [
        helper.make_node("QuantizeLinear", [e["name"], *scale], [f"{e['name']}.c"]),
        helper.make_node("DequantizeLinear", [f"{e['name']}.c", *scale], [f"{e['name']}.q"]),
    ]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("int8", ()), ("int8", PER_TENSOR), ("neumann-int16", ()), ("int4-static", ())],
    ids=["per head", "per tensor", "int16", "finest and rotated"],
)
def test_encodings_give_the_codes_of_the_qdq_graph(random_model, tmp_path, name, overrides):
    """Of calibration data, which nothing clips: beyond that AIMET's ranges hold one code more."""
    recipe = load_recipe(name, [*overrides, "observer.kind=minmax"])
    model, layer, inputs = calibrated(random_model, recipe)
    options = {"layer": 0, "chunks": 2}
    aimet, qdq = (f(model, recipe, tmp_path / f.__name__, **options) for f in (export_aimet, export_onnx))
    sites = [s for s in rule_sites(layer.scheme.plan) if layer.bound.sites[s].format is not None]
    for kind, one, other in zip(("prefill", "decode"), aimet["graphs"], qdq["graphs"], strict=True):
        graph = onnx.load(tmp_path / "export_aimet" / one["file"])
        content = json.loads((tmp_path / "export_aimet" / one["encodings"]["file"]).read_text())
        check(content, graph.graph)
        assert not {n.op_type for n in graph.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
        assert one["encodings"]["activation"] == len(content["activation_encodings"])
        encoded = {e["name"] for e in content["activation_encodings"]}
        if kind == "prefill":
            assert {f"layers.0.{s}" for s in sites} <= encoded
        given = first_token(inputs) if kind == "decode" else inputs
        ours = run_graph(onnx.load(tmp_path / "export_onnx" / other["file"]), given)
        theirs = run_graph(applied(graph, content), given, optimized=False)
        step = float(layer.scales.as_dict()["state"].max())
        assert abs(theirs["new_state"] - ours["new_state"]).max() <= 1.001 * step, kind  # a code at a boundary
        assert abs(theirs["output"] - ours["output"]).max() <= 1e-4 * abs(ours["output"]).max(), kind
        assert abs(run_graph(graph, given)["output"] - ours["output"]).max() > 0  # the encodings do something


def test_encodings_are_the_calibrated_scales(random_model, tmp_path):
    recipe = load_recipe("int8", PER_TENSOR)
    model, layer, _ = calibrated(random_model, recipe)
    export_aimet(model, recipe, tmp_path / "x", layer=0, chunks=1)
    content = json.loads((tmp_path / "x" / "layers.0.prefill.encodings").read_text())
    found = {e["name"]: e for e in content["activation_encodings"]}
    for site, scale in layer.scales.items():
        assert found[f"layers.0.{site}"]["scale"] == [float(scale)]
        assert found[f"layers.0.{site}"]["bw"] == 8
    assert found["layers.0.state.1"]["scale"] == found["layers.0.state"]["scale"]
    coefficient = found["layers.0.q_k.coefficient"]
    assert (coefficient["bw"], coefficient["is_sym"], coefficient["scale"]) == (16, False, [2.0**-15])


def test_weights_of_projections(random_model, tmp_path):
    """Codes times scales are the weight that the encodings stand for."""
    recipe = load_recipe("w8a8", W4)
    model, layer, _ = calibrated(random_model, recipe)
    manifest = export_aimet(model, recipe, tmp_path / "x", layer=0, chunks=1)
    content = json.loads((tmp_path / "x" / manifest["projections"]["file"]).read_text())
    check(content, None)
    found = {e["name"]: e for e in content["param_encodings"]}
    prefix = "model.layers.0.linear_attn"
    assert set(found) == {f"{prefix}.{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
    qkv, z = found[f"{prefix}.in_proj_qkv.weight"], found[f"{prefix}.in_proj_z.weight"]
    assert (qkv["bw"], qkv["enc_type"], len(qkv["scale"])) == (8, "PER_CHANNEL", layer.in_proj_qkv.out_features)
    assert (z["bw"], z["enc_type"], z["block_size"]) == (4, "PER_BLOCK", 32)
    weight = layer.in_proj_z.original.weight.detach()
    steps = torch.tensor(z["scale"]).reshape(len(weight), -1).repeat_interleave(32, dim=1)
    assert torch.equal((weight / steps).round().clamp(-7, 7), layer.in_proj_z.codes.float())


def test_rotations_are_weights_that_eight_bits_hold(random_model, tmp_path):
    recipe = load_recipe("int4-static")
    model, _, _ = calibrated(random_model, recipe)
    export_aimet(model, recipe, tmp_path / "x", layer=0, chunks=1)
    (entry,) = json.loads((tmp_path / "x" / "layers.0.prefill.encodings").read_text())["param_encodings"]
    graph = onnx.load(tmp_path / "x" / "layers.0.prefill.onnx").graph
    matrix = numpy_helper.to_array(next(x for x in graph.initializer if x.name == entry["name"]))
    assert abs(abs(matrix / entry["scale"][0]) - 1).max() < 1e-6


def test_refusals_are_those_of_onnx(random_model, tmp_path):
    recipe, model = load_recipe("int4"), random_model()
    quantize_model(model, recipe)
    with pytest.raises(QDeltaNetError, match="dynamic scales at q, k, A"):
        export_aimet(model, recipe, tmp_path / "x")
    assert not (tmp_path / "x").exists()

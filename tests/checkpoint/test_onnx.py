"""The delta rule in ONNX Runtime: the codes of fake quantization, the structure of the graphs, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_runs import TOKENS, calibrated, fake_codes, first_token, run_graph, showing, site_codes

from qdeltanet.calib import calibrate
from qdeltanet.checkpoint.onnx import export_onnx, run_in_onnxruntime
from qdeltanet.checkpoint.onnx.inverse import run_whole
from qdeltanet.checkpoint.onnx.rule import write_rule
from qdeltanet.checkpoint.onnx.runtime import session
from qdeltanet.checkpoint.onnx.sites import QdqSites
from qdeltanet.core import FloatArithmetic, Operand, QDeltaNetError
from qdeltanet.delta_rule import rule_sites
from qdeltanet.eval.embedded import model_path
from qdeltanet.inverse import METHODS, invert
from qdeltanet.inverse import plan as make_plan
from qdeltanet.models import load_model, quantize_model, set_execution
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import samples_for

GOLDEN = Path(__file__).parent / "onnx_graphs.json"
RECIPES = {
    "int8": ("int8", ()),
    "per_tensor": ("int8", ("sites.*.granularity=per_tensor", "inverse.granularity=per_tensor")),
    "int16": ("int16", ()),
    "int4-inverse": ("int4-inverse", ()),
    "neumann-int8": ("neumann-int8", ()),
    "neumann-int16": ("neumann-int16", ()),
    "int4-static": ("int4-static", ()),
    "int6": ("int8", ("sites.*.format=int6", "inverse.format=int6")),
    "feedback": ("int8", ("sites.state.feedback=int8",)),
    "float v": ("int8", ("sites.v_beta.format=float",)),
}
# Of all codes, those that may differ from fake quantization's: a graph sums dequantized codes in float32, so a value
# that lies next to a rounding boundary can fall on the other side of it, and what reads it follows.
DIFFERING = {"int16": 0.03, "neumann-int16": 0.03, "int4-static": 0.03}
BOUNDARY = 2.0**-20  # how far from the boundary, as a part of the largest value at the site


def recipe_of(name: str):
    base, overrides = RECIPES[name]
    return load_recipe(base, overrides)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_codes_are_those_of_fake_quantization(random_model, name, kind):
    _, layer, inputs = calibrated(random_model, recipe_of(name))
    inputs = first_token(inputs) if kind == "decode" else inputs
    model = write_rule(layer, kind, QdqSites(), {}, chunks=2)
    found = run_graph(showing(model), inputs)
    codes, output, state = fake_codes(layer, inputs, kind == "decode")
    names = [n for n in site_codes(model) if n in codes]
    assert {n.split(".")[2] for n in names} >= {"q", "k", "v_new", "w", "attn", "state"}
    differing, total, first = 0, 0, True
    for n in names:
        got = torch.from_numpy(found[f"{n}.int32"])
        assert got.shape == codes[n].shape, n
        wrong = (got - codes[n]).abs() > 0
        if first and wrong.any():
            assert_on_a_boundary(model, found, n, wrong)
            first = False
        differing, total = differing + int(wrong.sum()), total + wrong.numel()
    limit = DIFFERING.get(name, 1e-3)
    assert differing <= limit * total, (differing, total)
    assert torch.allclose(torch.from_numpy(found["output"]), output, rtol=0, atol=limit * float(output.abs().max()))
    assert torch.allclose(torch.from_numpy(found["new_state"]), state, rtol=0, atol=limit * float(state.abs().max()))


@pytest.mark.parametrize("name", ["int8", "int6", "int16"])
def test_clipping_is_ours(random_model, name):
    """Values far beyond the calibrated ranges end at -qmax and qmax, not at the ends of the container."""
    _, layer, inputs = calibrated(random_model, recipe_of(name))
    loud = inputs | {"value": 8 * inputs["value"], "state": 100 * inputs["state"]}
    model = write_rule(layer, "prefill", QdqSites(), {}, chunks=2)
    found, codes = run_graph(showing(model), loud), fake_codes(layer, loud, False)[0]
    for site in ("v_beta", "state", "v_new"):
        fmt = layer.bound.sites[site].held
        got, expected = torch.from_numpy(found[f"layers.0.{site}.codes.int32"]), codes[f"layers.0.{site}.codes"]
        assert (int(got.min()), int(got.max())) == (fmt.qmin, fmt.qmax)
        assert float((got != expected).double().mean()) <= DIFFERING.get(name, 1e-3), site


def constant(graph: onnx.GraphProto, name: str) -> torch.Tensor:
    return torch.tensor(numpy_helper.to_array(next(x for x in graph.initializer if x.name == name)).astype("float32"))


def assert_on_a_boundary(model, found, name, wrong):
    """Codes that differ where nothing before them did are off by one, next to a half."""
    node = next(n for n in model.graph.node if n.output[0] == name)
    scale, x = constant(model.graph, node.input[1]), torch.from_numpy(found[node.input[0]])
    if scale.dim() == 1:
        axis = next(a.i for a in node.attribute if a.name == "axis")
        scale = scale.reshape([-1 if i == axis else 1 for i in range(x.dim())])
    value = (x / scale).double()
    to_half = (value - value.floor() - 0.5).abs()[wrong]
    assert float(to_half.max()) <= BOUNDARY * float(value.abs().max()), name


@pytest.mark.parametrize("name", ["int8", "int4-static"])
def test_optimizations_change_nothing(random_model, name):
    _, layer, inputs = calibrated(random_model, recipe_of(name))
    model = write_rule(layer, "prefill", QdqSites(), {}, chunks=2)
    plain, optimized = (run_graph(model, inputs, optimized) for optimized in (False, True))
    assert all((plain[key] == optimized[key]).all() for key in plain)


@pytest.mark.parametrize("method", METHODS)
def test_whole_matrices_give_what_blocks_give(method):
    """Every plan that a recipe can name, on a matrix with large entries."""
    plan = make_plan(method, 32)
    A = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1) * 0.3
    if not plan.steps:
        return
    T = run_whole(plan, Operand("A", A), arithmetic=FloatArithmetic()).codes
    assert torch.allclose(T + torch.eye(32), invert(A, plan), rtol=1e-12, atol=1e-12)


def structure(model: onnx.ModelProto) -> dict[str, object]:
    kinds = {n.output[0]: n.op_type for n in model.graph.node}
    types = {x.name: TensorProto.DataType.Name(x.type.tensor_type.elem_type) for x in model.graph.value_info}
    counts = {op: list(kinds.values()).count(op) for op in sorted(set(kinds.values()))}
    return {"operations": counts, "codes": {n: types[n] for n in site_codes(model)}}


@pytest.mark.parametrize("name", ["int8", "int16", "neumann-int8", "int4-static"])
def test_golden_structure(random_model, name):
    """Operations, and the tensors of codes with their types. To accept a change: delete the file and run this."""
    _, layer, _ = calibrated(random_model, recipe_of(name))
    graphs = {kind: write_rule(layer, kind, QdqSites(), {}, chunks=2) for kind in ("prefill", "decode")}
    found = {kind: structure(graph) for kind, graph in graphs.items()}
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if name not in known:
        GOLDEN.write_text(json.dumps(known | {name: found}, indent=1) + "\n")
        pytest.fail(f"wrote {name} into {GOLDEN.name}")
    assert found == known[name]
    for graph in graphs.values():
        ranks = [len(x.type.tensor_type.shape.dim) for x in graph.graph.value_info]
        assert max(ranks) <= 5
        assert not {n.op_type for n in graph.graph.node} & {"Scan", "Loop", "If", "Einsum", "ScatterND", "Trilu"}


def test_names_and_scales(random_model):
    _, layer, _ = calibrated(random_model, recipe_of("int8"), layer=1)
    graph = write_rule(layer, "prefill", QdqSites(), {"made of": "x"}, chunks=2).graph
    tensors = {name for node in graph.node for name in node.output}
    for site in rule_sites(layer.scheme.plan):
        assert {f"layers.1.{site}", f"layers.1.{site}.codes"} <= tensors
        assert torch.equal(constant(graph, f"layers.1.{site}.scale"), layer.scales.as_dict()[site].flatten())
        assert not constant(graph, f"layers.1.{site}.zero_point").any()
    assert {"layers.1.v_new.1", "layers.1.state.2"} <= tensors  # of the second chunk
    assert [x.name for x in graph.input] == ["query", "key", "value", "g", "beta", "state"]
    assert [x.name for x in graph.output] == ["output", "new_state"]


def test_a_whole_model_in_onnxruntime(tmp_path):
    """What tiny-recall answers is the same after the export, and its logits differ less than by quantization."""
    recipe = load_recipe("int8")
    model = load_model(model_path("tiny-recall"))
    data = samples_for("tiny-recall", None, 32, None)
    calibrate(model, recipe, data)
    tokens = data.tokens[:8, :100]  # no whole number of chunks
    logits = {}
    with torch.no_grad():
        for execution in ("float", "fake"):
            set_execution(model, execution)
            logits[execution] = model(tokens, use_cache=False).logits
        manifest = export_onnx(model, recipe, tmp_path / "graphs", chunks=1)
        assert run_in_onnxruntime(model, tmp_path / "graphs") == [0, 1]
        logits["onnx"] = model(tokens, use_cache=False).logits
        set_execution(model, "fake")
        assert torch.equal(model(tokens, use_cache=False).logits, logits["fake"])
    assert [(g["layer"], g["kind"]) for g in manifest["graphs"]] == [
        (i, k) for i in (0, 1) for k in ("prefill", "decode")
    ]
    right = {name: (x[:, 32:-1:2].argmax(-1) == tokens[:, 33::2]).float().mean() for name, x in logits.items()}
    assert right["onnx"] == right["fake"] > 0.9
    error = {name: (logits[name] - logits["fake"]).norm() for name in ("float", "onnx")}
    assert error["onnx"] < 0.5 * error["float"]


@pytest.mark.parametrize("name", ["int8", "int4-static"])
def test_decoding_in_onnxruntime(random_model, tmp_path, name):
    """A prompt, then tokens one by one from the cache, as fake quantization has them."""
    model, _, _ = calibrated(random_model, recipe_of(name))
    export_onnx(model, recipe_of(name), tmp_path / "graphs", chunks=1)

    def steps() -> torch.Tensor:
        with torch.no_grad():
            prompt = model(TOKENS[:2, :70], use_cache=True)
            logits, cache = [prompt.logits[:, -1:]], prompt.past_key_values
            for t in range(70, 73):
                logits.append(model(TOKENS[:2, t : t + 1], past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, dim=1)

    set_execution(model, "fake")
    fake = steps()
    run_in_onnxruntime(model, tmp_path / "graphs")
    assert torch.allclose(steps(), fake, rtol=0, atol=2e-3 * float(fake.abs().max()))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (("int4",), "layers.0 has no form in ONNX: dynamic scales at q, k, A, T, .* use a recipe with static scales"),
        (("int8", ("requantize=fixed_point",)), "fixed_point rounds halves away from zero"),
        (("int8", ("decay=exp2",)), "use decay: exp"),
        (("float",), "recipe float leaves the rule in float"),
    ],
)
def test_recipes_without_a_form(random_model, tmp_path, recipe, says):
    chosen, model = load_recipe(*recipe), random_model()
    quantize_model(model, chosen)
    with pytest.raises(QDeltaNetError, match=says):
        export_onnx(model, chosen, tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


def test_layers_and_sizes(random_model, tmp_path):
    recipe, model = (
        load_recipe("int8", ["layers.1.sites.*.format=float", "layers.1.inverse.format=float"]),
        random_model(),
    )
    with pytest.raises(QDeltaNetError, match="not quantized"):
        export_onnx(model, recipe, tmp_path / "x")
    quantize_model(model, recipe)
    with pytest.raises(QDeltaNetError, match="layer 3 is no Gated DeltaNet; those of this model are 0, 1, 2"):
        export_onnx(model, recipe, tmp_path / "x", layer=3)
    with pytest.raises(QDeltaNetError, match="leaves the rule of layer 1 in float"):
        export_onnx(model, recipe, tmp_path / "x", layer=1)
    with pytest.raises(QDeltaNetError, match="chunks 0: must be at least 1"):
        export_onnx(model, recipe, tmp_path / "x", chunks=0)
    manifest = export_onnx(model, recipe, tmp_path / "x", chunks=1)
    assert {g["layer"] for g in manifest["graphs"]} == {0, 2}
    with pytest.raises(QDeltaNetError, match="--overwrite"):
        export_onnx(model, recipe, tmp_path / "x")


def test_damaged_and_foreign_folders(random_model, tmp_path):
    recipe, model = load_recipe("int8"), random_model()
    quantize_model(model, recipe)
    folder = tmp_path / "graphs"
    with pytest.raises(QDeltaNetError, match="no ONNX export"):
        run_in_onnxruntime(model, folder)
    export_onnx(model, recipe, folder, chunks=1)
    with (folder / "layers.0.decode.onnx").open("ab") as file:
        file.write(b"x")
    (folder / "layers.1.prefill.onnx").unlink()
    with pytest.raises(QDeltaNetError) as error:
        run_in_onnxruntime(model, folder)
    assert "layers.0.decode.onnx is not the file that was exported" in str(error.value)
    assert "layers.1.prefill.onnx is missing" in str(error.value)
    manifest = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**manifest, "format": "aimet"}))
    with pytest.raises(QDeltaNetError, match="this qdeltanet runs onnx version 1"):
        run_in_onnxruntime(model, folder)
    export_onnx(model, recipe, folder, chunks=1, batch=2, overwrite=True)
    with pytest.raises(QDeltaNetError, match=r"graphs of layers \[0, 1, 2\], which the model lacks"):
        run_in_onnxruntime(load_model(model_path("tiny-recall")), folder)
    run_in_onnxruntime(model, folder)
    with pytest.raises(QDeltaNetError, match="batches of 2, here are 1 sequences"):
        model(TOKENS[:1, :8], use_cache=False)


def test_missing_packages_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(QDeltaNetError, match=r"needs onnxruntime: pip install 'qdeltanet\[onnx\]'"):
        session(tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [n for n in sys.modules if n.startswith("qdeltanet.checkpoint.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(QDeltaNetError, match=r"needs the package onnx: pip install 'qdeltanet\[onnx\]'"):
        importlib.import_module("qdeltanet.checkpoint.onnx")

"""Hessians to the bit whatever the order, and GPTQ from the data to the codes that a model executes."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qdeltanet.calib import calibrate, load_samples
from qdeltanet.calib.data import Samples
from qdeltanet.calib.weights import Hessians
from qdeltanet.checkpoint import Calibration, calibrate_weights, export_checkpoint, load_calibration, needs_calibration
from qdeltanet.core import Granularity, IntFormat, NonFiniteError, ProjectionScheme, QDeltaNetError, SiteScheme
from qdeltanet.eval.embedded import DATASETS, model_path
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.models import QuantizedLayer, load_model, load_tokenizer, quantize_model, quantized_layers, set_execution
from qdeltanet.nn import QuantLinear, quantize_weight
from qdeltanet.recipe import Recipe, parse_recipe

GPTQ = {"weight": "int4", "group": 32, "method": "gptq"}
FLOAT_RULE = {"sites": {"*": {"format": "float"}}, "inverse": {"method": "block_merge", "format": "float"}}
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def layer() -> QuantizedLayer:
    scheme = ProjectionScheme(IntFormat(4), SiteScheme(None, "dynamic", Granularity.PER_TOKEN), 4, "gptq")
    return QuantizedLayer(2, projections={n: QuantLinear(8, 6, scheme, nn.Linear(8, 6, bias=False)) for n in NAMES})


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Inputs of attention and of the MLP, of sizes that lie nine orders of magnitude apart."""
    make = torch.Generator().manual_seed(0)
    sizes = [1.0, 1e-4, 1e3, 3e4, 1e-3, 2.0, 0.1, 500.0]
    return [(torch.randn(2, 5, 8, generator=make) * s, torch.randn(2, 5, 8, generator=make)) for s in sizes[:count]]


def show(watcher: Hessians, attention: Tensor, mlp: Tensor) -> None:
    watcher.site("q", attention, False)
    watcher.projection(NAMES[0], attention)
    watcher.projection(NAMES[1], attention)
    watcher.projection(NAMES[2], mlp)


def moved(watcher: Hessians) -> dict[str, Any]:
    """Its state, having been to disk."""
    state = watcher.state()
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    return json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, Tensor)})) | tensors


@given(st.permutations(range(6)), st.lists(st.integers(0, 2), min_size=6, max_size=6), st.permutations(range(3)))
def test_any_order_and_any_parts_give_the_same_bits(order, parts, merged):
    whole, data = Hessians(layer()), batches()
    for pair in data:
        show(whole, *pair)
    watchers = [Hessians(layer()) for _ in range(3)]
    for i in order:
        show(watchers[parts[i]], *data[i])
    total = Hessians(layer())
    for i in merged:
        total.merge(moved(watchers[i]))
    assert total.state()["sharing"] == whole.state()["sharing"]
    for name in NAMES:
        assert torch.equal(total.hessian(name), whole.hessian(name))


def test_hessians_are_products_of_inputs_and_shared_ones_are_kept_once():
    watcher, data = Hessians(layer()), batches()
    for pair in data:
        show(watcher, *pair)
    for k, name in ((0, NAMES[0]), (0, NAMES[1]), (1, NAMES[2])):
        rows = torch.cat([pair[k].flatten(0, 1) for pair in data]).double()
        expected = rows.T @ rows
        limit = 1e-6 * expected.diagonal().sqrt()[:, None] * expected.diagonal().sqrt()  # float32 products
        assert bool(((watcher.hessian(name) - expected).abs() <= limit).all())
        assert torch.equal(watcher.hessian(name), watcher.hessian(name).T)
    kept = {key.partition("@")[0] for key in watcher.state() if key != "sharing"}
    assert kept == {NAMES[0], NAMES[2]}


def test_inputs_are_not_kept():
    watcher, (attention, mlp) = Hessians(layer()), batches(1)[0]
    show(watcher, attention, mlp)
    seen = weakref.ref(mlp)
    del mlp
    assert seen() is None


def test_a_merged_state_goes_on():
    first, whole, data = Hessians(layer()), Hessians(layer()), batches()
    for i, pair in enumerate(data):
        show(whole, *pair)
        show(first, *pair)
        if i == 2:
            state = moved(first)
            first = Hessians(layer())
            first.merge(state)
    assert all(torch.equal(first.hessian(n), whole.hessian(n)) for n in NAMES)
    fresh = Hessians(layer())
    first.merge(fresh.state())  # nothing is no change
    assert all(torch.equal(first.hessian(n), whole.hessian(n)) for n in NAMES)
    with pytest.raises(QDeltaNetError, match=r"layers.2.mlp.down_proj: no input reached it"):
        fresh.hessian(NAMES[2])


def test_what_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match=r"layer 2, site self_attn.k_proj: NaN or Inf"):
        Hessians(layer()).projection(NAMES[1], torch.full((3, 8), float("nan")))


# -- in a calibration --------------------------------------------------------------------------------------------------


def recipe(**methods: str) -> Recipe:
    chosen = {role: {**GPTQ, "method": method} for role, method in methods.items()}
    return parse_recipe(
        {"version": 1, **FLOAT_RULE, "projections": {r.replace("_", "."): c for r, c in chosen.items()}}
    )


ALL = {"proj_qkv": "gptq", "proj_z": "gptq", "proj_out": "gptq", "attn_q": "gptq", "mlp_gate": "gptq", "mlp_up": "mse"}


def samples(count: int, seed: int) -> Samples:
    tokens = torch.randint(0, 100, (count, 80), generator=torch.Generator().manual_seed(seed))
    return Samples("random", tokens, "digest")


def calibrated(model: Any, chosen: Recipe, batch_size: int = 4, count: int = 12) -> Calibration:
    return calibrate(model, chosen, samples(count, seed=1), model_name="random", batch_size=batch_size)


@torch.no_grad()
def test_gptq_is_real_on_inputs_that_it_has_not_seen():
    """A trained model: of every projection the outputs for other text."""
    path, tokenizer = model_path("tiny-hybrid"), load_tokenizer(model_path("tiny-hybrid"))
    calibrating, others = (load_samples(str(DATASETS["bytes"]), tokenizer, 8, 256, seed=seed) for seed in (1, 2))
    model = load_model(path)
    calibrate(model, recipe(**ALL), calibrating)
    ratio: dict[str, list[float]] = {method: [] for method in ("gptq", "mse")}
    for projection, inputs in _inputs(model, others.tokens[:4]):
        weight = projection.original.weight
        codes, scale = quantize_weight(weight, IntFormat(4), 32)
        rtn = (codes.float().view(len(weight), -1, 32) * scale[..., None]).flatten(1)
        error = [float((inputs @ (w - weight).T).square().sum()) for w in (projection.dequantized(), rtn)]
        ratio[projection.scheme.method].append(error[0] / error[1])
        if projection.scheme.method == "gptq":
            assert float((projection.codes != codes).float().mean()) > 0.1
    assert len(ratio["gptq"]) == 14
    assert max(ratio["gptq"]) < 0.9
    assert sum(ratio["gptq"]) / 14 < 0.6
    assert max(ratio["mse"]) < 1


def _inputs(model: Any, tokens: Tensor) -> list[tuple[QuantLinear, Tensor]]:
    """Every quantized projection with its inputs [tokens, in] in float."""
    seen: list[tuple[QuantLinear, Tensor]] = []
    projections = [m for m in model.modules() if isinstance(m, QuantLinear)]
    hooks = [m.register_forward_hook(lambda m, x, _: seen.append((m, x[0].flatten(0, -2)))) for m in projections]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_calibration_carries_codes_and_every_reader_takes_them(random_model, tmp_path):
    plain = random_model()
    plain.save_pretrained(tmp_path / "float")
    model, chosen = load_model(str(tmp_path / "float")), recipe(**ALL)
    calibration = calibrated(model, chosen)
    assert {k.rpartition(".")[0] for k in calibration.weights} == {
        *(f"layers.{i}.{n}" for i in range(3) for n in ("in_proj_qkv", "in_proj_z", "out_proj")),
        *(f"layers.{i}.mlp.gate_proj" for i in range(4)),
        "layers.3.self_attn.q_proj",
    }
    set_execution(model, "integer")
    tokens = samples(2, seed=3).tokens
    with torch.no_grad():
        expected = model(tokens).logits
        calibration.save(tmp_path / "cal")
        again = load_calibration(tmp_path / "cal")
        assert torch.equal(prepare_model(str(tmp_path / "float"), chosen, again)(tokens).logits, expected)
        export_checkpoint(model, chosen, tmp_path / "ckpt")
        assert torch.equal(load_model(str(tmp_path / "ckpt"))(tokens).logits, expected)


def test_methods_without_data_write_no_weights(random_model, tmp_path):
    calibration = calibrated(random_model(), recipe(attn_q="rtn", mlp_up="mse"))
    assert calibration.weights == {}
    calibration.save(tmp_path / "cal")
    assert not (tmp_path / "cal" / "weights.safetensors").exists()


def test_gptq_needs_a_calibration(random_model, tmp_path):
    for method, needed in (("gptq", True), ("mse", False)):
        model, chosen = random_model(), recipe(mlp_up=method)
        quantize_model(model, chosen)
        assert needs_calibration(quantized_layers(model)) is needed
        assert chosen.codes_by_data is needed
    model = random_model()
    quantize_model(model, recipe(mlp_up="gptq"))
    with pytest.raises(QDeltaNetError, match=r"lacks the weights of layers.0.mlp.up_proj, whose method is gptq"):
        calibrate_weights(quantized_layers(model))
    random_model().save_pretrained(tmp_path)
    with pytest.raises(QDeltaNetError, match=r"unnamed has weights coded by GPTQ: pass --calibration"):
        prepare_model(str(tmp_path), recipe(mlp_up="gptq"))
    prepare_model(str(tmp_path), recipe(mlp_up="gptq"), execution="float")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("shape", r"weights of layers.1.mlp.up_proj \(torch.int8 \[2, 64\], .* do not fit"),
        ("range", r"weights of layers.1.mlp.up_proj .* their format"),
        ("scale", r"weights.safetensors: layers.1.mlp.up_proj.scale: scales must be finite"),
        ("truncated", "damaged"),
        ("gone", r"lacks the weights of layers.0.mlp.up_proj"),
    ],
)
def test_damaged_weights_are_refused(random_model, tmp_path, damage, says):
    calibration = calibrated(random_model(), recipe(mlp_up="gptq"), count=2)
    weights = dict(calibration.weights)
    if damage == "shape":
        weights["layers.1.mlp.up_proj.codes"] = weights["layers.1.mlp.up_proj.codes"][:2]
    elif damage == "range":
        weights["layers.1.mlp.up_proj.codes"] = weights["layers.1.mlp.up_proj.codes"] * 2
    elif damage == "scale":
        weights["layers.1.mlp.up_proj.scale"] = weights["layers.1.mlp.up_proj.scale"] * float("nan")
    Calibration(calibration.recipe, calibration.scales, calibration.report, weights).save(tmp_path / "cal")
    file = tmp_path / "cal" / "weights.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "gone":
        file.unlink()
    with pytest.raises(QDeltaNetError, match=says):
        load_calibration(tmp_path / "cal").apply(random_model())

"""Attention and MLP projections by a recipe's roles: what is replaced, how it executes, and that it comes back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_families
import torch
from torch import nn

from qdeltanet.checkpoint import calibrate_weights, export_checkpoint
from qdeltanet.core import BindingError, QDeltaNetError
from qdeltanet.models import load_model, model_fingerprint, quantize_model, quantized_layers, set_execution
from qdeltanet.models.linears import EXPERTS_STAY
from qdeltanet.nn import QuantLinear
from qdeltanet.recipe import parse_recipe

TOKENS = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(0))
W4A8 = {"weight": "int4", "group": 32}
W4A16 = {**W4A8, "activation": "float", "method": "mse"}
EVERYWHERE = ("proj.*", "attn.*", "mlp.*")


def recipe(projections: dict[str, Any], rule: str = "float") -> Any:
    """Projections over a rule of one format."""
    inverse = {"method": "block_merge", "format": rule, "scale": "dynamic"}
    sites = {"*": {"format": rule, "scale": "dynamic"}}
    return parse_recipe({"version": 1, "sites": sites, "inverse": inverse, "projections": projections})


def quantized(model: Any, projections: dict[str, Any], rule: str = "float") -> Any:
    quantize_model(model, recipe(projections, rule))
    calibrate_weights(quantized_layers(model))
    return model


def found(model: Any) -> dict[int, set[str]]:
    return {i: set(layer.projections) for i, layer in quantized_layers(model).items()}


def test_roles_name_linears_and_globs_name_roles(random_model):
    model = random_model()
    quantize_model(model, recipe({"attn.*": W4A8, "attn.k": None, "mlp.down": {}, "proj.[zq]*": {}}))
    attention = {"self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"}
    linear = {"in_proj_qkv", "in_proj_z", "mlp.down_proj"}
    assert found(model) == {0: linear, 1: linear, 2: linear, 3: attention}
    layers = quantized_layers(model)
    assert layers[3].projections["self_attn.q_proj"].group == 32
    assert layers[3].projections["mlp.down_proj"].group == 128
    assert layers[3].delta_net is None


def test_layers_can_differ(random_model):
    model = random_model()
    content = recipe({"mlp.up": {}}).model_dump(mode="json", exclude_none=True)
    content["layers"] = {"1": {"projections": {"mlp.up": None}}, "3": {"projections": {"mlp.up": W4A8}}}
    quantize_model(model, parse_recipe(content))
    weights = {i: x.projections["mlp.up_proj"].scheme.weight.bits for i, x in quantized_layers(model).items() if i != 1}
    assert weights == {0: 8, 2: 8, 3: 4}
    assert quantized_layers(model)[1].projections == {}


@torch.no_grad()
def test_float_execution_is_untouched(random_model):
    expected = random_model()(TOKENS).logits
    model = random_model()
    quantized(model, dict.fromkeys(EVERYWHERE, W4A8))
    # only the rule's sums are in another order
    assert (model(TOKENS).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("rule", ["float", "int8"])
@pytest.mark.parametrize("config", [W4A8, W4A16, {}], ids=["w4a8", "w4a16", "w8a8"])
@torch.no_grad()
def test_execution_of_projections_alone_and_with_the_rule(random_model, config, rule):
    model = quantized(random_model(), dict.fromkeys(("attn.*", "mlp.*"), config), rule)
    exact = model(TOKENS).logits
    set_execution(model, "integer", "reference")
    logits = model(TOKENS).logits
    assert not torch.equal(logits, exact)
    assert (logits - exact).norm() < 0.5 * exact.norm()
    for execution in ("integer", "fake"):
        set_execution(model, execution)
        assert torch.equal(model(TOKENS).logits, logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_checkpoint_brings_codes_groups_and_biases_back(tmp_path, dtype):
    torch.manual_seed(0)
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    plain = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**tiny_families.TEXT, head_dim=32, attention_bias=True)).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("bias") and parameter.dim() == 1:
            parameter.normal_()
    plain.save_pretrained(tmp_path / "float")
    chosen = {"attn.*": W4A8, "mlp.*": W4A16, "proj.*": {}}
    model = load_model(str(tmp_path / "float"), dtype)
    fingerprint = model_fingerprint(model)
    quantized(model, chosen, "int8")
    assert quantized_layers(model)[2].projections["self_attn.q_proj"].bias is not None
    assert model_fingerprint(model) == fingerprint
    set_execution(model, "integer")
    logits = model(TOKENS).logits
    export_checkpoint(model, recipe(chosen, "int8"), tmp_path / "ckpt")
    loaded = load_model(str(tmp_path / "ckpt"), "auto")
    assert found(loaded) == found(model)
    assert torch.equal(loaded(TOKENS).logits, logits)
    assert all(m.original is None for m in loaded.modules() if isinstance(m, QuantLinear))


@torch.no_grad()
def test_experts_stay_in_float_and_that_is_said_once():
    torch.manual_seed(0)
    model = tiny_families.qwen3_5_moe().eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quantized(model, {"mlp.*": {"weight": "int8"}})
    assert [str(w.message) for w in said].count(EXPERTS_STAY) == 1
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert all(names == shared for names in found(model).values())
    set_execution(model, "integer")
    assert bool(torch.isfinite(model(TOKENS).logits).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(tiny_families.qwen3_5_moe(), recipe({"attn.*": {}, "proj.*": {}}))


def test_a_vision_tower_is_left_alone():
    model = tiny_families.qwen3_5_multimodal()
    before = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantize_model(model, recipe({role: {} for role in EVERYWHERE}))
    after = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {n for n in before if ".layers." in n} == after
    assert any("visual" in n for n in before - after)


def test_what_does_not_fit_is_named(random_model):
    with pytest.raises(BindingError, match=r"layer 0, mlp.gate_proj: projection of 64 inputs: groups of 48 do not"):
        quantize_model(random_model(), recipe({"mlp.*": {"weight": "int4", "group": 48}}))
    model = random_model()
    quantize_model(model, recipe({}))
    with pytest.raises(BindingError, match="quantizes nothing"):
        set_execution(model, "integer")


@pytest.mark.parametrize(
    ("projections", "says"),
    [
        ({"mlp.gaet": {}}, "unknown projection 'mlp.gaet'; did you mean mlp.gate"),
        ({"mlp.*": {"weight": "float"}}, "write null in its place"),
        ({"mlp.*": {"activation": "float", "scale": "calibrated"}}, "no scale to calibrate"),
        ({"mlp.*": {"weight": "int99"}}, "bits must be in 2..16"),
        ({"mlp.*": {"group": 0}}, "greater than or equal to 1"),
        ({"mlp.*": {"method": "gtpq"}}, "'rtn', 'mse' or 'gptq'"),
        ({"mlp.*": {"grop": 32}}, "did you mean group"),
    ],
)
def test_recipes_that_are_wrong(projections, says):
    with pytest.raises(QDeltaNetError, match=says):
        recipe(projections)


def test_roles_that_a_family_lacks_are_named():
    with pytest.warns(
        UserWarning, match=r"the recipe's attn\.k, attn\.o, attn\.q, attn\.v, mlp\.down: this family has no"
    ):
        quantize_model(tiny_families.tiny("delta_net"), recipe(dict.fromkeys(EVERYWHERE, W4A8)))

"""The quantized layer against transformers' own: padding, cache, generate, execution."""

from __future__ import annotations

import pytest
import torch

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.core import BindingError, NonFiniteError, QDeltaNetError
from qdeltanet.models import delta_net_layers, quantize_model, set_execution
from qdeltanet.recipe import load_recipe

TOLERANCE = 1e-5  # float32 sums in another order


def tokens(batch: int = 2, length: int = 130, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def samples(length: int = 130) -> Samples:
    return Samples("random", tokens(8, length, seed=1), "digest")


@pytest.fixture
def quantized(random_model):
    """Factory: a calibrated random hybrid in integer execution."""

    def make(recipe: str, *overrides: str):
        model = random_model()
        calibrate(model, load_recipe(recipe, overrides), samples(), batch_size=4)
        set_execution(model, "integer")
        return model

    return make


@torch.no_grad()
def test_float_execution_agrees_with_transformers(random_model):
    model, x = random_model(), tokens()
    mask = torch.ones_like(x)
    mask[1, :7] = 0
    plain, padded = model(x).logits, model(x, attention_mask=mask).logits
    quantize_model(model, load_recipe("int8"))
    assert (model(x).logits - plain).abs().max() < TOLERANCE
    assert (model(x, attention_mask=mask).logits - padded)[mask.bool()].abs().max() < TOLERANCE


@torch.no_grad()
def test_cache_prefill_decode_and_further_steps(random_model):
    model, x = random_model(), tokens()
    whole = model(x).logits
    quantize_model(model, load_recipe("int8"))
    first = model(x[:, :70], use_cache=True)
    second = model(x[:, 70:71], past_key_values=first.past_key_values)
    third = model(x[:, 71:], past_key_values=second.past_key_values)
    stepped = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert (stepped - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_generate_in_float_equals_transformers(random_model):
    model, x = random_model(), tokens(length=70)
    expected = model.generate(x, max_new_tokens=8, do_sample=False)
    quantize_model(model, load_recipe("int8"))
    assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("recipe", ["int8", "int16", "int4", "int4-inverse", "neumann-int8", "w8a8"])
@torch.no_grad()
def test_cpu_equals_reference_and_fake(quantized, recipe):
    model, x = quantized(recipe), tokens()
    logits = model(x).logits
    set_execution(model, "integer", "reference")
    assert torch.equal(model(x).logits, logits)
    set_execution(model, "fake")
    assert torch.equal(model(x).logits, logits)


@pytest.mark.parametrize("recipe", ["int8", "int16", "int4"])
@torch.no_grad()
def test_integer_state_carries_over_the_cache(quantized, recipe):
    """Chunks of 64 first or all at once: the state is cached as codes, so the rule's bits do not change. What is left
    is float attention and projections over other lengths."""
    model, x = quantized(recipe), tokens()
    whole = model(x).logits
    first = model(x[:, :64], use_cache=True)
    rest = model(x[:, 64:], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, rest.logits], dim=1) - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_integer_generate_runs_and_decodes_by_single_tokens(quantized):
    model, x = quantized("int8"), tokens(length=70)
    generated = model.generate(x, max_new_tokens=6, do_sample=False)
    assert generated.shape == (2, 76)


@torch.no_grad()
def test_batch_does_not_change_a_sequence(quantized):
    model, x = quantized("int4"), tokens()
    assert (model(x).logits[1:] - model(x[1:]).logits).abs().max() < TOLERANCE


def test_methods_can_differ_per_layer(random_model):
    model = random_model()
    recipe = load_recipe("int8", ["layers.1.inverse.method=neumann", "layers.1.inverse.residual_steps=4"])
    layers = quantize_model(model, recipe)
    assert layers[0].scheme.plan.method == "block_merge"
    assert layers[1].scheme.plan.method == "neumann"
    assert layers[1].scheme.plan.options["residual_steps"] == 4


@torch.no_grad()
def test_non_finite_activations_name_layer_and_site(quantized):
    model = quantized("int8")
    delta_net_layers(model)[1].in_proj_qkv.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"layer 1, site q: NaN or Inf"):
        model(tokens())


def test_float_recipe_refuses_integer_execution(random_model):
    model = random_model()
    quantize_model(model, load_recipe("float"))
    with pytest.raises(BindingError, match="quantizes nothing"):
        set_execution(model, "integer")


def test_missing_layers_and_unknown_family(random_model):
    model = random_model()
    quantize_model(model, load_recipe("int8"))
    with pytest.raises(QDeltaNetError, match="no Gated DeltaNet"):
        quantize_model(model, load_recipe("int8"))
    model.config.model_type = "gpt9"
    with pytest.raises(QDeltaNetError, match=r"gpt9.*qwen3_5.*add qdeltanet/models/gpt9.py"):
        quantize_model(model, load_recipe("int8"))


def test_int16_splits_into_bytes_for_32_bit_accumulators(random_model):
    quantize_model(random_model(), load_recipe("int16", ["accumulator_bits=32"]))


def test_static_projection_scales_and_weights(quantized):
    model = quantized("w8a8", "projections.proj.qkv.scale=calibrated")
    layer = delta_net_layers(model)[0]
    assert layer.in_proj_qkv.input_scale.item() > 0
    codes, scale = layer.in_proj_qkv.codes, layer.in_proj_qkv.scale
    assert codes.dtype == torch.int8
    assert int(codes.abs().amax()) == 127
    # Round to nearest: no weight is further from its code than half a step.
    error = (layer.in_proj_qkv.original.weight - codes * scale[:, None]).abs()
    assert bool((error <= 0.5001 * scale[:, None]).all())


def test_scales_stay_float32_when_the_model_changes_dtype(quantized):
    model = quantized("w8a8")
    layer = delta_net_layers(model)[0]
    before = {k: v.clone() for k, v in layer.scales.items()} | {"weight": layer.in_proj_qkv.scale.clone()}
    model.to(torch.bfloat16)
    after = layer.scales.as_dict() | {"weight": layer.in_proj_qkv.scale}
    assert layer.conv1d.weight.dtype == torch.bfloat16
    assert all(torch.equal(before[k], after[k]) for k in before)

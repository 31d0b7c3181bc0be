"""Every family: float agreement, calibration, integer execution, export and reload; and what only some of them have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_families import FAMILIES, tiny
from torch import nn

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.calib.inspect import capture, power_ranges
from qdeltanet.checkpoint import Calibration, export_checkpoint
from qdeltanet.core import BindingError, QDeltaNetError
from qdeltanet.models import adapter_for, delta_net_layers, load_model, model_fingerprint, quantize_model, set_execution
from qdeltanet.nn import QuantLinear
from qdeltanet.recipe import load_recipe

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
ALL = tuple(FAMILIES)
MULTIMODAL = ("qwen3_5_multimodal", "qwen3_5_moe_multimodal")
MODULES = {  # what w8a8's proj.qkv, proj.z and proj.out are
    "qwen3_next": {"in_proj_qkvz", "out_proj"},
    "olmo_hybrid": {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj"},
    "delta_net": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "delta_net_gated": {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj"},
}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def tokens(batch: int = 2, length: int = 130, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(input_ids=x, **options).logits


def stepwise(model: Any, x: torch.Tensor, *cuts: int) -> torch.Tensor:
    """Logits of x fed in pieces through the model's own cache."""
    parts, cache = [], None
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        out = model(input_ids=x[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def calibrated(family: str, recipe: str, *overrides: str) -> tuple[Any, Calibration]:
    model = tiny(family)
    data = Samples("random", tokens(4, seed=1), "digest")
    return model, calibrate(model, load_recipe(recipe, overrides), data)


@pytest.mark.parametrize("family", ALL)
def test_float_agrees_with_the_familys_own_layer(family):
    model, x = tiny(family), tokens()
    whole, short = logits(model, x), logits(model, x[:, :3])
    quantize_model(model, load_recipe("int8"))
    assert apart(logits(model, x), whole) < TOLERANCE
    # Prefill, one token, the rest; and a prefill shorter than the convolution.
    assert apart(stepwise(model, x, 70, 71), whole) < TOLERANCE
    assert apart(stepwise(model, x[:, :3], 2), short) < TOLERANCE


@pytest.mark.parametrize("family", ALL)
def test_left_padding_changes_nothing(family):
    model, x = tiny(family), tokens(1)
    quantize_model(model, load_recipe("int8"))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), x], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    assert apart(logits(model, padded, attention_mask=mask)[:, 5:], logits(model, x)) < TOLERANCE


@pytest.mark.parametrize("family", ALL)
def test_integers_equal_reference_and_fake_and_are_close_to_float(family):
    x = tokens()
    whole, without = logits(tiny(family), x), tiny(family)
    quantize_model(without, load_recipe("float", ["inverse.method=identity"]))
    felt = distance(logits(without, x), whole)
    assert felt > 0.2  # T = I: these models feel the inverse, or agreement would say nothing about it
    model, _ = calibrated(family, "int8")
    set_execution(model, "integer")
    found = logits(model, x)
    set_execution(model, "integer", "reference")
    assert torch.equal(logits(model, x), found)
    set_execution(model, "fake")
    assert torch.equal(logits(model, x), found)
    assert distance(found, whole) < felt / 10
    # The state is cached as codes: what is left is float attention and projections over other lengths.
    set_execution(model, "integer")
    assert apart(stepwise(model, x, 64), found) < TOLERANCE
    assert bool(stepwise(model, x, 128, 129).isfinite().all())


@pytest.mark.parametrize("family", ALL)
def test_integer_projections_survive_export_and_reload(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model, _ = calibrated(family, "w8a8")
    layer = delta_net_layers(model)[0]
    quantized = {name for name, m in layer.named_children() if isinstance(m, QuantLinear)}
    assert quantized == MODULES.get(family, {"in_proj_qkv", "in_proj_z", "out_proj"})
    set_execution(model, "integer")
    expected = logits(model, tokens())
    export_checkpoint(model, load_recipe("w8a8"), tmp_path / "ckpt")
    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "ckpt")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, tokens()), expected)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_images_reach_the_replaced_layers(family):
    model, x = tiny(family), tokens(1, 80).clamp(max=97)
    for config in (model.config, model.model.config):
        config.image_token_id, config.vision_start_token_id = 99, 98
    x[0, 10:15] = torch.tensor([98, 99, 99, 99, 99])
    pixels = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(0))  # 4 x 4 patches of 3 x 2 x 4 x 4
    image = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (x == 99).int()}
    expected = logits(model, x, pixel_values=pixels[0], **image)
    quantize_model(model, load_recipe("int8"))
    assert apart(logits(model, x, pixel_values=pixels[0], **image), expected) < TOLERANCE
    assert apart(logits(model, x, pixel_values=pixels[1], **image), expected) > 0.1


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_part_of_an_exported_multimodal_model(family, tmp_path):
    model, _ = calibrated(family, "int8")
    set_execution(model, "integer")
    export_checkpoint(model, load_recipe("int8"), tmp_path / "ckpt")
    content = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    assert content["architectures"] == [type(model).__name__]
    text = load_model(str(tmp_path / "ckpt"))
    assert type(text).__name__.endswith("ForCausalLM")
    assert torch.equal(logits(text, tokens()), logits(model, tokens()))


def test_a_damaged_multimodal_checkpoint_is_named_in_the_names_of_the_text_model(tmp_path):
    model, _ = calibrated("qwen3_5_multimodal", "int8")
    delta_net_layers(model)[0].scales.q = torch.ones(3, 1, 1)
    export_checkpoint(model, load_recipe("int8"), tmp_path / "ckpt")
    with pytest.raises(QDeltaNetError, match=r"model\.layers\.0\.linear_attn\.scales\.q has shape \[3, 1, 1\]"):
        load_model(str(tmp_path / "ckpt"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_calibration_of_the_text_serves_the_whole_model(family, dtype, tmp_path):
    """`load_model` reads the text part of a multimodal checkpoint; its calibration fits the model with its vision."""
    from transformers import AutoModelForImageTextToText

    tiny(family).save_pretrained(tmp_path / "float")
    text = load_model(str(tmp_path / "float"), dtype)
    found = calibrate(text, load_recipe("int8"), Samples("random", tokens(4, seed=1), "digest"))
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "float", dtype=getattr(torch, dtype))
    assert model_fingerprint(whole) == model_fingerprint(text)
    found.apply(whole)
    for model in (text, whole):
        set_execution(model, "integer")
    assert torch.equal(logits(whole, tokens()), logits(text, tokens()))
    export_checkpoint(whole, load_recipe("int8"), tmp_path / "ckpt")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ckpt")
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(logits(loaded, tokens()), logits(whole, tokens()))


@pytest.mark.parametrize(
    ("family", "on_the_hub"),
    [
        ("qwen3_next", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("qwen3_5_moe", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("olmo_hybrid", "model.layers.0.linear_attn.k_conv1d.weight"),
        ("qwen3_5_multimodal", "model.language_model.layers.0.linear_attn.conv1d.weight"),
    ],
)
def test_hub_checkpoints_in_their_own_format(family, on_the_hub, tmp_path):
    """transformers converts names and stacks experts as it loads; layers are replaced after that."""
    model, x = tiny(family), tokens()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert on_the_hub in file.keys()  # noqa: SIM118 (not a dict)
    loaded = load_model(str(tmp_path))
    quantize_model(loaded, load_recipe("int8"))
    assert apart(logits(loaded, x), logits(model, x)) < TOLERANCE


# -- roles -------------------------------------------------------------------------------------------------------------


def test_roles_in_one_module_take_one_scheme():
    model = tiny("qwen3_next")
    with pytest.raises(BindingError, match=r"proj.qkv and proj.z are one module here \(in_proj_qkvz\)"):
        quantize_model(model, load_recipe("int8", ["projections.proj.qkv.weight=int8"]))
    with pytest.raises(BindingError, match="proj.a and proj.b"):
        quantize_model(model, load_recipe("w8a8", ["projections.proj.b.weight=int4"]))
    both = ["projections.proj.a.weight=int8", "projections.proj.b.weight=int8"]
    assert isinstance(quantize_model(model, load_recipe("w8a8", both))[0].in_proj_ba, QuantLinear)


@pytest.mark.parametrize("family", ALL)
def test_other_linears_of_a_decoder_layer_are_where_the_adapter_says(family):
    """Each role is a linear in some decoder layer."""
    model = tiny(family)
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    for role, paths in adapter_for(model.config).linears.items():
        found = [block.get_submodule(path) for block in blocks for path in paths if _has(block, path)]
        assert found, role
        assert all(isinstance(module, nn.Linear) for module in found)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


# -- beta in (0, 2), and no decay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmo_hybrid", "delta_net_gated"])
def test_negative_eigenvalues_double_the_proven_range(family):
    x = tokens()
    inverse = ["inverse.scale=bound", "sites.A.scale=bound", "sites.T.scale=bound", "inverse.rescale=per_register"]
    model, calibration = calibrated(family, "int8", *inverse, "inverse.headroom=1")
    proven = {key: s for key, s in calibration.scales.items() if key.split(".")[2] in ("A", "T", "inverse")}
    assert len(proven) > 4
    assert all(s.shape == (1, 1, 1) and s.item() == pytest.approx(2 / 127) for s in proven.values())
    set_execution(model, "integer")
    found = logits(model, x)
    clipped = {site for layer in delta_net_layers(model).values() for site in +layer.saturated}
    assert not any(site in ("A", "T") or site.startswith("inverse.") for site in clipped)
    set_execution(model, "integer", "reference")
    assert torch.equal(logits(model, x), found)


def test_headroom_stops_at_the_proven_range():
    """Ranges of the shared scale are widened, but not beyond beta's limit, which beta does approach."""
    for family, limit in (("qwen3_5", 1.0), ("olmo_hybrid", 2.0)):
        _, calibration = calibrated(family, "int8", "inverse.headroom=16")
        scales = [s for key, s in calibration.scales.items() if key.split(".")[2] in ("A", "T", "inverse")]
        assert all(float(s.max()) == pytest.approx(limit / 127) for s in scales)


@pytest.mark.parametrize(("family", "limit"), [("olmo_hybrid", 2.0), ("delta_net", 1.0), ("delta_net_gated", 2.0)])
def test_range_analysis_of_a_model(family, limit):
    captured = capture(tiny(family), Samples("random", tokens(2), "digest"), keep=4)
    for layer in captured.values():
        assert layer.limit == limit
        largest = float(layer.A.abs().max())
        assert 0.6 * limit < largest <= limit
        assert power_ranges(layer.A)[1][0] <= limit
        T = torch.linalg.inv(torch.eye(64, dtype=torch.float64) - layer.A) - torch.eye(64, dtype=torch.float64)
        assert float(T.abs().max()) <= limit * (1 + 1e-6)


@pytest.mark.parametrize("recipe", ["int4", "int16", "int4-static", "int8+decay=exp2", "int8+requantize=fixed_point"])
@pytest.mark.parametrize("family", ["delta_net_gated", "olmo_hybrid"])
def test_without_decay_and_with_beta_up_to_two_in_every_arithmetic(family, recipe):
    name, *overrides = recipe.split("+")
    model, x = calibrated(family, name, *overrides)[0], tokens()
    set_execution(model, "integer")
    found = logits(model, x)
    set_execution(model, "integer", "reference")
    assert torch.equal(logits(model, x), found)
    set_execution(model, "fake")
    assert torch.equal(logits(model, x), found)


def test_what_the_wiring_does_not_know_is_refused():
    from tiny_families import delta_net

    with pytest.raises(QDeltaNetError, match="layer 0: qk_norm is 'sum', and only 'l2' is supported in a DeltaNet"):
        quantize_model(delta_net(qk_norm="sum"), load_recipe("int8"))
    model = tiny("qwen3_5")
    model.model.layers[0].linear_attn.activation = "gelu"
    with pytest.raises(QDeltaNetError, match="layer 0: activation is 'gelu'"):
        quantize_model(model, load_recipe("int8"))


def test_an_unknown_family_hears_of_the_known_ones(tmp_path: Path):
    model = tiny("qwen3_5")
    model.config.model_type = "gpt9"
    with pytest.raises(QDeltaNetError) as error:
        quantize_model(model, load_recipe("int8"))
    known = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid", "delta_net")
    assert all(name in str(error.value) for name in (*known, "gpt9.py", "adapters.py"))

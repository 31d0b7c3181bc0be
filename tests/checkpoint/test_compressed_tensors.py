"""compressed-tensors: what stock transformers makes of an export, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import ALL, KINDS, TOKENS, WEIGHT_ONLY, calibrated, logits, recipe, rewrite, rewrite_json
from safetensors.torch import load_file, save_file

from qdeltanet.checkpoint import check_compressed_tensors, export_compressed_tensors, load_foreign
from qdeltanet.checkpoint.foreign import quantized_projections
from qdeltanet.checkpoint.packing import pack, unpack
from qdeltanet.core import QDeltaNetError
from qdeltanet.models import set_execution

STOCK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
tokens = load_file(sys.argv[1])["tokens"]
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        save_file({"logits": model(tokens, use_cache=False).logits}, Path(folder).with_suffix(".safetensors"))
assert "qdeltanet" not in sys.modules
"""
# Largest difference of a logit, whose own are up to 1.5. Weights with float activations: the order of float sums.
# Activations in INT8: a sum that another order moves over the edge of a code changes it by one (1/127 of the largest),
# and dynamic scales are amax / 127.5 there, amax / 127 here.
TOLERANCE = {"w4a16": 1e-5, "static": 0.02, "dynamic": 0.02, "w4a8": 0.02, "mixed": 0.02}


@pytest.fixture(scope="module")
def made(random_model, tmp_path_factory):
    """kind -> (quantized model whose rule is float, recipe, exported folder)."""
    root = tmp_path_factory.mktemp("exports")
    cache = {}

    def make(kind: str, rule: str = "float"):
        key = f"{kind}-{rule}"
        if key not in cache:
            wanted = recipe(KINDS[kind], rule)
            model = calibrated(random_model, root / "float", wanted)
            set_execution(model, "fake" if rule == "float" else "integer")
            export_compressed_tensors(model, wanted, root / key)
            cache[key] = model, wanted, root / key
        return cache[key]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """A folder that may be damaged."""

    def copy(kind: str, rule: str = "float") -> Path:
        return Path(shutil.copytree(made(kind, rule)[2], tmp_path / "copy"))

    return copy


def test_stock_transformers_gives_our_logits_in_a_fresh_process(made, tmp_path):
    folders = {kind: made(kind)[2] for kind in TOLERANCE}
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "tokens.safetensors"), *map(str, folders.values())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, folder in folders.items():
        found = load_file(folder.with_suffix(".safetensors"))["logits"]
        model = made(kind)[0]
        difference = (found - logits(model)).abs().max()
        assert difference <= TOLERANCE[kind], kind
        assert found.abs().max() > 1


@pytest.mark.parametrize("kind", ["static", "dynamic", "w4a8", "w4a16"])
@torch.no_grad()
def test_every_module_of_stock_transformers_computes_what_ours_does(made, kind):
    from transformers import AutoModelForCausalLM

    ours, _, folder = made(kind)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    stock(TOKENS)  # unpacks
    coded = quantized_projections(ours)
    assert len(coded) == 3 * 3 + 4 + 4 * 3
    for name, linear in coded.items():
        x = torch.randn(1, 20, linear.in_features, generator=torch.Generator().manual_seed(2))
        if kind == "static":  # nothing clips: it would at -128 there, at -127 here
            x *= linear.input_scale * 25
        found, module = stock.get_submodule(name)(x), stock.get_submodule(name)
        scale = linear.scale.view(linear.out_features, -1).repeat_interleave(linear.group, 1)
        assert torch.equal(module.weight, linear.codes * scale), name
        expected = linear(x)
        if kind in ("dynamic", "w4a8"):  # by the runtime's own scale
            step = x.abs().amax(-1, keepdim=True) / 127.5
            expected = (x / step).round().clamp(-128, 127) * step @ module.weight.T
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 61, 3])
def test_packing_is_the_packages(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (5, columns), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    codes[0, 0], codes[-1, -1] = low, -low - 1
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("kind", ["static", "dynamic", "w4a8", "w4a16", "mixed"])
def test_it_comes_back_with_every_bit_and_the_rule_in_integers(made, kind):
    model, _, folder = made(kind, "int8")
    assert torch.equal(logits(load_foreign(folder)), logits(model))


def test_what_is_written(made):
    model, wanted, folder = made("mixed", "int8")
    config = json.loads((folder / "config.json").read_text())
    content = config["quantization_config"]
    assert content["format"] == "mixed-precision"
    assert [(g["format"], len(g["targets"])) for g in content["config_groups"].values()] == [
        ("int-quantized", 6), ("int-quantized", 3), ("pack-quantized", 12),
    ]  # fmt: skip
    kept = {n.rpartition(".")[2] for n in content["ignore"]}
    assert kept == {"in_proj_a", "in_proj_b", "conv1d", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    assert config["qdeltanet_config"]["recipe"]["name"] == wanted.name
    root = load_file(folder / "model.safetensors")
    assert not any("scales" in name or "codes" in name for name in root)  # vLLM refuses tensors that it does not know
    scales = load_file(folder / "qdeltanet" / "delta_rule.safetensors")
    own = model.model.layers[1].linear_attn.scales.as_dict()
    assert torch.equal(scales["layers.1.inverse.Q64_32"], own["inverse.Q64_32"])
    assert not (made("mixed")[2] / "qdeltanet").exists()  # a float rule has no scales


def refused(random_model, tmp_path, projections, change=None) -> str:
    given = recipe(projections)
    model = calibrated(random_model, tmp_path / "float", given)
    if change is not None:
        change(model)
    with pytest.raises(QDeltaNetError) as error:
        export_compressed_tensors(model, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fused_projections_must_agree(random_model, tmp_path):
    says = refused(random_model, tmp_path, {"proj.qkv": {}, "attn.q": {}, "mlp.up": {"scale": "calibrated"}})
    assert "model.layers.0.linear_attn: in_proj_qkv int8 weights with dynamic int8 activations, in_proj_z float" in says
    assert "model.layers.3.self_attn: q_proj int8" in says
    assert "model.layers.2.mlp: gate_proj float, up_proj int8 weights with calibrated int8 activations" in says

    def change(model):
        model.model.layers[1].linear_attn.in_proj_z.input_scale.mul_(2)

    says = refused(random_model, tmp_path, KINDS["static"], change)
    assert "model.layers.1.linear_attn: static input scales differ (in_proj_qkv" in says
    assert "layers.0" not in says


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ({"weight": "int4", "group": 32, "scale": "calibrated"}, "int4 weights in groups of 32 with calibrated int8"),
        ({"weight": "int6", "activation": "float"}, "int6 weights with float activations"),
        ({"group": 32}, "int8 weights in groups of 32 with dynamic int8"),
        ({"activation": "int16"}, "int8 weights with dynamic int16 activations"),
    ],
)
def test_what_the_format_cannot_express(random_model, tmp_path, scheme, why):
    says = refused(random_model, tmp_path, {**dict.fromkeys(ALL, WEIGHT_ONLY), "mlp.*": scheme})
    assert f"{why}" in says
    assert all(f"model.layers.{i}.mlp.{n}_proj" in says for i in range(4) for n in ("gate", "up", "down"))
    assert "linear_attn" not in says
    assert "--format qdeltanet" in says


def test_a_recipe_without_projections_is_refused(random_model, tmp_path):
    assert "this recipe has none" in refused(random_model, tmp_path, {})


def test_all_damage_is_listed_at_once(copied):
    folder = copied("static")
    place = "model.layers.0.linear_attn"

    def change(tensors):
        tensors[f"{place}.in_proj_z.input_scale"] *= 2
        tensors[f"{place}.out_proj.weight"] = tensors[f"{place}.out_proj.weight"].float()
        tensors[f"{place}.renamed.weight_scale"] = tensors.pop("model.layers.3.mlp.up_proj.weight_scale")
        tensors["model.layers.2.mlp.down_proj.weight_scale"] = torch.ones(3, 1)
        tensors["model.layers.1.mlp.down_proj.g_idx"] = torch.ones(3, dtype=torch.int32)

    rewrite(folder, change)
    with pytest.raises(QDeltaNetError) as error:
        check_compressed_tensors(folder)
    for says in (
        f"{place}.in_proj_qkv.input_scale, {place}.in_proj_z.input_scale differ",
        f"{place}.out_proj.weight is F32, expected I8",
        "missing tensor model.layers.3.mlp.up_proj.weight_scale",
        "model.layers.2.mlp.down_proj.weight_scale has shape [3, 1], expected [64, 1]",
        "unexpected tensor model.layers.1.mlp.down_proj.g_idx",
    ):
        assert says in str(error.value)
    with pytest.raises(QDeltaNetError, match="weight_scale"):
        load_foreign(folder)


def test_renamed_modules_never_fall_back_to_float(copied):
    """Every tensor of a module under another name, in files and config alike: only the model knows better."""
    folder = copied("w4a16", "int8")
    old, new = "layers.2.mlp.up_proj", "layers.2.mlp.upward_proj"

    def rename(tensors):
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    rewrite(folder, rename)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(f"model.{old}", f"model.{new}"))
    with pytest.raises(QDeltaNetError) as error:
        load_foreign(folder)
    assert f"missing projection model.{old}" in str(error.value)
    assert f"unexpected tensor model.{new}.weight_packed" in str(error.value)


def test_changed_scales_of_the_rule_and_foreign_folders(copied):
    folder = copied("dynamic", "int8")
    side = folder / "qdeltanet" / "delta_rule.safetensors"
    scales = load_file(side)
    save_file({k: v * 2 for k, v in scales.items()}, side)
    with pytest.raises(QDeltaNetError, match="qdeltanet/delta_rule.safetensors is not the file that was exported"):
        load_foreign(folder)
    rewrite(folder, lambda t: t.pop("layers.0.q"), "qdeltanet/delta_rule.safetensors")
    with pytest.raises(QDeltaNetError, match=r"missing scale layers.0.q"):
        load_foreign(folder)
    for place in (folder.parent / "nothing", Path(__file__).parent / "golden" / "version-1"):
        with pytest.raises(QDeltaNetError, match="not written by qdeltanet"):
            load_foreign(place)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("quantization_config"), "neither compressed-tensors nor ModelSlim"),
        (
            lambda c: c["quantization_config"].update(config_groups={"group_0": {}}),
            r"damaged config \(KeyError: 'targets'",
        ),
        (lambda c: c["quantization_config"].update(config_groups=[1]), "damaged config"),
        (lambda c: c["qdeltanet_config"].pop("schemes"), "qdeltanet_config lacks schemes: export the model again"),
        (lambda c: c["qdeltanet_config"].update(version=3), "qdeltanet_config is version 3, this qdeltanet reads 2"),
        (lambda c: c["qdeltanet_config"].update(schemes=[{}]), "qdeltanet_config.schemes: damaged"),
        (lambda c: c["qdeltanet_config"]["recipe"].update(x=1), "qdeltanet_config.recipe: unknown key"),
        (lambda c: c.update(architectures=["pipeline"]), "'pipeline' is no model"),
        (lambda c: c.update(num_hidden_layers=3, layer_types=c["layer_types"][:3]), r"layer 3.projections"),
    ],
)
def test_damaged_configs(copied, change, says):
    folder = copied("mixed", "int8")
    rewrite_json(folder / "config.json", change)
    with pytest.raises(QDeltaNetError, match=says):
        load_foreign(folder)


def test_a_truncated_file(copied):
    folder = copied("w4a16")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(QDeltaNetError, match=r"model.safetensors cannot be read"):
        check_compressed_tensors(folder)

"""Export and reload: every bit, and every kind of damage named before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.checkpoint import export_checkpoint
from qdeltanet.core import QDeltaNetError
from qdeltanet.models import load_model, set_execution
from qdeltanet.recipe import load_recipe

TOKENS = torch.randint(0, 100, (2, 130), generator=torch.Generator().manual_seed(0))

FRESH = """
import sys
import qdeltanet
assert not {'transformers', 'datasets', 'brevitas'} & set(sys.modules), "import qdeltanet is not light"
import torch
torch.set_num_threads(2)
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
kept = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print("EQUAL", torch.equal(model(kept["tokens"], use_cache=False).logits, kept["logits"]))
"""


@pytest.fixture
def exported(random_model, tmp_path):
    """(checkpoint folder, logits of the in-memory model)."""

    def make(recipe: str, dtype: str = "float32") -> tuple[Path, torch.Tensor]:
        random_model().save_pretrained(tmp_path / "float")
        model = load_model(str(tmp_path / "float"), dtype)
        data = torch.randint(0, 100, (4, 130), generator=torch.Generator().manual_seed(1))
        calibrate(model, load_recipe(recipe), Samples("random", data, "digest"))
        set_execution(model, "integer")
        with torch.no_grad():
            logits = model(TOKENS, use_cache=False).logits
        export_checkpoint(model, load_recipe(recipe), tmp_path / "ckpt")
        return tmp_path / "ckpt", logits

    return make


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("int8", "float32"), ("w8a8", "bfloat16"), ("int4", "float32"), ("neumann-int16", "float32")],
)
def test_reload_in_a_fresh_process_is_equal_to_the_bit(exported, recipe, dtype, tmp_path):
    checkpoint, logits = exported(recipe, dtype)
    save_file({"tokens": TOKENS, "logits": logits}, tmp_path / "kept.safetensors")
    command = [sys.executable, "-c", FRESH, str(checkpoint), str(tmp_path / "kept.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "EQUAL True" in done.stdout, done.stderr[-2000:]


def test_what_is_in_a_checkpoint(exported):
    checkpoint, _ = exported("w8a8")
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qdeltanet"
    tensors = load_file(checkpoint / "model.safetensors")
    integer = [k for k, v in tensors.items() if not v.dtype.is_floating_point]
    assert len(integer) == 9  # three projections in three layers
    assert not any(k.endswith("weight") for k in integer)
    assert not any("original" in k or k == "lm_head.weight" for k in tensors)
    assert tensors["model.layers.0.linear_attn.scales.inverse.Q64_32"].shape == (4, 1, 1)


def rewrite(checkpoint: Path, change, keep_digest: bool = True) -> None:
    """Change tensors; with keep_digest the config is made to fit, so that the header comparison has to find it."""
    from qdeltanet.core.files import sha256_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if keep_digest:
        config = json.loads((checkpoint / "config.json").read_text())
        config["quantization_config"]["files"]["model.safetensors"] = sha256_file(file)
        (checkpoint / "config.json").write_text(json.dumps(config))


def test_all_mismatches_are_named_at_once(exported):
    checkpoint, _ = exported("w8a8")
    prefix = "model.layers.0.linear_attn."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[prefix + "scales.q"]
        tensors[prefix + "extra"] = torch.zeros(1)
        tensors[prefix + "in_proj_z.codes"] = tensors[prefix + "in_proj_z.codes"].float()
        tensors[prefix + "out_proj.scale"] = torch.ones(3)

    rewrite(checkpoint, change)
    with pytest.raises(QDeltaNetError) as error:
        load_model(str(checkpoint))
    message = str(error.value)
    assert f"missing tensor {prefix}scales.q" in message
    assert f"unexpected tensor {prefix}extra" in message
    assert f"{prefix}in_proj_z.codes is torch.float32, expected torch.int8" in message
    assert f"{prefix}out_proj.scale has shape [3]" in message
    assert "\n" not in message


def test_tampered_truncated_and_missing_files(exported):
    checkpoint, _ = exported("int8")
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    rewrite(checkpoint, lambda t: t["model.layers.0.linear_attn.scales.q"].mul_(2), keep_digest=False)
    with pytest.raises(QDeltaNetError, match="is not the file that was exported"):
        load_model(str(checkpoint))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QDeltaNetError, match="model.safetensors"):
        load_model(str(checkpoint))
    file.unlink()
    with pytest.raises(QDeltaNetError, match="model.safetensors"):
        load_model(str(checkpoint))


def test_pickles_are_never_loaded(exported):
    checkpoint, _ = exported("int8")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(QDeltaNetError):
        load_model(str(checkpoint))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("version", 99, "reads versions 1 to 2"),
        ("scheme", {}, "unknown keys scheme"),
        ("recipe", {"version": 1, "x": 1}, "recipe"),
    ],
)
def test_foreign_quantization_config(exported, key, value, says):
    checkpoint, _ = exported("int8")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"][key] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(QDeltaNetError, match=says):
        load_model(str(checkpoint))


def test_export_refuses_a_float_model_and_a_full_directory(random_model, tmp_path):
    with pytest.raises(QDeltaNetError, match="not quantized"):
        export_checkpoint(random_model(), load_recipe("int8"), tmp_path / "ckpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    model = random_model()
    data = Samples("random", TOKENS, "digest")
    calibrate(model, load_recipe("int8"), data)
    with pytest.raises(QDeltaNetError, match="--overwrite"):
        export_checkpoint(model, load_recipe("int8"), tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "keep"

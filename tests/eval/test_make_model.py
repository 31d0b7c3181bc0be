"""Random models of real shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.make_model import main, make_model
from qdeltanet.models import load_model, load_tokenizer


def held(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return found


def test_it_loads_and_is_the_seeds(tmp_path):
    made = [make_model(tmp_path / name, "tiny", 300, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = (held(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    drawn = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(a[drawn], c[drawn])
    assert not torch.equal(a[drawn], a[drawn.replace("1", "2")])
    assert a[drawn].float().std() == pytest.approx(0.02, rel=0.05)
    assert made == [sum(x.numel() for x in a.values())] * 3
    model = load_model(str(tmp_path / "a"), "auto")
    assert model.num_parameters() == made[0]
    tokens = torch.tensor([load_tokenizer(str(tmp_path / "a"))("hello")["input_ids"]])
    assert model(tokens).logits.isfinite().all()


def test_gates_are_slow(tmp_path):
    make_model(tmp_path / "m", "tiny", 300, layers=1)
    weights = held(tmp_path / "m")
    decay = torch.nn.functional.softplus(weights["model.layers.0.linear_attn.dt_bias"].float())
    assert 3e-4 < decay.min() < decay.max() < 0.6
    assert weights["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    assert not weights["model.layers.0.linear_attn.A_log"].any()


def test_one_file_per_layer_and_an_index(tmp_path):
    make_model(tmp_path / "m", "qwen3.5-0.8b", 300, layers=1)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "m").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) == 3  # embedding, the layer, the last norm
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in held(tmp_path / "m").values())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["hidden_size"], config["linear_num_value_heads"], config["dtype"]) == (1024, 16, "bfloat16")


def test_requests_that_are_refused(tmp_path, capsys):
    with pytest.raises(QDeltaNetError, match="tiny"):
        make_model(tmp_path / "m", "tinny")
    with pytest.raises(QDeltaNetError, match="bfloat16"):
        make_model(tmp_path / "m", "tiny", dtype="int8")
    arguments = ["--shape", "tiny", "--output", str(tmp_path / "m"), "--vocab"]
    assert main([*arguments, "100"]) == 2
    assert "the byte tokenizer has 260 ids" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    assert main([*arguments, "300"]) == 0
    assert main([*arguments, "300"]) == 2
    assert "not empty" in capsys.readouterr().err

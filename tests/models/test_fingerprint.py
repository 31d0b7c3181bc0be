"""What tells one checkpoint from another."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny

from qdeltanet.models import load_model, model_fingerprint, weights_digest


def test_a_large_weight_that_was_trained_further_is_noticed(tmp_path):
    """Shapes and small tensors are the same: the files are not."""
    tiny("qwen3_5").save_pretrained(tmp_path)
    before = load_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    save_file({n: x + 0.01 if n == name else x.clone() for n, x in tensors.items()}, file, {"format": "pt"})
    found = weights_digest(before)
    after = load_model(str(tmp_path))
    assert model_fingerprint(after) == model_fingerprint(before)
    assert found == weights_digest(after)  # of the files as they are
    save_file({n: x.clone() for n, x in tensors.items()}, file, {"format": "pt"})
    assert weights_digest(before) != found
    assert torch.equal(dict(load_model(str(tmp_path)).named_parameters())[name], dict(before.named_parameters())[name])


def test_a_model_made_in_memory_has_no_files():
    assert weights_digest(tiny("qwen3_5")) is None

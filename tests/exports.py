"""Calibrated models for the tests of checkpoint formats, and damage to what they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.core.files import sha256_file
from qdeltanet.models import load_model, set_execution
from qdeltanet.recipe import Recipe, parse_recipe

TOKENS = torch.randint(0, 100, (2, 130), generator=torch.Generator().manual_seed(0))
ALL = ("proj.*", "attn.*", "mlp.*")
W4A8 = {"weight": "int4", "group": 32}
WEIGHT_ONLY = {"weight": "int4", "activation": "float", "group": 32}
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {key: {} for key in ALL},
    "static": {key: {"scale": "calibrated"} for key in ALL},
    "w4a16": dict.fromkeys(ALL, WEIGHT_ONLY),
    "w4a8": dict.fromkeys(ALL, W4A8),
    "mixed": {"proj.*": {}, "proj.out": {"scale": "calibrated"}, "mlp.*": WEIGHT_ONLY},
    "plain": {"proj.qkv": {}, "proj.z": {}, "proj.out": {}},
}


def recipe(projections: dict[str, Any], rule: str = "int8") -> Recipe:
    """Projections over a rule of one format, a and b in float."""
    given = {**projections, "proj.a": None, "proj.b": None}
    return parse_recipe(
        {"version": 1, "sites": {"*": {"format": rule}}, "inverse": {"format": rule}, "projections": given}
    )


def calibrated(make: Callable[[], Any], folder: Path, wanted: Recipe, dtype: str = "float32") -> Any:
    """A random model, calibrated, executing in integers."""
    if not folder.exists():
        make().save_pretrained(folder)
    model = load_model(str(folder), dtype)
    data = torch.randint(0, 100, (4, 130), generator=torch.Generator().manual_seed(1))
    calibrate(model, wanted, Samples("random", data, "digest"))
    set_execution(model, "integer")
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


Change = Callable[[dict[str, Any]], Any]


def rewrite(checkpoint: Path, change: Change, file: str = "model.safetensors") -> None:
    """Change tensors of a file; the digests in the config are made to fit, so that the checks have to find it."""
    tensors = load_file(checkpoint / file)
    change(tensors)
    save_file(tensors, checkpoint / file, metadata={"format": "pt"})

    def digest(config: dict[str, Any]) -> None:
        config["qdeltanet_config"]["files"][file] = sha256_file(checkpoint / file)

    rewrite_json(checkpoint / "config.json", digest)


def rewrite_json(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

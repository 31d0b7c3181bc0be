"""Our own format and the golden files of every format that holds weights: what is written today loads for ever.

golden/version-1 is a checkpoint that version 1 wrote. The other golden files say what each exporter makes of it; every
number in them is a copy, or exact, so they hold on any machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import rewrite_json
from safetensors.torch import load_file
from torch import nn

from qdeltanet.checkpoint import export_checkpoint, export_compressed_tensors, export_modelslim
from qdeltanet.checkpoint.foreign import quantized_projections
from qdeltanet.checkpoint.quantizer import KEYS
from qdeltanet.core import QDeltaNetError
from qdeltanet.models import load_model
from qdeltanet.recipe import Recipe, parse_recipe

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text(encoding="utf-8")


def golden_model() -> tuple[Any, Recipe]:
    content = json.loads((GOLDEN / "version-1" / "config.json").read_text())
    return load_model(str(GOLDEN / "version-1")), parse_recipe(content["quantization_config"]["recipe"])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(
        load_file(GOLDEN / "version-1" / "expected.safetensors")["tokens"], use_cache=False
    ).logits
    return found


def test_version_1_still_loads():
    model, _ = golden_model()
    files = load_file(GOLDEN / "version-1" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in files.items())
    expected = load_file(GOLDEN / "version-1" / "expected.safetensors")["logits"]
    # float sums differ between machines, and one that crosses the edge of a code moves a logit; these are up to .36
    assert (logits(model) - expected).abs().max() < 0.01


def test_version_1_converts_by_exporting_it_again(tmp_path):
    model, recipe = golden_model()
    export_checkpoint(model, recipe, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["version"] == 2
    assert torch.equal(logits(load_model(str(tmp_path / "again"))), logits(model))


def written(folder: Path) -> dict[str, Any]:
    """What a golden file holds: dtype, shape and digest of every tensor."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, x in load_file(file).items():
            digest = hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]
            found[f"{file.relative_to(folder).as_posix()}:{name}"] = [str(x.dtype), list(x.shape), digest]
    return found


def in_float(model: Any) -> None:
    """Projections with a float activation become float linears of the weights that their codes stand for."""
    for name, linear in quantized_projections(model).items():
        if linear.activation is None:
            new = nn.Linear(linear.in_features, linear.out_features, bias=False)
            new.weight = nn.Parameter(linear.dequantized())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)


@pytest.mark.parametrize("name", ["qdeltanet", "compressed-tensors", "modelslim"])
def test_golden(name, tmp_path):
    model, recipe = golden_model()
    if name == "modelslim":
        in_float(model)  # it has no INT4 weights with float activations
    exporters = {
        "qdeltanet": export_checkpoint, "compressed-tensors": export_compressed_tensors, "modelslim": export_modelslim,
    }  # fmt: skip
    content = exporters[name](model, recipe, tmp_path / "out")
    content.pop("files", None)
    found = json.loads(json.dumps({"description": content, "tensors": written(tmp_path / "out")}))
    assert found == json.loads((GOLDEN / f"{name}.json").read_text())
    assert str(GOLDEN) not in (tmp_path / "out" / "config.json").read_text()  # nor any other path of this machine


def masked(x: torch.Tensor, mask: dict[str, Any]) -> torch.Tensor:
    """As docs/checkpoint.md says; written without a look at the package's masks."""
    i, j = torch.arange(len(x))[:, None], torch.arange(len(x))[None, :]
    keep = (i > j) & (i // mask["outer"] == j // mask["outer"]) & (i // mask["inner"] != j // mask["inner"])
    if "band" in mask:
        keep &= i - j <= mask["band"]
    if mask.get("diagonal"):
        keep |= i == j
    if "rows" in mask:
        keep &= i % mask["outer"] < mask["rows"]
    if "column" in mask:
        keep &= j % mask["outer"] == mask["column"]
    return x * keep


@pytest.mark.parametrize("method", ["block_merge", "neumann", "forward_substitution", "newton_schulz", "golden"])
def test_the_plan_runs_from_the_file_alone(method):
    """(I - A)^-1 - I by the steps as data, in float64."""
    from qdeltanet.checkpoint.description import describe_plan
    from qdeltanet.inverse import plan

    if method == "golden":
        data = json.loads((GOLDEN / "qdeltanet.json").read_text())["description"]["schemes"][0]["plan"]
    else:
        data = json.loads(json.dumps(describe_plan(plan(method, 32))))
    size = data["chunk_size"]
    A = torch.rand(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril(-1) * 0.1
    registers = {"A": A, "I": torch.eye(size, dtype=torch.float64)}
    for step in data["steps"]:
        total = registers[step["left"]] @ registers[step["right"]] if "right" in step else registers[step["left"]]
        total = total + sum(sign * registers[name] for name, sign in step.get("addends", []))
        registers[step["out"]] = step.get("factor", 1) * masked(total, step["mask"])
    exact = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - A) - registers["I"]
    error = (registers["T"] - exact).norm() / exact.norm()
    assert error < (0.01 if method in ("neumann", "newton_schulz") else 1e-10)


def test_a_changed_description_is_refused(tmp_path):
    model, recipe = golden_model()
    export_checkpoint(model, recipe, tmp_path / "out")

    def change(config):
        scheme = config["quantization_config"]["schemes"][0]
        scheme["rule"]["sites"]["q"]["format"] = "int4"
        scheme["plan"]["steps"][1]["left"] = "T"
        scheme["projections"]["linear_attn.out_proj"]["weight"] = "int6"
        scheme["dimensions"]["key_heads"] = 7

    rewrite_json(tmp_path / "out" / "config.json", change)
    with pytest.raises(QDeltaNetError) as error:
        load_model(str(tmp_path / "out"))
    for says in (
        "layer 0.rule.sites.q.format: 'int4', by the recipe 'int8'",
        "layer 0.plan.steps.1.left: 'T', by the recipe ",
        "layer 0.projections.linear_attn.out_proj.weight: 'int6', by the recipe 'int8'",
        "layer 0.dimensions.key_heads: 7, by the recipe 1",
    ):
        assert says in str(error.value)
    rewrite_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(schemes=[{"x": 1}]))
    with pytest.raises(QDeltaNetError, match=r"quantization_config.schemes: damaged"):
        load_model(str(tmp_path / "out"))


def test_the_specification_names_every_key():
    schemes = json.loads((GOLDEN / "qdeltanet.json").read_text())["description"]["schemes"]
    keys = KEYS[2] | {k for s in schemes for k in s} | {k for s in schemes for k in s.get("rule", {})}
    keys |= {k for s in schemes for step in s.get("plan", {}).get("steps", []) for k in (*step, *step["mask"])}
    keys |= {k for s in schemes for p in s["projections"].values() for k in p} | {"carry", "feedback", "band", "factor"}
    assert [k for k in sorted(keys) if f"`{k}`" not in DOCUMENT] == []

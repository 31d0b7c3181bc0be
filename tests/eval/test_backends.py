"""`--backend` and `--device` through the whole program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from qdeltanet.backends import backend_status
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.models import set_execution
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import run_calibration
recipe = load_recipe(sys.argv[1])
calibration = run_calibration("tiny-recall", recipe, samples=8, backend="npu")
assert calibration.report["execution"]["backend"] == "npu"
model = prepare_model("tiny-recall", recipe, calibration, backend="npu")
tokens = torch.randint(0, 60, (2, 150), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    npu = model(input_ids=tokens, use_cache=False).logits
    set_execution(model, "integer", "cpu")
    cpu = model(input_ids=tokens, use_cache=False).logits
    set_execution(model, "float")
    float_ = model(input_ids=tokens, use_cache=False).logits
assert torch.equal(npu, cpu)
assert not torch.equal(cpu, float_)
print(backend_status("npu")[1])
"""


def emulated(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QDELTANET_EMULATE_NPU": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.parametrize("recipe", ["int8", "w8a8", "int16"])
def test_logits_on_the_npu_operator_equal_those_on_cpu(recipe: str) -> None:
    """By the emulated operator: every line but the vendor's runs, projections included."""
    done = emulated("-c", SCRIPT, recipe)
    assert done.returncode == 0, done.stderr
    assert "emulated" in done.stdout


def test_evaluate_on_the_npu_backend(tmp_path: Path) -> None:
    results = {}
    for backend in ("npu", "cpu"):
        out = tmp_path / f"{backend}.json"
        done = emulated(
            "-m", "qdeltanet.cli", "evaluate", "tiny-recall", "--tasks", "recall", "--recipe", "int8",
            "--backend", backend, "--limit", "64", "--json", str(out), "-q",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results[backend] = json.loads(out.read_text())["rows"][1]
    assert results["npu"]["backend"] == "npu"
    assert results["npu"]["tasks"] == results["cpu"]["tasks"]
    assert results["npu"]["saturated_sites"] == results["cpu"]["saturated_sites"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "npu"], "backend npu: torch_npu is not installed"),
        (["--backend", "triton"], "backend triton: "),
        (["--device", "cuda:9"], "device 'cuda:9': not on this machine, which has cpu"),
        (["--device", "gpu"], "device 'gpu': must be cpu, cuda:N or npu:N"),
    ],
)
def test_what_is_not_here_says_so_in_one_line(arguments: list[str], message: str) -> None:
    command = ["-m", "qdeltanet.cli", "evaluate", "tiny-recall", "--tasks", "recall", "--recipe", "int4", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("QDELTANET_EMULATE_NPU", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    if "--backend" in arguments:
        assert "available: " in done.stderr

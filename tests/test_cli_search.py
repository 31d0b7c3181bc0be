"""`qdeltanet search` and `qdeltanet bench neumann` as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import ENV, run

from qdeltanet._cli_search import _show
from qdeltanet.recipe import load_recipe

QUICK = ("--samples", "4", "--method", "truncated_neumann", "--format", "int8", "--keep", "3", "--matrices", "4")
QUICK = (*QUICK, "--error", "1", "--budget", "500%", "-q")


def test_killed_and_taken_up_again(tmp_path):
    """kill -9 in the middle; the same command goes on, and gives the bytes of one that was not disturbed."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    args = ["search", "tiny-recall", *QUICK, "-o", str(cut / "found.yaml")]
    process = subprocess.Popen([sys.executable, "-m", "qdeltanet.cli", *args], env=ENV, stderr=subprocess.DEVNULL)
    wait_for(cut / "found.search.json", 6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.name for p in cut.iterdir() if ".partial-" not in p.name] == ["found.search.json"]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "chosen" in done.stdout
    assert "neumann-int8" in done.stdout
    again = run(*args)
    assert again.returncode == 0
    assert "already complete" in again.stdout
    done = run("search", "tiny-recall", *QUICK, "-o", str(whole / "found.yaml"), "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    for name in ("found.yaml", "found.pareto.json", "found.pareto.png", "found.search.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    chosen = json.loads((tmp_path / "r.json").read_text())["chosen"]
    assert set(chosen["choices"]) == set(load_recipe(whole / "found.yaml").layers) == {"0", "1"}
    refused = run("search", "tiny-recall", *QUICK, "--seed", "1", "-o", str(whole / "found.yaml"))
    assert refused.returncode == 2
    assert "settings.seed was 0, is 1" in refused.stderr


def wait_for(journal: Path, measurements: int) -> None:
    for _ in range(600):
        time.sleep(0.05)
        if journal.exists() and len(json.loads(journal.read_text())["measured"]) >= measurements:
            return
    raise AssertionError("the search did not begin")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--budget", "0"), "--budget '0': write nats per token"),
        (("--budget", "-1%"), "--budget '-1%': write nats"),
        (("--budget", "nan"), "--budget 'nan'"),
        (("--budget", "little"), "--budget 'little'"),
        (("--profile", "ascend"), "unknown profile 'ascend'"),
        (("--method", "neuman"), "unknown method 'neuman'"),
        (("--format", "int99"), "int99"),
        (("--recipe", "int9"), "unknown recipe 'int9'"),
        (("--dataset", "nothing.jsonl"), "dataset nothing.jsonl: no such file"),
        (("--samples", "1"), "at least 2 samples"),
        (("--output", "/proc/found.yaml"), "cannot write"),
        (("--output", "found.txt"), "found.txt: a recipe is a YAML file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, args, line):
    done = run("search", "tiny-recall", "-q", "-o", "found.yaml", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not list(tmp_path.glob("*.yaml"))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = run("search", "tiny-recall", *QUICK, "-o", str(tmp_path / "found.yaml"))
    assert done.returncode == 2
    assert "search is one process" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_infeasible_budget_says_the_least(tmp_path):
    done = run("search", "tiny-recall", *QUICK, "--budget", "1e-9", "-o", str(tmp_path / "found.yaml"))
    assert done.returncode == 2
    assert "budget 1e-09 nats per token: the least that was found is 0.0" in done.stderr
    assert not (tmp_path / "found.yaml").exists()


def test_the_published_method_alone(tmp_path):
    args = ("bench", "neumann", "--family", "gates_small", "--chunk-size", "32", "--profile", "hexagon")
    done = run(*args, "--json", str(tmp_path / "grid.json"))
    assert done.returncode == 0, done.stderr
    assert "order 4, 3 residual steps" in done.stdout
    assert len(json.loads((tmp_path / "grid.json").read_text())["grid"]) == 64
    unknown = run("bench", "neumann", "--family", "gates_smal")
    assert unknown.returncode == 2
    assert "gates_small" in unknown.stderr


def test_a_search_needs_a_model():
    done = run("search", "-o", "found.yaml")
    assert done.returncode == 2
    assert "Missing argument" in done.stderr


def test_losses_that_are_not_finite_are_shown(capsys):
    loss = {"kl": 0.01, "nll": 0.02}
    chosen = {"name": "found 1", "cost": 1.0, "predicted": 0.01, "loss": loss, "choices": {}}
    lost = {"name": "lost", "cost": 2.0, "predicted": None, "loss": {"kl": None, "nll": None}, "choices": {}}
    result = {"chosen": chosen, "base": chosen, "front": [chosen], "references": [lost], "left_out": ["whole"]}
    result |= {"budget": 0.02}
    _show({**result, "profile": {"name": "cpu", "sources": {}}}, Path("found.yaml"))
    shown = capsys.readouterr().out
    assert "inf" in next(line for line in shown.splitlines() if "lost" in line)
    assert "projections are not the base's: whole" in shown


def test_help_has_an_example():
    done = run("search", "--help")
    assert done.returncode == 0
    assert "Example: qdeltanet search tiny-recall" in done.stdout
    assert "Example: qdeltanet bench neumann" in run("bench", "neumann", "--help").stdout

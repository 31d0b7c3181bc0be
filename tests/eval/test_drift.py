"""The drift benchmark: its rows, that it follows the model's own layers, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qdeltanet.cli import app
from qdeltanet.core import FloatArithmetic, QDeltaNetError
from qdeltanet.eval.bench.drift import STATES, Track, drift, growth, positions, rule_inputs, slow_down
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.inverse import plan
from qdeltanet.models import delta_net_layers, set_execution
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import run_calibration, samples_for

ROWS = ("float", "int8", "int8 feedback")


def prepared(state: str) -> Any:
    recipe = load_recipe("int8", [f"sites.state.{setting}" for setting in STATES[state]])
    return prepare_model("tiny-hybrid", recipe, run_calibration("tiny-hybrid", recipe, samples=8), "float")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: prepared(name) for name in ROWS}


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return samples_for("tiny-hybrid", None, 2, 512).tokens


@pytest.fixture(scope="module")
def rows(models: dict[str, Any], windows: torch.Tensor) -> list[dict[str, Any]]:
    return drift(models, windows)


def at_end(rows: list[dict[str, Any]], state: str, mode: str) -> dict[str, Any]:
    return [r for r in rows if (r["state"], r["mode"]) == (state, mode)][-1]


def test_a_row_for_each_state_mode_and_position(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 3 * 2 * len(positions(1024, 64))
    assert {r["position"] for r in rows} == set(positions(1024, 64))
    assert all(0 < r["state_median"] <= r["state_worst"] < 1 for r in rows)


def test_it_shows_what_rounding_at_every_token_costs(rows: list[dict[str, Any]]) -> None:
    state, fed, plain = (at_end(rows, name, "decode")["state_median"] for name in ("float", "int8 feedback", "int8"))
    assert fed < 1.25 * state
    assert plain > 2 * state
    assert at_end(rows, "int8", "chunks")["state_median"] < plain
    output, other = (at_end(rows, name, "decode")["output_median"] for name in ("int8 feedback", "int8"))
    assert output < other / 1.5


def test_the_inputs_are_the_models_own(models: dict[str, Any], windows: torch.Tensor) -> None:
    """Rule and float model end in the same states: a window at a time, with the cache's state beside ours."""
    model = models["int8"]
    wirings = [layer.wiring for layer in delta_net_layers(model).values()]
    inputs = rule_inputs(model, windows[:1])
    assert [layer.wiring for layer in delta_net_layers(model).values()] == wirings
    *_, (_, state) = Track(inputs, [64, 512]).follow(FloatArithmetic(), plan(chunk_size=64))
    set_execution(model, "float")
    with torch.no_grad():
        cache = model(windows[:1], use_cache=True).past_key_values
    cached = torch.cat([cache.layers[i].recurrent_states[0][0] for i in delta_net_layers(model)])
    assert (state - cached).abs().max() < 1e-4 * cached.abs().max()  # float sums over batches of another size


def test_slower_decay_scales_g(windows: torch.Tensor) -> None:
    model = prepared("int8 step")
    before = rule_inputs(model, windows[:1, :64])[3]
    slow_down(model, 1)
    slow_down(model, 10)
    after = rule_inputs(model, windows[:1, :64])[3]
    assert torch.allclose(after[..., :4] * 10, before[..., :4])  # the first layer: later ones see other states
    delta_net_layers(model)[0].A_log = None
    with pytest.raises(QDeltaNetError, match="layer 0 has no A_log"):
        slow_down(model, 2)


def test_growth_is_one_on_a_plateau() -> None:
    ends = positions(4096, 64)
    assert growth([{"position": p, "x": 0.5} for p in ends], "x") == 1
    assert growth([{"position": p, "x": float(p)} for p in ends], "x") > 5


def test_layers_that_differ_are_refused(windows: torch.Tensor) -> None:
    recipe = load_recipe("int4", ["layers.1.chunk_size=64"])
    with pytest.raises(QDeltaNetError, match="runs all layers at once"):
        drift({"int4": prepare_model("tiny-hybrid", recipe, None, "float")}, windows)


def test_the_command_writes_its_files(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "drift.json"), "--png", str(tmp_path / "drift.png")]
    sizes = ["--tokens", "512", "--samples", "4", "--mode", "chunks"]
    done = CliRunner().invoke(app, ["bench", "drift", "--state", "int8 feedback", *sizes, *files, "-q"])
    assert done.exit_code == 0, done.output
    assert "int8 feedback" in done.output
    content = json.loads((tmp_path / "drift.json").read_text())
    assert content["tokens"] == 512
    assert {r["state"] for r in content["rows"]} == {"int8 feedback"}
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state", "int8 fedback"], "unknown state 'int8 fedback'; did you mean int8 feedback"),
        (["--mode", "steps"], "unknown mode 'steps'"),
        (["--tokens", "1000"], "--tokens 1000: must be a multiple of 512"),
        (["--tokens", "1024000"], "it holds 0 sequences of 1024000 tokens|too short for one sequence of 1024000"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(QDeltaNetError, match=message):
        CliRunner().invoke(app, ["bench", "drift", *arguments], catch_exceptions=False)

"""The cost of observing: verified before it is timed, beside plain passes. Times are never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from qdeltanet.cli import app
from qdeltanet.core import Granularity, grouped
from qdeltanet.eval.bench.calibrate import Cost, Seen, Work, costs, model_directory

SMALL = ["--batch", "2", "--tokens", "70", "--rounds", "1", "--threads", "1", "-q"]
PASSES = ["ranges, minmax", "ranges, percentile", "ranges, mse", "ranges, kl", "quality", "whole calibration"]


@pytest.mark.parametrize(("model", "label"), [("tiny", "tiny, 4 layers, random"), ("tiny-recall", "tiny-recall")])
def test_every_pass_is_verified(model: str, label: str, tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    done = CliRunner().invoke(app, ["bench", "calibrate", model, "--recipe", "int4-static", *SMALL, "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["batch"], found["tokens"], found["threads"]) == (2, 70, 1)
    assert [row["work"] for row in found["rows"]] == PASSES
    for row in found["rows"]:
        assert row["model"] == label
        assert row["verified"], row["how"]
        assert row["ratio"] == pytest.approx(row["ms"] / row["plain_ms"], rel=0.01)  # one round: no median between
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]


def test_wrong_ranges_are_seen_and_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeltanet.calib.observers.minmax.largest", lambda groups: groups.amax((0, -1)))  # signed
    done = CliRunner().invoke(app, ["bench", "calibrate", "tiny-recall", *SMALL])
    assert done.exit_code == 1
    assert "NOT VERIFIED: tiny-recall, ranges, minmax: " in done.output
    assert "ranges, kl: " in done.output
    assert "quality: " not in done.output


def test_passes_alternate_with_plain_ones_after_verification() -> None:
    calls: list[str] = []

    def work(name: str, good: bool) -> Work:
        return Work(name, lambda: calls.append(name), lambda: (bool(calls.append(f"verify {name}")) or good, "how"))

    found = costs("m", lambda: calls.append("plain"), [work("a", True), work("b", False)], 2)
    assert calls == ["verify a", "verify b"] + ["plain", "a", "plain", "b"] * 3
    assert [(type(x), x.work, x.verified) for x in found] == [(Cost, "a", True), (Cost, "b", False)]


@pytest.mark.parametrize("granularity", [Granularity.PER_HEAD, Granularity.PER_TOKEN, Granularity.PER_CHANNEL])
@pytest.mark.parametrize("shape", [(3, 2, 4, 8, 8), (3, 2, 4, 2, 4, 4)])
def test_the_obvious_observer_keeps_the_maximum_of_every_scale(
    granularity: Granularity, shape: tuple[int, ...]
) -> None:
    compact = len(shape) == 6
    parts: list[Tensor] = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    seen = Seen()
    for part in parts:
        seen.site("T", part, compact)
    assert torch.equal(seen.amax("T", granularity), grouped(torch.cat(parts), granularity, compact).abs().amax((0, -1)))
    assert seen.elements["T"] == 3 * parts[0].numel()


def test_models_by_name() -> None:
    with model_directory("some/id", 4) as (label, path):
        assert (label, path) == ("some/id", "some/id")
    with model_directory("tiny", 8) as (label, path):
        config = json.loads((Path(path) / "config.json").read_text())
        assert (label, config["num_hidden_layers"], config["vocab_size"]) == ("tiny, 8 layers, random", 8, 1024)
    assert not Path(path).exists()

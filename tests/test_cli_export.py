"""`qdeltanet export --format` and `bench formats` as a user meets them: every figure after equals the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "cal"
    done = run("calibrate", "tiny-recall", "--recipe", "w8a8", "--samples", "16", "--output", str(path))
    assert done.returncode == 0, done.stderr
    return path


def recall(tmp_path: Path, *arguments: str) -> float:
    """Likelihood of the last row's answers."""
    results = tmp_path / "results.json"
    done = run("evaluate", *arguments, "--tasks", "recall", "--limit", "64", "--json", str(results))
    assert done.returncode == 0, done.stderr
    value: float = json.loads(results.read_text())["rows"][-1]["tasks"]["recall"]["nll"]["value"]
    return value


def test_a_checkpoint_of_any_format_evaluates_as_before(calibration, tmp_path):
    before = recall(tmp_path, "tiny-recall", "--calibration", str(calibration), "--recipe", "w8a8")
    for fmt, says in (
        ("qdeltanet", "import qdeltanet"),
        ("compressed-tensors", "projections (int-quantized) written"),
        ("modelslim", "projections (W8A8_DYNAMIC) written"),
    ):
        folder = tmp_path / fmt
        done = run("export", "tiny-recall", "--calibration", str(calibration), "-f", fmt, "-o", str(folder))
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
        assert recall(tmp_path, str(folder), "--baseline", "tiny-recall") == before, fmt


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-f", "modelslam"], "did you mean modelslim"),
        (["-f", "modelslim", "--chunks", "2"], "options chunks: only the formats onnx and aimet take them"),
    ],
)
def test_mistakes(calibration, tmp_path, options, says):
    done = run("export", "tiny-recall", "--calibration", str(calibration), "-o", str(tmp_path / "x"), *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "x").exists()


def test_bench_formats(tmp_path):
    file = tmp_path / "formats.json"
    arguments = (
        "tiny-recall",
        "--format",
        "modelslim",
        "--samples",
        "4",
        "--sequences",
        "2",
        "--json",
        str(file),
        "-q",
    )
    done = run("bench", "formats", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(r["projections"], r["equal"], r["difference"]) for r in rows] == [
        ("W8A8 dynamic", True, 0), ("W8A8 static", True, 0),
    ]  # fmt: skip
    assert "every bit" in done.stdout

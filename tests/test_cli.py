"""The command as a user meets it: one line and exit code 2 for a mistake, whole files, resumable work."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from qdeltanet import cli

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "2", "COLUMNS": "200"}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*args: str, cwd: Path | None = None) -> Done:
    """The command's entry point in this process (a new one would load torch and lm-eval again, seconds each time)."""
    streams = io.StringIO(), io.StringIO()
    argv, folder, code = sys.argv, os.getcwd(), 0
    sys.argv = ["qdeltanet", *args]
    os.chdir(cwd or folder)
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            cli.main()
    except SystemExit as e:
        code = int(e.code or 0)
    finally:
        sys.argv = argv
        os.chdir(folder)
    return Done(code, streams[0].getvalue(), streams[1].getvalue())


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "cal"
    done = run("calibrate", "tiny-recall", "--recipe", "int8", "--samples", "16", "--output", str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_help_has_examples():
    top = run("--help")
    assert top.returncode == 0
    for command in ("demo", "calibrate", "evaluate", "export", "ls"):
        assert command in top.stdout
        page = run(command, "--help")
        assert page.returncode == 0
        assert "Example: qdeltanet" in page.stdout


def test_calibrate_evaluate_export_round_trip(calibration, tmp_path):
    again = run("calibrate", "tiny-recall", "--recipe", "int8", "--samples", "16", "--output", str(calibration))
    assert (again.returncode, "already complete" in again.stdout) == (0, True)
    other = run("calibrate", "tiny-recall", "--recipe", "int8", "--samples", "8", "--output", str(calibration))
    assert (other.returncode, "--overwrite" in other.stderr) == (2, True)

    results = tmp_path / "results.json"
    arguments = ["--tasks", "recall", "--limit", "64", "--json", str(results)]
    done = run("evaluate", "tiny-recall", "--calibration", str(calibration), "--recipe", "int8", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert [(r["name"], r["execution"]) for r in rows] == [("float", "float"), ("int8", "integer")]
    assert rows[1]["tasks"]["recall"]["acc"]["documents"] == 64

    checkpoint = tmp_path / "checkpoint"
    done = run("export", "tiny-recall", "--calibration", str(calibration), "--output", str(checkpoint))
    assert done.returncode == 0, done.stderr
    done = run("evaluate", str(checkpoint), "--baseline", "tiny-recall", *arguments)
    assert done.returncode == 0, done.stderr
    reloaded = json.loads(results.read_text())["rows"]
    assert reloaded[1]["name"] == "checkpoint"
    assert reloaded[1]["tasks"]["recall"]["nll"]["value"] == rows[1]["tasks"]["recall"]["nll"]["value"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["calibrate", "tiny-recal", "-r", "int8", "-o", "x", "--dataset", "recall"], "tiny-recal"),
        (["calibrate", "/no/where", "-r", "int8", "-o", "x", "--dataset", "recall"], "'/no/where': no such directory"),
        (["calibrate", "tiny-recall", "-r", "int9", "-o", "x"], "did you mean"),
        (["calibrate", "tiny-recall", "-r", "int8", "-o", "x", "--set", "inverse.bnd=3"], "did you mean band"),
        (["calibrate", "tiny-recall", "-r", "int8", "-o", "x", "--dataset", "none.jsonl"], "no such file"),
        (["calibrate", "tiny-recall", "-r", "int8", "-o", "x", "--dataset", "recal"], "did you mean recall"),
        (["calibrate", "tiny-recall", "-r", "int8", "-o", "x", "--dtype", "float64"], "unknown dtype"),
        (["calibrate", "tiny-recall", "-r", "int8", "-o", "x", "--batch-size", "0"], "batch size 0"),
        (["evaluate", "tiny-recall", "--tasks", "recal", "-r", "float"], "did you mean recall"),
        (["evaluate", "tiny-recall", "--tasks", "recall", "--backend", "cp"], "did you mean cpu"),
        (["evaluate", "tiny-recall", "--tasks", "recall", "--execution", "int"], "did you mean integer"),
        (["evaluate", "tiny-recall", "--tasks", "recall", "--calibration", "nowhere"], "is no calibration"),
        (["export", "tiny-recall", "--calibration", "nowhere", "-o", "x"], "is no calibration"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, says, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_calibration_of_another_model_or_recipe(calibration):
    done = run("evaluate", "tiny-hybrid", "--tasks", "bytes", "--limit", "1", "--calibration", str(calibration))
    assert done.returncode == 2, done.stdout
    assert "the calibration is of model 'tiny-recall'" in done.stderr
    arguments = ["--tasks", "recall", "--limit", "1", "--calibration", str(calibration), "-r", "int8"]
    done = run("evaluate", "tiny-recall", *arguments, "--set", "inverse.radices=[4,4,4]")
    assert done.returncode == 2
    assert "calibration / asked: inverse.radices: None / [4, 4, 4]" in done.stderr


def test_kill_leaves_nothing_half_written(tmp_path):
    output = tmp_path / "cal"
    args = ["calibrate", "tiny-recall", "-r", "int8", "--samples", "512", "--batch-size", "1", "-o", str(output)]
    process = subprocess.Popen([sys.executable, "-m", "qdeltanet.cli", *args], env=ENV, stderr=subprocess.DEVNULL)
    time.sleep(6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    done = run("calibrate", "tiny-recall", "-r", "int8", "--samples", "4", "-o", str(output))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in output.iterdir()) == ["calibration.json", "calibration.safetensors", "recipe.yaml"]


def test_a_process_of_its_own():
    command = [sys.executable, "-m", "qdeltanet.cli", "calibrate", "tiny-recall", "-r", "int9", "-o", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2
    assert done.stderr.startswith("qdeltanet: unknown recipe 'int9'")


def test_ls_lists_what_there_is(tmp_path):
    done = run("ls", "--json", str(tmp_path / "ls.json"))
    assert done.returncode == 0, done.stderr
    listed = json.loads((tmp_path / "ls.json").read_text())
    assert {"block_merge", "neumann", "forward_substitution", "identity"} <= set(listed["methods"])
    assert len(listed["sites"]) == 12
    assert {"tiny-recall", "tiny-hybrid"} == set(listed["models"])

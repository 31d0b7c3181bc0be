"""The wheel holds everything under one namespace and nothing at the top level beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import pathlib, qdeltanet, qdeltanet.calib, qdeltanet.recipe
from qdeltanet.eval.embedded import DATASETS, MODELS
assert callable(eval)
assert all(pathlib.Path(p).exists() for p in [*MODELS.values(), *DATASETS.values()])
print(qdeltanet.__file__, len(qdeltanet.recipe.shipped_recipes()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, so that no build folder is left in the tree
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        if not (ROOT / name).is_symlink() and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"qdeltanet"}
    for wanted in (
        "qdeltanet/eval/models/tiny-recall/model.safetensors",
        "qdeltanet/eval/models/tiny-hybrid/model.safetensors",
        "qdeltanet/eval/tasks/recall.yaml",
        "qdeltanet/recipes/int8.yaml",
        "qdeltanet/calib/run.py",
        "qdeltanet/py.typed",
    ):
        assert wanted in names


def test_installed_wheel_runs(wheel, tmp_path):
    """Installed into a folder of its own and run from elsewhere, as site-packages would."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "site") in done.stdout


def test_editable_install_is_this_tree(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(ROOT / "qdeltanet") in done.stdout

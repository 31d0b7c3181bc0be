"""Dependencies point one way. The arrows are read from the source, function-level imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "qdeltanet": ROOT / "qdeltanet",
    "qdeltanet.calib": ROOT / "calib",
    "qdeltanet.eval": ROOT / "eval",
    "qdeltanet.recipes": ROOT / "recipes",
}

# What each part may import from the others. Parts that are not listed (the command, what it runs, the package's own
# `__init__` and its import hook) stand on top and may import anything.
ALLOWED: dict[str, set[str]] = {"core": set(), "recipes": set()}
ALLOWED["inverse"] = {"core"}
ALLOWED["backends"] = {"core", "inverse"}
ALLOWED["delta_rule"] = {"core", "inverse"}
ALLOWED["_yaml"] = {"core"}
ALLOWED["_version"] = set()
ALLOWED["_threads"] = set()
ALLOWED["_processes"] = {"core"}
ALLOWED["_pictures"] = set()
ALLOWED["recipe"] = {"_yaml", "core", "inverse", "delta_rule", "recipes"}
ALLOWED["profile"] = {"_yaml", "core", "inverse", "recipes"}
ALLOWED["conformance"] = {"core", "inverse", "delta_rule"}
ALLOWED["nn"] = ALLOWED["recipe"] | {"recipe", "backends"}
ALLOWED["models"] = ALLOWED["nn"] | {"nn"}
ALLOWED["checkpoint"] = ALLOWED["models"] | {"models", "_version"}
ALLOWED["calib"] = ALLOWED["checkpoint"] | {
    "checkpoint",
    "profile",
    "_version",
    "_pictures",
    "_threads",
    "_processes",
}
ALLOWED["eval"] = ALLOWED["calib"] | {"conformance"}
COMMAND = {
    "cli",
    "_cli_hardware",
    "_cli_bench_calibrate",
    "_cli_lab",
    "_cli_bench_lab",
    "_cli_bench_decode",
    "_cli_bench_drift",
    "_cli_bench_formats",
    "_cli_bench_layerwise",
    "_cli_calibrate",
    "_cli_evaluate",
    "_cli_export",
    "_cli_search",
    "_console",
}
TOP = COMMAND | {"", "workflow", "_hook", "__main__"}

# Who may import a third-party package; `torch` alone is for everybody.
ONLY_IN = {
    "brevitas": {"nn", "eval"},  # eval: benchmarks against it
    "transformers": {"models", "checkpoint", "eval"},
    "datasets": {"calib", "eval"},
    "lm_eval": {"eval"},
    "accelerate": {"models", "eval"},
    "triton": {"backends"},
    "torch_npu": {"backends"},
    "onnx": {"checkpoint"},
    "onnxruntime": {"checkpoint"},
    "typer": COMMAND,
}
TORCH_ONLY = ("core", "inverse", "delta_rule")


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module; links inside of qdeltanet are not followed."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "qdeltanet" and (folder / parts[0]).is_symlink():
                continue
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


def imported(name: str, is_package: bool, source: str) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` as a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")
                drop = node.level - 1 if is_package else node.level
                base = ".".join([*parents[: len(parents) - drop], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value


def part_of(name: str) -> str:
    """qdeltanet.core.formats -> core; qdeltanet itself and names defined in its __init__ -> ''."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in ALLOWED or parts[1] in TOP) else ""


def wrong_arrows(name: str, is_package: bool, source: str) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    part = part_of(name)
    found = []
    for target in imported(name, is_package, source):
        package = target.split(".")[0]
        if package == "qdeltanet":
            other = part_of(target)
            if part not in TOP and other != part and other not in ALLOWED[part]:
                found.append(f"{name} imports {target}: {part} may not import {other or 'the package itself'}")
        elif package in ONLY_IN and part not in ONLY_IN[package]:
            found.append(f"{name} imports {target}: only {', '.join(sorted(ONLY_IN[package]))} may")
        elif part in TORCH_ONLY and package != "torch" and package not in sys.stdlib_module_names:
            found.append(f"{name} imports {target}: {part} imports torch and nothing else")
    return found


ALL = list(modules())


@pytest.mark.parametrize(("name", "path"), ALL, ids=[name for name, _ in ALL])
def test_no_arrow_goes_up(name: str, path: Path) -> None:
    assert wrong_arrows(name, path.name == "__init__.py", path.read_text(encoding="utf-8")) == []


def test_every_part_is_known() -> None:
    """A new folder or module at the top gets its place in the order above."""
    parts = {name.split(".")[1] for name, _ in ALL if name != "qdeltanet"}
    assert parts <= set(ALLOWED) | TOP
    assert {"core", "inverse", "delta_rule", "backends"} <= parts
    assert len(ALL) > 30


def test_the_order_has_no_cycles() -> None:
    for part, below in ALLOWED.items():
        for other in below:
            assert part not in ALLOWED[other]
            assert ALLOWED[other] <= below | {"backends", "recipes"}
    assert "eval" not in ALLOWED["calib"]
    assert "calib" not in ALLOWED["eval"]


@pytest.mark.parametrize(
    ("name", "source", "what"),
    [
        ("qdeltanet.core.formats", "from ..inverse import plan", "core may not import inverse"),
        ("qdeltanet.core.formats", "def f():\n    import qdeltanet.nn.linear", "core may not import nn"),
        ("qdeltanet.core.formats", "import numpy", "torch and nothing else"),
        ("qdeltanet.delta_rule.chunk", "from ..backends import get_backend", "delta_rule may not import backends"),
        ("qdeltanet.delta_rule.chunk", "from .. import __version__", "may not import the package itself"),
        ("qdeltanet.inverse.methods.neumann", "from ...delta_rule import SITES", "inverse may not import delta_rule"),
        ("qdeltanet.backends.cpu", "from qdeltanet.delta_rule import bind", "backends may not import delta_rule"),
        ("qdeltanet.calib.run", "from ..eval import x", "calib may not import eval"),
        ("qdeltanet.eval.lm", "from ..calib.run import x", "eval may not import calib"),
        ("qdeltanet.eval.lm", "import importlib\nimportlib.import_module('qdeltanet.cli')", "eval may not import cli"),
        ("qdeltanet.recipe", "from .nn import Scales", "recipe may not import nn"),
        ("qdeltanet.models.load", "from ..checkpoint import x", "models may not import checkpoint"),
        ("qdeltanet.checkpoint.x", "import brevitas.nn as b", "only eval, nn may"),
        ("qdeltanet.nn.linear", "from transformers import AutoModel", "only checkpoint, eval, models may"),
    ],
)
def test_wrong_arrows_are_seen(name: str, source: str, what: str) -> None:
    found = wrong_arrows(name, False, source)
    assert len(found) == 1
    assert what in found[0]


def test_right_arrows_are_not() -> None:
    assert wrong_arrows("qdeltanet.nn", True, "from ..core import x\nfrom .linear import y\nimport brevitas") == []
    assert wrong_arrows("qdeltanet.cli", False, "from .eval import x\nfrom .calib import y\nimport typer") == []
    assert wrong_arrows("qdeltanet.inverse.run", False, "from ..core import x\nfrom .plan import y\nimport torch") == []


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


HEAVY = {"transformers", "datasets", "brevitas", "lm_eval", "accelerate", "triton", "onnx", "onnxruntime"}


@pytest.mark.parametrize(
    "statement",
    [
        "import qdeltanet",
        "\n".join(f"import qdeltanet.{p}" for p in ("core", "inverse", "delta_rule", "backends", "recipe", "nn")),
    ],
    ids=["the package", "the library below the models"],
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    loaded = loaded_after(statement)
    assert "qdeltanet" in loaded
    # torch itself may bring triton along
    assert loaded & HEAVY <= loaded_after("import torch") & HEAVY


def test_the_command_answers_before_torch_is_loaded() -> None:
    """OMP_WAIT_POLICY is read when torch loads, and the command sets it first; --help wants no torch at all."""
    assert "torch" not in loaded_after("import qdeltanet.cli")


def test_packages_are_listed() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {name for name, path in ALL if path.name == "__init__.py"}
    assert set(settings["packages"]) == found
    assert len(settings["packages"]) == len(found)
    assert settings["package-dir"] == {p: f.name for p, f in FOLDERS.items() if p != "qdeltanet"}


@pytest.mark.parametrize("folder", ["calib", "eval", "recipes"])
def test_links_show_the_folders_inside_of_the_package(folder: str) -> None:
    link = ROOT / "qdeltanet" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_no_module_shadows_a_builtin() -> None:
    """A distribution with a top-level `eval` would hide the builtin in whoever imports it."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert all(p == "qdeltanet" or p.startswith("qdeltanet.") for p in settings["packages"])

"""The command. Everything heavy is imported inside the functions, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from ._cli_bench_calibrate import bench_calibrate
from ._cli_bench_decode import bench_decode
from ._cli_bench_drift import bench_drift
from ._cli_bench_formats import bench_formats
from ._cli_bench_lab import bench_cost, bench_stability, bench_variants
from ._cli_bench_layerwise import bench_layerwise
from ._cli_calibrate import calibrate_command
from ._cli_evaluate import evaluate_command
from ._cli_export import export_command
from ._cli_hardware import bench, selftest
from ._cli_lab import inspect_command, sensitivity_command
from ._cli_search import bench_neumann, search_command
from ._console import Json, Output, Overwrite, Quiet, err, out, say, table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="True integer quantization of Gated DeltaNet: calibrate, execute, evaluate and export the whole delta rule.",
)


@app.command(epilog="Example: qdeltanet demo --output build/demo")
def demo(
    output: Output = Path("build/demo"), overwrite: Overwrite = False, quiet: Quiet = False, json_file: Json = None
) -> None:
    """Calibrate, evaluate and export the embedded model tiny-recall; print what each recipe costs."""
    from .core.files import write_text
    from .workflow import run_demo

    done = _demo_done(output)
    if done is not None and not overwrite:
        out.print(f"already complete: {output / 'results.json'}", highlight=False)
        results = done
    else:
        results = run_demo(output, overwrite, say(quiet))
    out.print(demo_table(results["rows"]))
    export = results["export"]
    equal = "equal, every bit" if export["reload_equal"] else "DIFFERENT"
    out.print(
        f"export: {export['path']}; logits in a fresh process: {equal}; recall {export['accuracy']:.4f}",
        highlight=False,
    )
    if json_file is not None:
        write_text(json_file, json.dumps(results, indent=1) + "\n")
    if not export["reload_equal"]:
        raise typer.Exit(1)


def _demo_done(output: Path) -> Any:
    try:
        found = json.loads((output / "results.json").read_text(encoding="utf-8"))
        return found if {"rows", "export"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def demo_table(rows: list[dict[str, Any]]) -> Table:
    """The demo's table: recall at 16 pairs with paired differences to float."""
    made = table("tiny-recall: recall of 16 pairs, T = 128", ("recipe", "run"), _DEMO_COLUMNS)
    for r in rows:
        difference = "" if r["name"] == "float" else f"{r['difference']:+.4f} ±{r['difference_stderr']:.4f}"
        accuracy = f"{r['accuracy']:.4f} ±{r['stderr']:.4f}"
        made.add_row(r["name"], r["execution"], accuracy, difference, f"{r['nll']:.4f}", str(r["saturated"]))
    return made


_DEMO_COLUMNS = ("recall", "to float, paired", "NLL", "clipped")


app.command(
    "calibrate",
    epilog="Example: qdeltanet calibrate tiny-recall --recipe int8 --dataset recall --samples 128 --output cal",
)(calibrate_command)


app.command(
    "evaluate",
    epilog="Example: qdeltanet evaluate tiny-recall --tasks recall --recipe int8 --recipe int4 --json results.json",
)(evaluate_command)


app.command("export", epilog="Example: qdeltanet export tiny-recall --calibration cal --output checkpoint")(
    export_command
)


@app.command(epilog="Example: qdeltanet ls")
def ls(json_file: Json = None) -> None:
    """List recipes, inverse methods, families of A, sites, backends, profiles, embedded models, data and tasks."""
    from .backends import backend_names, backend_status
    from .core.files import write_text
    from .delta_rule import SITES
    from .eval.embedded import DATASETS, MODELS
    from .eval.task_data import TASKS
    from .inverse import METHODS
    from .inverse.families import FAMILIES
    from .profile import load_profile, shipped_profiles
    from .recipe import load_recipe, shipped_recipes

    listed = {
        "recipes": {name: load_recipe(name).description for name in shipped_recipes()},
        "methods": {name: (m.__doc__ or "").strip().splitlines()[0] for name, m in METHODS.items()},
        "families": {f.name: f.description for f in FAMILIES.values()},
        "sites": {s.name: f"{s.formula} {s.shape}" for s in SITES.values()},
        "backends": {name: _availability(*backend_status(name)) for name in backend_names()},
        "profiles": {name: load_profile(name).description for name in shipped_profiles()},
        "models": {name: str(path) for name, path in MODELS.items()},
        "datasets": {name: str(path) for name, path in DATASETS.items()},
        "tasks": TASKS,
    }
    for title, entries in listed.items():
        table = Table(title=title, show_header=False, title_justify="left", box=None)
        for name, text in entries.items():
            table.add_row(name, Text(text))
        out.print(table)
    if json_file is not None:
        write_text(json_file, json.dumps(listed, indent=1) + "\n")


def _availability(available: bool, reason: str) -> str:
    return f"{'available' if available else 'not here'}: {reason}"


app.command("selftest", epilog="Example: qdeltanet selftest --backend cpu --json selftest.json")(selftest)
app.command("inspect", epilog="Example: qdeltanet inspect tiny-recall --dataset recall --matrices A.safetensors")(
    inspect_command
)
app.command("sensitivity", epilog="Example: qdeltanet sensitivity tiny-hybrid --recipe int4-static")(
    sensitivity_command
)
bench.command("stability", epilog="Example: qdeltanet bench stability --chunk-size 64 --json map.json")(bench_stability)
bench.command("variants", epilog="Example: qdeltanet bench variants --chunk-size 64")(bench_variants)
bench.command(
    "neumann", epilog="Example: qdeltanet bench neumann --family gates_small --chunk-size 32 --profile hexagon"
)(bench_neumann)
bench.command("layerwise", epilog="Example: qdeltanet bench layerwise --samples 4 --json layerwise.json")(
    bench_layerwise
)
bench.command("drift", epilog="Example: qdeltanet bench drift --json drift.json --png drift.png")(bench_drift)
bench.command("decode", epilog="Example: qdeltanet bench decode tiny-hybrid -r int8 -r int8-decode")(bench_decode)
bench.command("calibrate", epilog="Example: qdeltanet bench calibrate tiny-hybrid --json cost.json")(bench_calibrate)
bench.command("formats", epilog="Example: qdeltanet bench formats --json formats.json")(bench_formats)
bench.command("cost", epilog="Example: qdeltanet bench cost --chunk-size 64 --json order.json")(bench_cost)
app.command("search", epilog="Example: qdeltanet search tiny-recall --budget 0.4% --output found.yaml")(search_command)
app.add_typer(bench, name="bench")


UNTIMED = {"stability", "variants", "neumann", "drift", "decode", "formats"}


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, an interrupt 130, never a traceback for either."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    timed = sys.argv[1:2] == ["bench"] and not UNTIMED & set(sys.argv[2:3])
    if not timed:  # read when torch loads: spinning threads are fast alone, and stall a busy machine
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(sys.argv):
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KeyboardInterrupt:
        err.print(
            "qdeltanet: interrupted; nothing half-written was left, and the same command goes on where it can",
            highlight=False,
        )
        sys.exit(130)
    except Exception as e:
        from .core.errors import QDeltaNetError  # loads torch, which --help does not wait for

        if not isinstance(e, QDeltaNetError):
            raise
        err.print(f"qdeltanet: {e}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

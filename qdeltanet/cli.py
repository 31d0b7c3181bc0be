"""The command. Everything heavy is imported inside the functions, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ._cli_bench_lab import bench_cost, bench_stability, bench_variants
from ._cli_hardware import bench, selftest
from ._cli_lab import inspect_command, sensitivity_command
from ._cli_search import bench_neumann, search_command
from ._console import Backend, Device, Dtype, Json, Model, Output, Overwrite, Quiet, Set, bar, err, out, say, table

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


@app.command(
    "calibrate",
    epilog="Example: qdeltanet calibrate tiny-recall --recipe int8 --dataset recall --samples 128 --output cal",
)
def calibrate_command(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Shipped name (see `qdeltanet ls`) or YAML file.")],
    output: Output,
    dataset: Annotated[str | None, typer.Option(help="Hub id[:config[:split]], local file, or recall / bytes.")] = None,
    samples: Annotated[int, typer.Option(help="Sequences to observe.")] = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per sequence (default: 512; 128 for tiny-recall).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    dtype: Dtype = "float32",
    backend: Annotated[
        str | None, typer.Option(help="Then execute the first batch on this backend and report it, e.g. auto.")
    ] = None,
    device: Device = "cpu",
    overrides: Set = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Observe every tensor inside the delta rule and write a scale for each."""
    from .backends import check_device, get_backend
    from .core.files import check_output, write_text
    from .workflow import is_complete, recipe_of, run_calibration

    chosen = recipe_of(recipe, overrides or ())
    check_device(device)
    if backend is not None:
        backend = get_backend(backend, device).name
    request = {"model": model, "dataset": dataset, "samples": samples, "seq_len": seq_len, "batch_size": batch_size}
    request |= {"dtype": dtype, "backend": backend}
    if not overwrite and output.is_dir() and is_complete(output, model, chosen, request):
        out.print(f"already complete: {output}", highlight=False)
        return
    check_output(output, overwrite)
    with bar(f"calibrating {model}", quiet) as progress:
        calibration = run_calibration(
            model, chosen, dataset=dataset, samples=samples, seq_len=seq_len,
            batch_size=batch_size, text_column=text_column, dtype=dtype, device=device, backend=backend,
            progress=progress,
        )  # fmt: skip
    report = {**calibration.report, "request": request}
    type(calibration)(calibration.recipe, calibration.scales, report).save(output, overwrite)
    out.print(calibration_table(report))
    if "execution" in report:
        ran = report["execution"]
        out.print(f"executed on {ran['backend']}: logits {ran['sqnr_db']} dB from float, {ran['saturated']} clipped")
    out.print(f"{len(calibration.scales)} scales written to {output}", highlight=False)
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def calibration_table(report: Any) -> Table:
    """Sites by their worst head over all layers."""
    title = f"{report['recipe']['name']}: sites, worst head over all layers"
    made = table(title, ("site", "format", "scale"), ("largest |x|", "SQNR dB, least", "clipped"))
    merged: dict[str, list[Any]] = {}
    for sites in report["layers"].values():
        for site, row in sites.items():
            merged.setdefault(site, []).append(row)
    for site, rows in merged.items():
        heads = [h for row in rows for h in row["heads"]]
        largest = max(max(abs(v) for v in h["range"]) for h in heads)
        sqnrs = [h["sqnr_db"] for h in heads if h["sqnr_db"] is not None]
        worst = f"{min(sqnrs):.1f}" if sqnrs else "-"
        saturated = str(sum(h["saturated"] for h in heads))
        made.add_row(site, rows[0]["format"], rows[0]["scale"], f"{largest:.4g}", worst, saturated)
    return made


@app.command(
    "evaluate",
    epilog="Example: qdeltanet evaluate tiny-recall --tasks recall --recipe int8 --recipe int4 --json results.json",
)
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded model, directory, hub id, or exported checkpoint.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated: recall, bytes, or any lm-eval task.")],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="One per row; NAME+key=value overrides.")
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Calibration directory, one per static recipe.")
    ] = None,
    execution: Annotated[str, typer.Option(help="float, fake or integer.")] = "integer",
    backend: Backend = "auto",
    device: Device = "cpu",
    baseline: Annotated[str | None, typer.Option(help="Float model to compare an exported checkpoint with.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests per forward pass.")] = 64,
    dtype: Dtype = "float32",
    overrides: Set = None,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Run lm-eval tasks in integer execution, beside float on the same documents."""
    from .backends import check_device, get_backend
    from .checkpoint import load_calibration
    from .core import unknown
    from .core.files import write_text
    from .eval.evaluate import Row, evaluate
    from .nn import EXECUTIONS
    from .workflow import evaluation_rows, recipe_of, row_name, versions

    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    backend = get_backend(backend, check_device(device)).name
    loaded = [load_calibration(path) for path in calibration or ()]
    named = [(row_name(text), recipe_of(text, overrides or ())) for text in recipe or ()]
    named += [(c.recipe.name, c.recipe) for c in loaded if not named]
    if named:
        rows = evaluation_rows(
            model, named, loaded, execution=execution, backend=backend, device=device, say=say(quiet)
        )
    elif _is_checkpoint(model):
        rows = [Row("float", execution="float", model=baseline)] if baseline else []
        rows.append(Row("checkpoint", execution=execution, backend=backend, model=model))
    else:
        rows = [Row("float", execution="float")]
    names = [t.strip() for t in tasks.split(",") if t.strip()]
    results = evaluate(
        model, rows, names, limit=limit, batch_size=batch_size, dtype=dtype, device=device, progress=say(quiet)
    )
    for task in names:
        out.print(task_table(task, results))
    if json_file is not None:
        content = {"model": model, "device": device, "command": sys.argv[1:], "versions": versions(), "rows": results}
        write_text(json_file, json.dumps(content, indent=1) + "\n")


def _is_checkpoint(model: str) -> bool:
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("quantization_config", {}).get("quant_method") == "qdeltanet")
    except (OSError, ValueError):
        return False


def task_table(task: str, rows: list[dict[str, Any]]) -> Table:
    """One task, a row per recipe and metric; differences are paired, to the first row."""
    made = table(task, ("recipe", "run", "metric"), ("value", "to first, paired", "clipped"))
    for i, row in enumerate(rows):
        for metric, m in row["tasks"].get(task, {}).items():
            value, difference = f"{m['value']:.4f} ±{m['stderr']:.4f}", ""
            if "perplexity" in m:
                metric, value = "ppl", f"{m['perplexity']:.4f}"
            if i and "difference" in m:
                difference = f"{m['difference']:+.4f} ±{m['difference_stderr']:.4f}"
            if i and "perplexity_ratio" in m:
                difference = f"x {m['perplexity_ratio']:.4f} ±{m['perplexity_ratio_stderr']:.4f}"
            made.add_row(row["name"], row["execution"], metric, value, difference, str(row["saturated"]))
    return made


@app.command(epilog="Example: qdeltanet export tiny-recall --calibration cal --output checkpoint")
def export(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="Directory that `qdeltanet calibrate` wrote.")],
    output: Output,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face checkpoint with integer weights and every scale."""
    from .checkpoint import load_calibration
    from .core.files import check_output
    from .workflow import run_export

    check_output(output, overwrite)
    config = run_export(model, load_calibration(calibration), output, overwrite, dtype)
    out.print(f"{config['tensors']} tensors written to {output}", highlight=False)
    out.print(
        f'load it: import qdeltanet; AutoModelForCausalLM.from_pretrained("{output}")', highlight=False, markup=False
    )


@app.command(epilog="Example: qdeltanet ls")
def ls(json_file: Json = None) -> None:
    """List recipes, inverse methods, families of A, sites, backends, hardware profiles, embedded models and data."""
    from .backends import backend_names, backend_status
    from .core.files import write_text
    from .delta_rule import SITES
    from .eval.embedded import DATASETS, MODELS
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
bench.command("cost", epilog="Example: qdeltanet bench cost --chunk-size 64 --json order.json")(bench_cost)
app.command("search", epilog="Example: qdeltanet search tiny-recall --budget 0.4% --output found.yaml")(search_command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, an interrupt 130, never a traceback for either."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    timed = sys.argv[1:2] == ["bench"] and sys.argv[2:3] not in (["stability"], ["variants"], ["neumann"])
    if not timed:  # read when torch loads: spinning threads are fast alone, and stall a busy machine
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty() or {"-q", "--quiet"} & set(sys.argv):
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KeyboardInterrupt:
        err.print("qdeltanet: interrupted; nothing half-written was left", highlight=False)
        sys.exit(130)
    except Exception as e:
        from .core.errors import QDeltaNetError  # loads torch, which --help does not wait for

        if not isinstance(e, QDeltaNetError):
            raise
        err.print(f"qdeltanet: {e}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

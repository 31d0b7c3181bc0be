"""The command `evaluate`: lm-eval's tasks in integer execution, beside float."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._console import Backend, Device, Dtype, Json, Quiet, Set, err, out, say, table

if TYPE_CHECKING:
    from .checkpoint import Calibration
    from .eval.evaluate import Row


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
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per process; the last bits of floats depend on their number.")
    ] = None,
    dtype: Dtype = "float32",
    overrides: Set = None,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Run lm-eval tasks in integer execution, beside float on the same documents.

    Started by torchrun or accelerate, the processes share the batches; any number of them gives the same bits.
    """
    from . import _processes
    from ._threads import threads as pinned
    from ._threads import usable_cores
    from .backends import check_device, get_backend
    from .checkpoint import load_calibration
    from .core import unknown
    from .core.files import write_text
    from .eval.evaluate import evaluate
    from .nn import EXECUTIONS
    from .workflow import recipe_of, row_name, versions

    if _processes.only_one_started():
        err.print(f"qdeltanet: {_processes.ONE_PROCESS}", highlight=False, markup=False, soft_wrap=True)
    with _processes.joined() as processes, pinned(processes.agree(threads or usable_cores())) as used:
        tell = say(quiet or not processes.first)
        if execution not in EXECUTIONS:
            raise unknown("execution", execution, EXECUTIONS)
        device = check_device(processes.device(device))
        backend = get_backend(backend, device).name
        loaded = [load_calibration(path) for path in calibration or ()]
        named = [(row_name(text), recipe_of(text, overrides or ())) for text in recipe or ()]
        named += [(c.recipe.name, c.recipe) for c in loaded if not named]
        rows = _rows(model, named, loaded, execution, backend, device, baseline, tell)
        names = [t.strip() for t in tasks.split(",") if t.strip()]
        results = evaluate(
            model, rows, names, limit=limit, batch_size=batch_size, dtype=dtype, device=device, progress=tell
        )
        for task in names:
            out.print(task_table(task, results))
        if json_file is not None and processes.first:
            content = {"model": model, "device": device, "threads": used, "processes": processes.world}
            content |= {"command": sys.argv[1:], "versions": versions(), "rows": results}
            write_text(json_file, json.dumps(content, indent=1) + "\n")


def _rows(
    model: str,
    named: Sequence[Any],
    loaded: Sequence[Calibration],
    execution: str,
    backend: str,
    device: str,
    baseline: str | None,
    tell: Any,
) -> list[Row]:
    """A row per recipe beside float, or an exported checkpoint beside its baseline, or the model as it is."""
    from .eval.evaluate import Row
    from .workflow import evaluation_rows

    if named:
        return evaluation_rows(model, named, loaded, execution=execution, backend=backend, device=device, say=tell)
    if not _is_checkpoint(model):
        return [Row("float", execution="float")]
    rows = [Row("float", execution="float", model=baseline)] if baseline else []
    return [*rows, Row("checkpoint", execution=execution, backend=backend, model=model)]  # type: ignore[arg-type]


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

"""The command `evaluate`: lm-eval's tasks in integer execution, beside float."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._console import Backend, Device, Dtype, Json, Quiet, Set, err, out, say, table, writable

if TYPE_CHECKING:
    from .checkpoint import Calibration
    from .eval.evaluate import Row


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded model, directory, hub id, or exported checkpoint.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated: those of `qdeltanet ls`, or any lm-eval task or group.")],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="One per row; NAME+key=value overrides.")
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Calibration directory, one per static recipe.")
    ] = None,
    checkpoint: Annotated[list[str] | None, typer.Option(help="Exported checkpoint, one per row.")] = None,
    execution: Annotated[
        list[str] | None, typer.Option(help="float, fake or integer (default); several give a row each.")
    ] = None,
    backend: Backend = "auto",
    device: Device = "cpu",
    baseline: Annotated[str | None, typer.Option(help="Float model to compare an exported checkpoint with.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
    batch_size: Annotated[str, typer.Option(help="Requests per forward pass, or auto.")] = "64",
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt (default: the task's).")
    ] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="As lm-eval's option.")] = False,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="As lm-eval's, for tasks that generate: temperature=0,max_gen_toks=256.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval task files.")] = None,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="KL and top-1 to the first row: both models in memory.")
    ] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps every row's answers for the same request.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per process; the last bits of floats depend on their number.")
    ] = None,
    dtype: Dtype = "float32",
    overrides: Set = None,
    quiet: Quiet = False,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(callback=writable, help="Also write tables in Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(callback=writable, help="Also write every figure as CSV.")] = None,
) -> None:
    """Run lm-eval tasks in integer execution, beside float on the same documents.

    The first row is the baseline of paired differences, with 95% intervals of a bootstrap over documents. Started by
    torchrun or accelerate, the processes share the batches; any number of them gives the same bits.
    """
    from . import _processes
    from ._threads import threads as pinned
    from ._threads import usable_cores
    from .backends import check_device, get_backend
    from .checkpoint import load_calibration
    from .core import unknown
    from .eval.evaluate import evaluate
    from .nn import EXECUTIONS
    from .workflow import recipe_of, row_name, versions

    if _processes.only_one_started():
        err.print(f"qdeltanet: {_processes.ONE_PROCESS}", highlight=False, markup=False, soft_wrap=True)
    with _processes.joined() as processes, pinned(processes.agree(threads or usable_cores())) as used:
        tell = say(quiet or not processes.first)
        executions = list(dict.fromkeys(execution or ["integer"]))
        for name in executions:
            if name not in EXECUTIONS:
                raise unknown("execution", name, EXECUTIONS)
        device = check_device(processes.device(device))
        backend = get_backend(backend, device).name
        names = [t.strip() for t in tasks.split(",") if t.strip()]
        settings: dict[str, Any] = {
            "limit": limit, "batch_size": _batch_size(batch_size), "dtype": dtype, "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template, "gen_kwargs": gen_kwargs, "logits": logits,
        }  # fmt: skip
        shown = _check_tasks(names, num_fewshot, include_path, tell)
        loaded = [load_calibration(path) for path in calibration or ()]
        named = [(row_name(text), recipe_of(text, overrides or ())) for text in recipe or ()]
        named += [(c.recipe.name, c.recipe) for c in loaded if not named]
        rows = _rows(model, named, loaded, executions, backend, device, baseline, checkpoint or (), tell)
        results = evaluate(
            model, rows, names, device=device, include_path=include_path, cache=cache, progress=tell, **settings
        )
        content = {
            "model": model,
            "tasks": list(shown),
            "device": device,
            "threads": used,
            "processes": processes.world,
        }
        content |= {"settings": settings, "command": sys.argv[1:], "versions": versions(), "rows": results}
        for task in shown:
            _print_task(task, results)
        if processes.first:
            _write(content, json_file, markdown, csv)


def _check_tasks(names: Sequence[str], num_fewshot: int | None, include_path: Path | None, tell: Any) -> Sequence[str]:
    """Before anything is calibrated: tasks that cannot be loaded, and an option that they will not take. Returns what
    is shown: the tasks of a tag, a group as one."""
    from .eval.task_files import load_tasks

    loaded = load_tasks(names, 1, include_path)
    if num_fewshot and loaded.fixed:
        tell(f"--num-fewshot {num_fewshot} does not reach {', '.join(loaded.fixed)}: 0 by the task's own file")
    return loaded.names


def _batch_size(text: str) -> int | str:
    from .core import QDeltaNetError

    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise QDeltaNetError(f"--batch-size {text!r}: write a number above 0, or auto")
    return text if text == "auto" else int(text)


def _rows(
    model: str,
    named: Sequence[Any],
    loaded: Sequence[Calibration],
    executions: Sequence[str],
    backend: str,
    device: str,
    baseline: str | None,
    checkpoints: Sequence[str],
    tell: Any,
) -> list[Row]:
    """A row per recipe and execution and per checkpoint beside float; of a model that is an exported checkpoint, it
    beside its baseline."""
    from .eval.evaluate import Row
    from .workflow import evaluation_rows

    if named:
        rows = evaluation_rows(model, named, loaded, execution=executions[0], backend=backend, device=device, say=tell)
    elif _is_checkpoint(model):
        rows = [Row("float", execution="float", model=baseline)] if baseline else []
        rows += [Row("checkpoint", execution=e, backend=backend, model=model) for e in executions]  # type: ignore[arg-type]
    else:
        rows = [Row("float", execution="float")]
    for path in checkpoints:
        name = Path(path).name if [Path(p).name for p in checkpoints].count(Path(path).name) == 1 else str(path)
        rows += [Row(name, execution=e, backend=backend, model=path) for e in executions]  # type: ignore[arg-type]
    return [again for row in rows for again in _executed(row, executions)]


def _executed(row: Row, executions: Sequence[str]) -> list[Row]:
    """Of a recipe: what is float runs once, and a checkpoint has its rows already."""
    if row.recipe is None or row.recipe.is_float:
        return [row]
    return [replace(row, execution=e) for e in executions]  # type: ignore[arg-type]


def _is_checkpoint(model: str) -> bool:
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        own = (config.get("quantization_config") or {}).get("quant_method") == "qdeltanet"
        return own or "qdeltanet_config" in config  # which other formats of ours bear
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _write(content: dict[str, Any], json_file: Path | None, markdown: Path | None, csv: Path | None) -> None:
    from .core.files import write_text
    from .eval.tables import csv_text, finite, markdown_text

    content = finite(content)
    if json_file is not None:
        write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if markdown is not None:
        write_text(markdown, markdown_text(content))
    if csv is not None:
        write_text(csv, csv_text(content))


def _print_task(task: str, rows: list[dict[str, Any]]) -> None:
    out.print(task_table(task, rows))
    if len(rows) > 1:
        out.print(comparison_table(task, rows))


def task_table(task: str, rows: list[dict[str, Any]]) -> Table:
    """One task, a row per recipe and metric; differences are paired, to the first row."""
    from .eval.tables import change_text, entries, value_text

    made = table(task, ("recipe", "run", "metric"), ("value", "to first, paired", "clipped"))
    for e in entries(rows, [task]):
        made.add_row(e["row"], e["execution"], e["metric"], value_text(e), change_text(e), str(e["clipped"]))
    return made


def comparison_table(task: str, rows: list[dict[str, Any]]) -> Table:
    """Beside it: the interval of the difference or ratio, KL divergence from the first row's next token, and how often
    the likeliest one agrees. No speeds: the same command prints the same."""
    from .eval.tables import change_interval, entries, kl_text, top1_text

    made = table(f"{task}: 95% intervals; scored tokens", ("recipe", "run", "metric"), ("95%", "KL", "top-1"))
    before = None
    for e in entries(rows, [task]):
        row = e["row"], e["execution"]
        once = (kl_text(e, with_interval=False), top1_text(e)) if row != before else ("", "")
        made.add_row(*row, e["metric"], change_interval(e), *once)
        before = row
    return made

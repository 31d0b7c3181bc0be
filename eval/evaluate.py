"""Run tasks through lm-eval for one or several recipes and compare them with float, document by document."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from .._processes import current, joined
from ..backends import AUTO
from ..checkpoint import Calibration
from ..core import QDeltaNetError, unknown
from ..models import load_tokenizer
from ..nn import Execution
from ..recipe import Recipe
from .embedded import model_path
from .lm import QDeltaNetLM
from .prepare import prepare_model, saturation
from .statistics import Documents, documents, paired
from .task_data import TASKS
from .task_files import task_manager


@dataclass(frozen=True)
class Row:
    """What one line of the table asks for. recipe None: the model as it is (float, or an exported checkpoint)."""

    name: str
    recipe: Recipe | None = None
    calibration: Calibration | None = None
    execution: Execution = "integer"
    backend: str = AUTO
    model: str | None = None


@dataclass(frozen=True)
class RowResult:
    """What one line measured: documents by task and metric, saturation by layer and site, seconds."""

    row: Row
    tasks: dict[str, dict[str, Documents]]
    saturated: dict[str, int]
    seconds: float


def run_row(
    model_name: str,
    row: Row,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
) -> RowResult:
    """One model over all tasks. Raises QDeltaNetError for unknown tasks or tasks that cannot be loaded."""
    manager = manager_for(tasks)
    name = row.model or model_name
    start = time.monotonic()
    model = prepare_model(name, row.recipe, row.calibration, row.execution, row.backend, dtype, device)
    lm = QDeltaNetLM(model, tokenizer=load_tokenizer(model_path(name)), batch_size=batch_size)
    try:
        with lm_eval_reports(True):
            results = lm_eval.simple_evaluate(
                lm, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
            )
    except (OSError, ConnectionError) as e:
        first = str(e).strip().splitlines()[0]
        raise QDeltaNetError(f"tasks {', '.join(tasks)}: {first}") from e
    assert results is not None
    measured = {task: documents(samples) for task, samples in results["samples"].items()}
    saturated = sum(current().gather(saturation(model)), Counter())  # each process has seen its own batches
    return RowResult(row, measured, dict(saturated), time.monotonic() - start)


@contextmanager
def lm_eval_reports(yes: bool) -> Iterator[None]:
    """Among several processes, whether lm-eval has a result in this one, and its command line prints and writes it.

    It goes by LOCAL_RANK, which is 0 once on every machine, while all our processes have the whole result.
    """
    if current().world == 1:
        yield
        return
    from accelerate import PartialState

    PartialState()  # chooses this process's GPU by LOCAL_RANK, once
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0" if yes else "1"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        os.environ |= {} if before is None else {"LOCAL_RANK": before}


def manager_for(tasks: Sequence[str]) -> TaskManager:
    """The manager that knows the tasks: ours alone, or with lm-eval's own, which take seconds to list.

    Raises QDeltaNetError for a task that neither knows.
    """
    if not tasks:
        raise QDeltaNetError("no tasks given; e.g. --tasks recall,bytes")
    manager = task_manager(include_defaults=bool(set(tasks) - set(TASKS)))
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown("task", task, [*TASKS, *manager.all_tasks])
    return manager


def evaluate(
    model_name: str,
    rows: Sequence[Row],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Every row over the same documents; the first row is the baseline of the paired differences.

    Processes that a launcher started share the work, and each returns the whole result. CPU threads are the caller's to
    pin (`_threads.threads`).

    Returns plain data, a dictionary per row: name, recipe, execution, backend, seconds, saturated (total),
    saturated_sites, and per task and metric: value, stderr, and against the baseline difference, difference_stderr
    (and for nats_per_byte the perplexity and its ratio to the baseline's).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager_for(tasks)
    results: list[RowResult] = []
    with joined():
        for row in rows:
            if progress is not None:
                progress(row.name)
            results.append(
                run_row(model_name, row, tasks, limit=limit, batch_size=batch_size, dtype=dtype, device=device)
            )
    return [summary(r, results[0]) for r in results]


def summary(result: RowResult, baseline: RowResult) -> dict[str, Any]:
    """Plain data of one row beside its baseline."""
    row = result.row
    tasks: dict[str, dict[str, Any]] = {}
    for task, metrics in result.tasks.items():
        tasks[task] = {m: _metric(d, baseline.tasks[task].get(m)) for m, d in metrics.items()}
    return {
        "name": row.name,
        "recipe": None if row.recipe is None else row.recipe.name,
        "recipe_fingerprint": None if row.recipe is None else row.recipe.fingerprint,
        "execution": "float" if row.recipe is None and row.model is None else _execution(row),
        "backend": row.backend,
        "seconds": round(result.seconds, 2),
        "saturated": sum(result.saturated.values()),
        "saturated_sites": result.saturated,
        "tasks": tasks,
    }


def _execution(row: Row) -> str:
    return "float" if row.recipe is not None and row.recipe.is_float else row.execution


def _metric(own: Documents, base: Documents | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": own.estimate, "stderr": own.stderr, "documents": len(own.ids)}
    if base is not None:
        entry["difference"], entry["difference_stderr"] = paired(own, base)
    if own.kind == "rate":
        entry["perplexity"] = math.exp(own.estimate)
        if base is not None:
            entry["perplexity_ratio"] = math.exp(entry["difference"])
            entry["perplexity_ratio_stderr"] = entry["perplexity_ratio"] * entry["difference_stderr"]
    return entry

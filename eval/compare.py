"""What a row measured, beside the baseline's on the same documents, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backends import AUTO
from ..checkpoint import Calibration
from ..nn import Execution
from ..recipe import Recipe
from .divergence import Divergence
from .statistics import Documents, bootstrap, interval, paired

MOST_NATS = 700.0  # whose exponential float64 holds


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
    """What one line measured: documents by task and metric, saturation by layer and site, seconds of its evaluation.

    logits: per task the documents of `kl` and `top1` against the baseline. work: tokens and seconds in the model.
    hashes: what the figures belong to. cached: whether they were kept from another run.
    """

    row: Row
    tasks: dict[str, dict[str, Documents]]
    saturated: dict[str, int]
    seconds: float
    logits: dict[str, dict[str, Documents]] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    cached: bool = False


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
        "execution": "float" if row.recipe is None and row.model is None else execution_of(row),
        "backend": row.backend,
        "model": row.model,
        "hashes": dict(result.hashes),
        "seconds": round(result.seconds, 2),
        "cached": result.cached,
        "tokens_per_second": _rate(result.work, "scored"),
        "generated_per_second": _rate(result.work, "generated"),
        "saturated": sum(result.saturated.values()),
        "saturated_sites": result.saturated,
        "tasks": tasks,
        "logits": {task: _logits(found) for task, found in result.logits.items()},
    }


def execution_of(row: Row) -> str:
    """As a table calls it: a float recipe runs in float whatever was asked for."""
    return "float" if row.recipe is not None and row.recipe.is_float else row.execution


def _rate(work: Mapping[str, float], what: str) -> float | None:
    seconds = work.get(f"{what}_seconds", 0.0)
    return round(work[what] / seconds, 1) if seconds else None


def _metric(own: Documents, base: Documents | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": own.estimate, "stderr": own.stderr, "documents": len(own.ids)}
    if base is not None:
        entry["difference"], entry["difference_stderr"] = paired(own, base)
        entry["difference_interval"] = list(interval(own, base))
    if own.kind == "rate":
        entry["perplexity"] = _exp(own.estimate)
        if base is not None:
            entry["perplexity_ratio"] = _exp(entry["difference"])
            entry["perplexity_ratio_stderr"] = entry["perplexity_ratio"] * entry["difference_stderr"]
            entry["perplexity_ratio_interval"] = [_exp(x) for x in entry["difference_interval"]]
    return entry


def _exp(nats: float) -> float:
    """Infinite beyond float64."""
    return math.exp(nats) if nats < MOST_NATS else math.inf


def _logits(found: Mapping[str, Documents]) -> dict[str, Any]:
    kl, top1 = found["kl"], found["top1"]
    return {
        "kl": kl.estimate,
        "kl_interval": list(bootstrap(kl.value, kl.weight, kl.cluster)),
        "top1": top1.estimate,
        "tokens": int(kl.weight.sum()),
    }


def by_task(
    compared: Mapping[tuple[str, int], Divergence], measured: Mapping[str, Mapping[str, Documents]]
) -> dict[str, dict[str, Documents]]:
    """Divergences of (task, document) as documents of `kl` and `top1`, clustered as the task's own metrics are."""
    found: dict[str, dict[str, Documents]] = {}
    for task in dict.fromkeys(task for task, _ in compared):
        own = {i: d for (name, i), d in compared.items() if name == task}
        cluster = next((m.cluster for m in measured.get(task, {}).values() if len(m.ids) == len(own)), ())
        ids = tuple(sorted(own))
        kl, agree, tokens = np.array([own[i] for i in ids], dtype=np.float64).T
        found[task] = {
            "kl": Documents("share", ids, kl, tokens, cluster),
            "top1": Documents("share", ids, agree, tokens, cluster),
        }
    return found

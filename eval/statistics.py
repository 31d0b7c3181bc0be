"""Means, standard errors and paired differences over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20_261_121
_AT_ONCE = 1 << 22  # numbers of one block of resamples


@dataclass(frozen=True)
class Documents:
    """Per-document values of one metric, by document id; `weight` is 1, or what the value is a sum over.

    kind `mean` averages values; kind `share` is sum(value) / sum(weight), e.g. instructions followed; kind `rate` is
    the same of negative log-likelihoods, e.g. nats per byte. cluster: documents of one number share their text (queries
    of one sequence) and are resampled together; empty where each stands alone.
    """

    kind: str
    ids: tuple[Any, ...]
    value: np.ndarray
    weight: np.ndarray
    cluster: tuple[Any, ...] = field(default=())

    @property
    def estimate(self) -> float:
        return float(self.value.sum() / self.weight.sum())

    @property
    def stderr(self) -> float:
        """Of the mean, or of the ratio by linearisation."""
        return _ratio_stderr(self.value, self.weight)


def paired(a: Documents, b: Documents) -> tuple[float, float]:
    """a - b over the same documents: (difference, its standard error). Raises ValueError if documents differ."""
    difference = _difference(a, b)
    return float(difference.sum() / a.weight.sum()), _ratio_stderr(difference, a.weight)


def interval(a: Documents, b: Documents) -> tuple[float, float]:
    """The bootstrap confidence interval of a - b: percentiles over documents drawn again, pairs kept together.

    2,000 resamples of a fixed seed, 95%; documents of one cluster are drawn together. NaN for fewer than two.
    Raises ValueError if documents differ.
    """
    return bootstrap(_difference(a, b), a.weight, a.cluster)


def bootstrap(value: np.ndarray, weight: np.ndarray, cluster: Sequence[Any] = ()) -> tuple[float, float]:
    """Percentile interval of sum(value) / sum(weight), both [n]; the same draws for the same n.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if len(cluster):
        _, place = np.unique(np.asarray(cluster), return_inverse=True)
        value, weight = np.bincount(place, value), np.bincount(place, weight)
    n = len(value)
    if n < 2:
        return math.nan, math.nan
    ratios = np.empty(RESAMPLES)
    block = max(1, _AT_ONCE // n)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(n, size=(min(block, RESAMPLES - start), n))
        ratios[start : start + len(drawn)] = value[drawn].sum(1) / weight[drawn].sum(1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _difference(a: Documents, b: Documents) -> np.ndarray:
    if a.ids != b.ids or not np.array_equal(a.weight, b.weight):
        raise ValueError("paired differences need the same documents in both rows")
    return a.value - b.value


def _ratio_stderr(value: np.ndarray, weight: np.ndarray) -> float:
    n = len(value)
    if n < 2:
        return math.nan
    residual = value - (value.sum() / weight.sum()) * weight
    return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / weight.sum())


def documents(samples: Sequence[Mapping[str, Any]]) -> dict[str, Documents]:
    """Metrics of one task from lm-eval's logged samples, by name; `metric,filter` where a task filters its answers.

    Numbers make means; lists of truth values (ifeval's instructions) a share; (log-likelihood, bytes or words) of a
    rolling task `nats_per_byte` and `nats_per_word`. What aggregates otherwise is left to lm-eval itself.
    """
    found: dict[str, Documents] = {}
    for name in dict.fromkeys(s.get("filter", "none") for s in samples):
        of_filter = [s for s in samples if s.get("filter", "none") == name]
        suffix = "" if name == "none" else f",{name}"
        found |= {f"{metric}{suffix}": d for metric, d in _of_filter(of_filter).items()}
    return found


# What a rolling task weighs a log-likelihood by: lm-eval's bits_per_byte and byte_perplexity are the same pairs.
_RATES = {"bits_per_byte": "nats_per_byte", "word_perplexity": "nats_per_word"}


def _of_filter(samples: Sequence[Mapping[str, Any]]) -> dict[str, Documents]:
    ordered = sorted(samples, key=lambda s: s["doc_id"])
    ids = tuple(int(s["doc_id"]) for s in ordered)
    sequences = [s["doc"].get("sequence") if isinstance(s.get("doc"), Mapping) else None for s in ordered]
    cluster = () if None in sequences else tuple(sequences)
    found: dict[str, Documents] = {}
    for metric in ordered[0].get("metrics", ()):
        values: list[Any] = [s.get(metric) for s in ordered]
        if all(isinstance(v, (int, float, np.floating, np.bool_)) for v in values):
            array = np.asarray(values, dtype=np.float64)
            found[metric] = Documents("mean", ids, array, np.ones(len(ids)), cluster)
        elif metric in _RATES and all(isinstance(v, (tuple, list)) for v in values):
            pairs = np.asarray(values, dtype=np.float64)
            found[_RATES[metric]] = Documents("rate", ids, -pairs[:, 0], pairs[:, 1], cluster)
        elif all(isinstance(v, list) and v and all(isinstance(x, (bool, np.bool_)) for x in v) for v in values):
            sums, counts = ([float(f(v)) for v in values] for f in (sum, len))
            found[metric] = Documents("share", ids, np.asarray(sums), np.asarray(counts), cluster)
    return found


def pooled(parts: Mapping[str, Mapping[str, Documents]]) -> dict[str, Documents]:
    """A group of tasks as one: the documents of all, for the metrics that every task has."""
    shared = set.intersection(*(set(metrics) for metrics in parts.values()))
    found = {}
    for metric in next(iter(parts.values())):
        if metric in shared:
            own = {task: metrics[metric] for task, metrics in parts.items()}
            ids = tuple((task, i) for task, d in own.items() for i in d.ids)
            value, weight = (np.concatenate([getattr(d, a) for d in own.values()]) for a in ("value", "weight"))
            found[metric] = Documents(next(iter(own.values())).kind, ids, value, weight)
    return found

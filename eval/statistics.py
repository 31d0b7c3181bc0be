"""Means, standard errors and paired differences over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Per-document values of one metric, by document id; `weight` is 1, or bytes or words for a rolling likelihood.

    kind `mean` averages values; kind `rate` is sum(value) / sum(weight), e.g. nats per byte.
    """

    kind: str
    ids: tuple[int, ...]
    value: np.ndarray
    weight: np.ndarray

    @property
    def estimate(self) -> float:
        return float(self.value.sum() / self.weight.sum())

    @property
    def stderr(self) -> float:
        """Of the mean, or of the ratio by linearisation."""
        return _ratio_stderr(self.value, self.weight)


def paired(a: Documents, b: Documents) -> tuple[float, float]:
    """a - b over the same documents: (difference, its standard error). Raises ValueError if documents differ."""
    if a.ids != b.ids or not np.array_equal(a.weight, b.weight):
        raise ValueError("paired differences need the same documents in both rows")
    difference = a.value - b.value
    return float(difference.sum() / a.weight.sum()), _ratio_stderr(difference, a.weight)


def _ratio_stderr(value: np.ndarray, weight: np.ndarray) -> float:
    n = len(value)
    if n < 2:
        return math.nan
    residual = value - (value.sum() / weight.sum()) * weight
    return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / weight.sum())


def documents(samples: Sequence[Mapping[str, Any]]) -> dict[str, Documents]:
    """Metrics of one task from lm-eval's logged samples: every scalar metric, and `nats_per_byte` of a rolling task."""
    ordered = sorted(samples, key=lambda s: s["doc_id"])
    ids = tuple(int(s["doc_id"]) for s in ordered)
    found: dict[str, Documents] = {}
    for metric in ordered[0].get("metrics", ()):
        values = [s.get(metric) for s in ordered]
        if all(isinstance(v, (int, float, np.floating, np.bool_)) for v in values):
            array = np.asarray(values, dtype=np.float64)
            found[metric] = Documents("mean", ids, array, np.ones(len(ids)))
        elif metric == "bits_per_byte" and all(isinstance(v, (tuple, list)) for v in values):
            pairs = np.asarray(values, dtype=np.float64)
            found["nats_per_byte"] = Documents("rate", ids, -pairs[:, 0], pairs[:, 1])
    return found

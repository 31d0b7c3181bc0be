"""A row's figures as JSON that gives every bit back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .compare import Row, RowResult
from .statistics import Documents

_TABLES = ("tasks", "logits")
_PLAIN = ("saturated", "seconds", "work")


def to_plain(result: RowResult) -> dict[str, Any]:
    """Everything measured; what was asked for stands in the key that it is kept under."""
    plain = {name: getattr(result, name) for name in _PLAIN}
    for name in _TABLES:
        of_tasks: dict[str, dict[str, Documents]] = getattr(result, name)
        plain[name] = {task: {m: _plain(d) for m, d in found.items()} for task, found in of_tasks.items()}
    return plain


def from_plain(row: Row, plain: Mapping[str, Any], hashes: Mapping[str, str | None]) -> RowResult:
    """The inverse of `to_plain`."""
    tables = {n: {t: {m: _documents(d) for m, d in f.items()} for t, f in plain[n].items()} for n in _TABLES}
    rest: dict[str, Any] = {name: plain[name] for name in _PLAIN}
    return RowResult(row, tables["tasks"], logits=tables["logits"], **rest, hashes=hashes, cached=True)


def _plain(d: Documents) -> dict[str, Any]:
    return {
        "kind": d.kind,
        "ids": d.ids,
        "value": d.value.tolist(),
        "weight": d.weight.tolist(),
        "cluster": d.cluster,
    }


def _documents(plain: Mapping[str, Any]) -> Documents:
    ids = tuple(tuple(i) if isinstance(i, list) else i for i in plain["ids"])
    value, weight = (np.asarray(plain[name], dtype=np.float64) for name in ("value", "weight"))
    return Documents(plain["kind"], ids, value, weight, tuple(plain["cluster"]))

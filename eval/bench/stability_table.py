"""What the rows of `bench stability` say: worst ratio to the floor by method and format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from ...inverse import METHODS
from ...inverse.families import UNIFORM

Row = Mapping[str, Any]


def label(row: Row) -> str:
    """Method and what differs from its defaults: `block_merge 2^6`, `neumann N4 S3` (N for order and band alike)."""
    usual = {k: p.default for k, p in signature(METHODS[row["method"]]).parameters.items()}
    options = {k: v for k, v in row["options"].items() if v != usual.get(k) and usual.get(k, v) is not None}
    parts = [row["method"]]
    if "radices" in row["options"]:
        parts.append(_radices(row["options"]["radices"]))
    if options.get("band") == row["options"].get("order"):
        options.pop("band", None)
    short = {"order": "N", "residual_steps": "S", "residual_sum": "", "join": "", "form": ""}
    parts += [f"{short[k]}{v}" if k in short else f"{k}={v}" for k, v in options.items()]
    return " ".join(parts)


def _radices(radices: Iterable[int]) -> str:
    """(2, 2, 2, 2) as 2^4, (16, 4) as 16,4."""
    runs: list[list[int]] = []
    for r in radices:
        if runs and runs[-1][0] == r:
            runs[-1][1] += 1
        else:
            runs.append([r, 1])
    return ",".join(f"{r}^{n}" if n > 1 else str(r) for r, n in runs)


def counted(rows: Iterable[Row]) -> list[Row]:
    """Rows of what a delta rule can make; all of them where there is nothing else."""
    every = list(rows)
    return [r for r in every if r["family"] != UNIFORM.name] or every


def worst_ratio(rows: Iterable[Row]) -> float:
    """Largest worst_to_floor; infinite where any T overflowed, 0 for no rows."""
    return max((math.inf if r["worst_to_floor"] is None else r["worst_to_floor"] for r in rows), default=0.0)


def ratios(rows: Iterable[Row]) -> dict[tuple[str, bool], dict[str, float]]:
    """(label, default) -> format -> worst ratio over families and chunk sizes, in the order of the rows.

    The default method is one line whatever its radices at each chunk size.
    """
    cells: dict[tuple[str, bool], dict[str, list[Row]]] = {}
    for row in counted(rows):
        name = row["method"] if row["default"] else label(row)
        cells.setdefault((name, row["default"]), {}).setdefault(row["format"], []).append(row)
    return {key: {name: worst_ratio(own) for name, own in by.items()} for key, by in cells.items()}


def default_ratios(rows: Iterable[Row]) -> dict[str, float]:
    """The default method's worst ratio per integer format."""
    own = [r for r in counted(rows) if r["default"] and r["format"].startswith("int")]
    return {
        name: worst_ratio(r for r in own if r["format"] == name) for name in dict.fromkeys(r["format"] for r in own)
    }


def matrix_counts(rows: Iterable[Row]) -> str:
    """How many matrices of a family were measured: `256; column_sweep, forward_substitution 64`."""
    seen: dict[str, set[int]] = {}
    for row in rows:
        seen.setdefault(row["method"], set()).add(row["matrices"])
    methods: dict[str, list[str]] = {}
    for method, counts in seen.items():
        low, high = min(counts), max(counts)
        methods.setdefault(str(low) if low == high else f"{low} to {high}", []).append(method)
    usual, *others = sorted(methods.items(), key=lambda item: -len(item[1]))
    return "; ".join([usual[0], *(f"{', '.join(names)} {count}" for count, names in others)])


def figure(x: float) -> str:
    """Four characters at most: 1.62, 37, 4e6, 2e22, or inf for an overflow."""
    if math.isinf(x):
        return "inf"
    return f"{x:.2f}" if x < 10 else f"{x:.0f}" if x < 1000 else f"{x:.0e}".replace("e+0", "e").replace("e+", "e")

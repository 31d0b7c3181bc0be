"""Pictures of the laboratory, for docs/inversion.md and reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..._pictures import BLUE, COLOURS, GREY, new_figure, png
from ...core import IntFormat, SiteScheme
from ...core.files import write_bytes
from ...delta_rule.laboratory import exact_inverse
from ...inverse import Profile, plan, plan_cost, register_ranges
from ...inverse.families import FAMILIES, Shape
from ...inverse.speedups import alike
from .stability_table import Row, counted, label, worst_ratio

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHOWN = ("iid", "silu", "repeated", "correlated", "ones")
LIMIT = 1e6  # right end of an axis of ratios; beyond it, and for overflow, a marker stands at the end
SEED = 3


def plot_powers(path: Path, chunk_size: int = 64) -> None:
    """Why the inverse is hard: the largest entry of A^n by n for some families, beside what the inverse itself and the
    registers of the default method reach."""
    figure = new_figure(8, 4)
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    reached = {}
    for name, colour, marker in zip(SHOWN, COLOURS, MARKERS, strict=False):
        A = FAMILIES[name].matrices(Shape(4, 32, chunk_size), SEED)
        axes.semilogy(range(1, chunk_size), _powers(A), color=colour, marker=marker, markevery=8, ms=5, label=name)
        inverse = float((exact_inverse(A) - torch.eye(chunk_size)).abs().amax())
        registers = max(register_ranges(plan(chunk_size=chunk_size), A).values())
        reached[name] = inverse, registers
    axes.set(
        xlabel="n", ylabel="largest entry of |A^n|", title=f"Powers of A, chunks of {chunk_size}", ylim=(1e-6, None)
    )
    axes.legend(fontsize=8)
    for k, text in enumerate(("T - I, the inverse", "any register of the default method")):
        bars.barh([i + 0.4 * k for i in range(len(SHOWN))], [v[k] for v in reached.values()], 0.38,
                  color=COLOURS[k], hatch=("", "//")[k], edgecolor="white", label=text)  # fmt: skip
    bars.set_yticks([i + 0.2 for i in range(len(SHOWN))], SHOWN)
    bars.set(xlabel="largest entry", title="What has to be held", xlim=(0, 1.1), ylim=(-0.4, len(SHOWN) + 0.9))
    bars.legend(fontsize=8, loc="upper right")
    write_bytes(path, png(figure))


def _powers(A: torch.Tensor) -> list[float]:
    """Largest |entry| of A^n, n = 1 .. C - 1; NaN where there is nothing left."""
    power, found = A, []
    for _ in range(1, A.shape[-1]):
        found.append(float(power.abs().amax()) or math.nan)
        power = power @ A
    return found


def plot_methods(rows: Iterable[Row], path: Path, formats: Sequence[str] = ("int16", "int8", "int4")) -> None:
    """Worst error over the floor by method, one marker per format; rows as `stability` gives them."""
    cells = _cells(rows, formats)
    figure = new_figure(8, 1.2 + 0.24 * len(cells))
    axes = figure.subplots()
    places = range(len(cells), 0, -1)
    for name, colour, marker in zip(formats, COLOURS, MARKERS, strict=False):
        worst = [min(by.get(name, math.inf), LIMIT) for by in cells.values()]
        axes.scatter(worst, places, color=colour, marker=marker, s=28, label=name.upper(), zorder=3)
    axes.axvline(1, color="grey", lw=1)
    axes.axvline(2, color="grey", lw=1, ls="--")
    axes.set_yticks(list(places), list(cells), fontsize=8)
    axes.set(
        xscale="log",
        xlim=(0.5, 1.6 * LIMIT),
        xlabel="worst error / floor (dashed: 2; right edge: 1e6 and beyond, or overflow)",
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    axes.set_title(f"Every method, worst family, chunks of {', '.join(sorted({str(r['chunk_size']) for r in rows}))}")
    write_bytes(path, png(figure))


def _cells(rows: Iterable[Row], formats: Sequence[str]) -> dict[str, dict[str, float]]:
    grouped: dict[str, dict[str, list[Row]]] = {}
    for row in counted(rows):
        name = f"{label(row)} (default)" if row["default"] else label(row)
        grouped.setdefault(name, {}).setdefault(row["format"], []).append(row)
    ratios = {name: {f: worst_ratio(own) for f, own in by.items()} for name, by in grouped.items()}
    return dict(sorted(ratios.items(), key=lambda item: [item[1].get(f, math.inf) for f in ("int8", *formats)]))


def plot_cost(points: Mapping[str, tuple[float, float]], path: Path, profile: str) -> None:
    """Cost of one inverse against its worst error over the floor. points: name -> (ns, ratio); those that none beats in
    both stand out."""
    figure = new_figure(9, 4.5)
    axes, names = figure.subplots(1, 2, width_ratios=(3, 1))
    names.axis("off")
    named = _cheapest(points)
    for n, (name, (cost, ratio)) in enumerate(sorted(points.items(), key=lambda item: item[1]), 1):
        colour, height = BLUE if name in named else GREY, min(ratio, LIMIT)
        axes.scatter(cost, height, color=colour, s=36 if name in named else 16, zorder=3)
        axes.annotate(str(n), (cost, height), xytext=(0, 5 if n % 2 else -12), textcoords="offset points", fontsize=7,
                      ha="center", color=colour)  # fmt: skip
        names.text(0, 1 - n / (len(points) + 1), f"{n:2d}  {name}", fontsize=7, color=colour, family="monospace")
    axes.set(
        xscale="log", yscale="log", xlabel=f"cost of one INT8 inverse, ns ({profile})", ylabel="worst error / floor"
    )
    axes.axhline(2, color="grey", lw=1, ls="--")
    axes.grid(alpha=0.3)
    write_bytes(path, png(figure))


def _cheapest(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of the points that none beats in both."""
    best, found = math.inf, set()
    for name, (_, ratio) in sorted(points.items(), key=lambda item: item[1]):
        if ratio < best:
            best = ratio
            found.add(name)
    return found


def cost_points(rows: Iterable[Row], profile: Profile) -> dict[str, tuple[float, float]]:
    """(ns of one INT8 inverse, worst error / floor) by method, of rows of one chunk size."""
    points, scheme = {}, SiteScheme(IntFormat(8))
    by_name: dict[str, list[Row]] = {}
    for row in counted(rows):
        if row["format"] == "int8":
            by_name.setdefault(label(row), []).append(row)
    for name, own in by_name.items():
        made = plan(own[0]["method"], own[0]["chunk_size"], **own[0]["options"])
        points[name] = plan_cost(made, alike(made, scheme), profile).total, worst_ratio(own)
    return points


def draw(rows: Sequence[Row], folder: Path, profile: Profile) -> list[Path]:
    """The pictures of docs/inversion.md from rows of `stability`, for one of their chunk sizes: 64 if it is there."""
    sizes = {r["chunk_size"] for r in rows}
    size = 64 if 64 in sizes else min(sizes)
    own = [r for r in rows if r["chunk_size"] == size]
    paths = [folder / f"{name}.png" for name in ("powers", "methods", "cost")]
    plot_powers(paths[0], size)
    plot_methods(own, paths[1])
    points = cost_points(own, profile)
    if points:
        plot_cost(points, paths[2], profile.name)
    return paths if points else paths[:2]

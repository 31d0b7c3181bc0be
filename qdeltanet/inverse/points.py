"""Points worth measuring: methods with the options that the literature or this program singles out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .build import plan
from .methods.block_merge import JOINS, TILE, radices_of
from .plan import Plan
from .speedups import FITTED_AT, PUBLISHED


@dataclass(frozen=True)
class Point:
    """A method with options. default: what `plan("block_merge", C)` gives."""

    method: str
    plan: Plan
    default: bool


def published_neumann(chunk_size: int) -> dict[str, int]:
    """Order, band and residual steps that arXiv 2606.06034 uses at a chunk size; 16 and 128 (two blocks) as 64."""
    return PUBLISHED.get(chunk_size, PUBLISHED[FITTED_AT]).options


def points(chunk_size: int, methods: Collection[str]) -> list[Point]:
    """Each method at its defaults, then with other options; without those that give the same steps.

    Raises QDeltaNetError for a method or chunk size that is not there.
    """
    found: list[Point] = []
    for method in methods:
        for options in [{}, *_options(method, chunk_size)]:
            made = plan(method, chunk_size, **options)
            if all(p.plan != made for p in found):
                found.append(Point(method, made, method == "block_merge" and not options))
    return found


def _options(method: str, chunk_size: int) -> list[dict[str, Any]]:
    if method == "block_merge":
        firsts = ((2,), (4,), (TILE, chunk_size), (chunk_size,))
        return [{"radices": radices_of(chunk_size, *r), "join": j} for r in firsts for j in JOINS]
    if method == "neumann":
        published = published_neumann(chunk_size)
        found: list[dict[str, Any]] = [published, *({**published, "residual_steps": s} for s in (1, 4, 8, 9, 16))]
        found.append({**published, "residual_sum": "linear"})
        return found + ([{**published, "block": chunk_size}] if chunk_size > 64 else [])
    return [{"form": "matrix"}] if method == "column_sweep" else []

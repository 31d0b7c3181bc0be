"""Points worth measuring: methods with the options that the literature or this program singles out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..core import QDeltaNetError
from .build import plan
from .methods.block_merge import JOINS
from .plan import Plan


@dataclass(frozen=True)
class Point:
    """A method with options. default: what `plan("block_merge", C)` gives."""

    method: str
    plan: Plan
    default: bool


def published_neumann(chunk_size: int) -> dict[str, int]:
    """Order, band and residual steps that arXiv 2606.06034 uses at a chunk size; 16 and 128 (two blocks) as 64."""
    order, steps = (4, 3) if chunk_size == 32 else (3, 8)
    return {"order": order, "band": order, "residual_steps": steps}


def points(chunk_size: int, methods: Collection[str]) -> list[Point]:
    """Each method at its defaults, then with other options; without those that give the same steps.

    Raises QDeltaNetError for a method or chunk size that is not there.
    """
    found: list[Point] = []
    for method in methods:
        for options in [{}, *_options(method, chunk_size)]:
            made = _plan(method, chunk_size, options)
            if made is not None and all(p.plan != made for p in found):
                found.append(Point(method, made, method == "block_merge" and not options))
    return found


def _options(method: str, chunk_size: int) -> list[dict[str, Any]]:
    doublings = chunk_size.bit_length() - 1
    if method == "block_merge":
        fours = [4] * (doublings // 2) + [2] * (doublings % 2)
        leaf = [16, chunk_size // 16] if chunk_size > 16 else [chunk_size]
        radices = [[2] * doublings, fours, leaf]
        return [{"radices": r, "join": j} for r in [*radices, [chunk_size]] for j in JOINS]
    if method == "neumann":
        published = published_neumann(chunk_size)
        found: list[dict[str, Any]] = [published, *({**published, "residual_steps": s} for s in (1, 4, 8, 9, 16))]
        found.append({**published, "residual_sum": "linear"})
        return found + ([{**published, "block": chunk_size}] if chunk_size > 64 else [])
    return [{"form": "matrix"}] if method == "column_sweep" else []


def _plan(method: str, chunk_size: int, options: dict[str, Any]) -> Plan | None:
    """None where a method refuses options that do not fit a chunk size."""
    try:
        return plan(method, chunk_size, **options)
    except QDeltaNetError:
        if not options:
            raise
        return None

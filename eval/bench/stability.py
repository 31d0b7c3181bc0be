"""`qdeltanet bench stability`: every method on every family of matrices, in every format and chunk size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import read_tensors
from ...core import QDeltaNetError, unknown
from ...delta_rule.laboratory import exact_inverse
from ...delta_rule.measure import Measured, Specimens, Trial, check_format
from ...inverse import CHUNK_SIZES, METHODS, plan, register_ranges
from ...inverse.families import FAMILIES, UNIFORM, Family, Shape, family
from ...inverse.family_files import check_matrices, gate_families
from ...inverse.points import Point, points

Progress = Callable[[int, int], None]
Row = dict[str, Any]

FORMATS = ("fp64", "fp32", "bf16", "fp16", "int16", "int8", "int6", "int4")
METHOD_NAMES = tuple(name for name in METHODS if name != "identity")
HEADS, TOKENS = 4, 8192  # per family
LEAST_MATRICES = 16
SWEEP, THINNED = 0.75, 4  # a plan that is deeper than so much of the chunk goes row by row: a quarter of the matrices
SEED = 3
SLACK = 1e-6  # of limits: given matrices are float32


@dataclass(frozen=True)
class Request:
    """What to measure. gates, matrices: files whose families take the place of the built-in ones, unless these are
    named too. tokens: of a family, as many whatever the chunk size; half of them to calibrate on."""

    methods: Sequence[str] = METHOD_NAMES
    families: Sequence[str] = ()
    formats: Sequence[str] = FORMATS
    chunk_sizes: Sequence[int] = CHUNK_SIZES
    gates: Path | None = None
    matrices: Path | None = None
    tokens: int = TOKENS


# -- matrices ----------------------------------------------------------------------------------------------------------


def sources(request: Request) -> tuple[list[Family], dict[str, Tensor]]:
    """Families that make matrices of any chunk size, and matrices as files hold them. Raises QDeltaNetError."""
    made = [family(name) for name in request.families]
    if not made and request.gates is None and request.matrices is None:
        made = [*FAMILIES.values(), UNIFORM]
    if request.gates is not None:
        made += gate_families(read_tensors(request.gates), request.gates.name)
    given: dict[str, Tensor] = {}
    if request.matrices is not None:
        for key, x in read_tensors(request.matrices).items():
            given[f"{request.matrices.stem}:{key}"] = check_matrices(x, f"{request.matrices}: {key}")
        if not given:
            raise QDeltaNetError(f"{request.matrices}: holds no tensor")
    return made, given


def specimens(chunk_size: int, made: Sequence[Family], given: dict[str, Tensor], tokens: int) -> Iterator[Specimens]:
    """All matrices of a chunk size; those that one run can take together, together."""
    shape = Shape(HEADS, max(LEAST_MATRICES, tokens // chunk_size // HEADS), chunk_size)
    groups: dict[tuple[int, float | None], dict[str, Tensor]] = {}
    for f in made:
        groups.setdefault((shape.matrices, f.limit), {})[f.name] = f.matrices(shape, SEED)
    for name, A in given.items():
        if A.shape[-1] == chunk_size:
            groups.setdefault((A.shape[1], _limit(A)), {})[name] = A
    for (_, limit), families in groups.items():
        yield Specimens.of(families, limit)


def _limit(A: Tensor) -> float | None:
    """What given matrices, T and every bounded register of the plans that are measured stay within, 1 or 2; else None.

    A and T alone do not tell: merged blocks, of which the registers are made, can be larger than both where no delta
    rule made A.
    """
    tops = [float(A.abs().amax()), float(exact_inverse(A).abs().amax())]
    for point in points(A.shape[-1], METHOD_NAMES):
        if max(tops) <= 2 + SLACK and point.plan.bounded.intersection(point.plan.registers):
            reached = register_ranges(point.plan, A.double())
            tops += [top for name, top in reached.items() if name in point.plan.bounded]
    return next((limit for limit in (1.0, 2.0) if max(tops) <= limit + SLACK), None)


# -- the map -----------------------------------------------------------------------------------------------------------


def check_request(request: Request) -> None:
    """Raises QDeltaNetError for a name or chunk size that is not there, with the nearest ones."""
    for method in request.methods:
        if method not in METHOD_NAMES:
            raise unknown("method", method, METHOD_NAMES)
    for name in request.families:
        family(name)
    for name in request.formats:
        check_format(name)
    for size in request.chunk_sizes:
        plan(chunk_size=size)
        if size < 16:
            raise QDeltaNetError(f"chunk size {size}: the map begins at 16")


def stability(request: Request = Request(), progress: Progress | None = None) -> list[Row]:
    """Rows {method, options, default, family, format, chunk_size, scale, median, worst, worst_to_floor,
    max_intermediate, overflow, theory, matrices, saturated}; what is not finite is None. matrices: how many the row
    is the worst of (row methods get a quarter of them); saturated: codes clipped in the whole run, that is in all
    families of the same limit and number of matrices together. progress(done, total) counts runs of a plan.

    Raises QDeltaNetError for a wrong request, before anything is computed.
    """
    check_request(request)
    made, given = sources(request)
    sizes = list(request.chunk_sizes)
    if not made:
        sizes = sorted({A.shape[-1] for A in given.values()} & set(sizes))
        if not sizes:
            asked = ", ".join(map(str, request.chunk_sizes))
            raise QDeltaNetError(f"{request.matrices}: no matrices of chunk size {asked}")
    lines = {size: points(size, request.methods) for size in sizes}
    total, done = sum(map(len, lines.values())), 0
    rows: list[Row] = []
    for size in sizes:
        held = list(specimens(size, made, given, request.tokens))
        fewer = [some.thinned(THINNED) for some in held]
        for point in lines[size]:
            chosen = fewer if point.plan.depth > SWEEP * size else held
            rows += [row for some in chosen for row in _rows(point, some, request.formats)]
            done += 1
            if progress is not None:
                progress(done, total)
    return rows


def _rows(point: Point, some: Specimens, formats: Sequence[str]) -> Iterator[Row]:
    trial = Trial(point.plan, some)
    for name in formats:
        for group, m in trial.measure(name).items():
            heads = some.groups[group]
            matrices = some.A.shape[0] * (heads.stop - heads.start)
            yield {**_row(point, group, name, m), "matrices": matrices, "saturated": m.saturated}


def _row(point: Point, group: str, name: str, m: Measured) -> Row:
    return {
        "method": point.method,
        "options": dict(point.plan.options),
        "default": point.default,
        "family": group,
        "format": name,
        "chunk_size": point.plan.chunk_size,
        "scale": m.scale,
        "median": finite(m.median),
        "worst": finite(m.worst),
        "worst_to_floor": finite(m.worst_to_floor),
        "max_intermediate": finite(m.max_intermediate),
        "overflow": m.overflow,
        "theory": m.theory,
    }


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None

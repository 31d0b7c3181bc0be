"""`qdeltanet bench variants`: ways to join blocks and to hold registers, side by side: what helps, what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...core import BindingError, Granularity, IntFormat, SiteScheme
from ...delta_rule.laboratory import InverseScheme
from ...delta_rule.measure import Measured, Specimens, Trial
from ...inverse import INPUT, OUTPUT, Plan, plan
from ...inverse.families import FAMILIES
from ...inverse.methods.block_merge import TILE, radices_of
from .stability import TOKENS, Progress, Row, specimens

INT16 = IntFormat(16)
Hold = Callable[[IntFormat, Plan], InverseScheme]


@dataclass(frozen=True)
class Variant:
    """options: of block_merge, by chunk size; None for its defaults. hold: how A, T and registers are held."""

    name: str
    options: Callable[[int], dict[str, Any]]
    hold: Hold


def _default(size: int) -> dict[str, Any]:
    return {}


def _radices(join: str, first: int = 0) -> Callable[[int], dict[str, Any]]:
    """One radix throughout, or (0) the whole chunk at once."""
    return lambda size: {"radices": radices_of(size, first or size), "join": join}


def _tiles(join: str) -> Callable[[int], dict[str, Any]]:
    """Tiles of 16, then all of these at once."""
    return lambda size: {"radices": radices_of(size, TILE, size), "join": join}


JOINS = (
    Variant("eager: tiles of 16, then the rest (default)", _default, InverseScheme.of),
    Variant("eager: the chunk at once", _radices("eager"), InverseScheme.of),
    Variant("eager: radix 4", _radices("eager", 4), InverseScheme.of),
    Variant("radix 2 in pairs (MBH)", _radices("powers", 2), InverseScheme.of),
    Variant("powers: radix 4", _radices("powers", 4), InverseScheme.of),
    Variant("powers: tiles of 16, then the rest", _tiles("powers"), InverseScheme.of),
    Variant("powers: the chunk at once (MCH)", _radices("powers"), InverseScheme.of),
)


def _static(shared: bool, headroom: float) -> Hold:
    return lambda fmt, p: InverseScheme(SiteScheme(fmt), shared=shared, headroom=headroom)


def _dynamic(fmt: IntFormat, p: Plan) -> InverseScheme:
    return InverseScheme(SiteScheme(fmt, "dynamic"))


def _carried(granularity: Granularity, source: str) -> Hold:
    """Registers held in INT16, with a scale per use; A and T as they are."""

    def hold(fmt: IntFormat, p: Plan) -> InverseScheme:
        scheme = SiteScheme(fmt, source, granularity, INT16)  # type: ignore[arg-type]
        rows = Granularity.PER_TOKEN if granularity is Granularity.FINEST else granularity
        return InverseScheme(scheme, {OUTPUT: SiteScheme(fmt, source, rows)}, headroom=1.0)  # type: ignore[arg-type]

    return hold


def _wider(*sites: str) -> Hold:
    """Some sites in INT16, the rest as by default; with no names, the registers."""

    def hold(fmt: IntFormat, p: Plan) -> InverseScheme:
        base = InverseScheme.of(fmt, p)
        names = sites or tuple(f"inverse.{r}" for r in p.registers)
        return InverseScheme(base.default, {n: SiteScheme(INT16) for n in names}, base.shared, base.headroom)

    return hold


HOLDS = (
    Variant("one range per head, as by default", _default, InverseScheme.of),
    Variant("one range, no headroom", _default, _static(True, 1.0)),
    Variant("one range, headroom 1.25", _default, _static(True, 1.25)),
    Variant("one range, headroom 1.5", _default, _static(True, 1.5)),
    Variant("a range per register", _default, _static(False, 1.0)),
    Variant("a range per register, headroom 1.25", _default, _static(False, 1.25)),
    Variant("proven range (max beta)", _default, lambda fmt, p: InverseScheme(SiteScheme(fmt, "bound"))),
    Variant("dynamic, per matrix", _default, _dynamic),
    Variant("registers carried in INT16", _default, _carried(Granularity.PER_HEAD, "calibrated")),
    Variant("carried, a range per row or column", _default, _carried(Granularity.FINEST, "calibrated")),
    Variant("carried, dynamic per row or column", _default, _carried(Granularity.FINEST, "dynamic")),
    Variant("registers in INT16", _default, _wider()),
    Variant("T in INT16", _default, _wider(OUTPUT)),
    Variant("A in INT16", _default, _wider(INPUT)),
)
VARIANTS = (*JOINS, *HOLDS)
FORMATS = ("int16", "int8", "int4")


def variants(chunk_size: int = 64, formats: Sequence[str] = FORMATS, progress: Progress | None = None) -> list[Row]:
    """Rows {variant, part, depth, matmuls, format, chunk_size, worst_to_floor, median}, over all families.

    worst_to_floor: of the worst matrix of any family; median: geometric mean over families of the median relative error
    (families whose floor is exact left out). None where a scheme does not bind, or is not finite.
    """
    [some] = specimens(chunk_size, list(FAMILIES.values()), {}, TOKENS)
    rows = []
    for done, variant in enumerate(VARIANTS, 1):
        made = plan("block_merge", chunk_size, **variant.options(chunk_size))
        rows += list(_rows(variant, made, some, formats))
        if progress is not None:
            progress(done, len(VARIANTS))
    return rows


def _rows(variant: Variant, made: Plan, some: Specimens, formats: Sequence[str]) -> Iterator[Row]:
    for name in formats:
        found = _measured(variant, made, some, name)
        yield {
            "variant": variant.name,
            "part": "joins" if variant in JOINS else "holds",
            "depth": made.depth,
            "matmuls": made.matmuls,
            "format": name,
            "chunk_size": made.chunk_size,
            "worst_to_floor": _worst(found),
            "median": _middle(found),
        }


def _measured(variant: Variant, made: Plan, some: Specimens, name: str) -> list[Measured]:
    fmt = IntFormat.parse(name)
    try:
        return list(Trial(made, some, variant.hold(fmt, made)).measure(name).values())
    except BindingError:
        return []


def _worst(found: Sequence[Measured]) -> float | None:
    top = max((m.worst_to_floor for m in found), default=math.inf)
    return top if math.isfinite(top) else None


def _middle(found: Sequence[Measured]) -> float | None:
    logs = [math.log(m.median) for m in found if 0 < m.median < math.inf]
    return math.exp(sum(logs) / len(logs)) if logs else None

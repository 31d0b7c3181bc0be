"""The benchmarks of the inversion laboratory: stability, variants, cost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ._console import Json, Quiet, bar, out, table

Profile = Annotated[str, typer.Option(help="Hardware profile: a name of `qdeltanet ls`, or a YAML file.")]
Family = Annotated[list[str] | None, typer.Option("--family", help="Only this one, e.g. correlated. Repeatable.")]
Method = Annotated[list[str] | None, typer.Option("--method", help="Only this one (see `qdeltanet ls`). Repeatable.")]
Format = Annotated[
    list[str] | None, typer.Option("--format", help="Only this one: fp64, fp32, bf16, fp16, int2 to int16. Repeatable.")
]
ChunkSizes = Annotated[list[int] | None, typer.Option("--chunk-size", help="Only this one. Repeatable.")]
Gates = Annotated[
    Path | None, typer.Option(help="Safetensors file of <name>.beta and <name>.g [tokens, heads]: families of these.")
]
Matrices = Annotated[
    Path | None, typer.Option(help="Safetensors file of matrices A, e.g. of `qdeltanet inspect --matrices`.")
]


def bench_stability(
    method: Method = None,
    family: Family = None,
    number: Format = None,
    chunk_size: ChunkSizes = None,
    gates: Gates = None,
    matrices: Matrices = None,
    png: Annotated[
        Path | None, typer.Option(help="Also draw the pictures of docs/inversion.md into this folder.")
    ] = None,
    profile: Profile = "ascend-910b",
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Error of T by method, family of matrices, format and chunk size, beside the least error possible.

    Figures are the worst error of a method over families and chunk sizes (inf: it overflows), as a multiple of the
    floor: the error of the exact inverse of A as the format holds it. With --gates or --matrices, built-in families
    only where --family names them.
    """
    from .core.files import write_text
    from .eval.bench.stability import FORMATS, METHOD_NAMES, Request, stability
    from .inverse import CHUNK_SIZES
    from .profile import load_profile
    from .workflow import versions

    machine = load_profile(profile)

    request = Request(
        tuple(dict.fromkeys(method or METHOD_NAMES)),
        tuple(dict.fromkeys(family or ())),
        tuple(dict.fromkeys(number or FORMATS)),
        tuple(dict.fromkeys(chunk_size or CHUNK_SIZES)),
        gates,
        matrices,
    )
    start = time.perf_counter()
    with bar("stability", quiet) as progress:
        rows = stability(request, progress)
    seconds = round(time.perf_counter() - start, 1)
    out.print(_ratio_table(rows, request.formats))
    _say_rest(rows, seconds)
    if png is not None:
        from .eval.bench.plots import draw

        made = draw(rows, png, machine)
        out.print(f"pictures: {', '.join(str(p) for p in made)}", highlight=False)
    if json_file is not None:
        content = {"date": time.strftime("%Y-%m-%d"), "seconds": seconds, "versions": versions(), "rows": rows}
        write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _ratio_table(rows: list[dict[str, Any]], formats: Sequence[str]) -> Table:
    from .eval.bench.stability_table import figure, ratios

    sizes = ", ".join(str(c) for c in sorted({r["chunk_size"] for r in rows}))
    made = table(f"worst error / floor, chunks of {sizes}", ("method",), tuple(formats))
    for (name, default), by in ratios(rows).items():
        made.add_row(f"{name} (default)" if default else name, *(figure(by[f]) for f in formats))
    return made


def _say_rest(rows: list[dict[str, Any]], seconds: float) -> None:
    from .eval.bench.stability_table import counted, default_ratios, figure, matrix_counts

    families = list(dict.fromkeys(r["family"] for r in counted(rows)))
    out.print(f"{len(families)} families: {', '.join(families)}; {len(rows)} rows in {seconds:.0f} s", highlight=False)
    out.print(f"matrices measured of a family: {matrix_counts(rows)}", highlight=False)
    worst = default_ratios(rows)
    if worst:
        figures = ", ".join(f"{name} {figure(x)}" for name, x in worst.items())
        out.print(f"default method, worst error / floor: {figures}", highlight=False)


def bench_variants(
    chunk_size: Annotated[int, typer.Option(help="C, a power of two.")] = 64,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Ways to join blocks and ways to hold registers, all else as by default: worst error over the floor, and median.

    Over the same families as `bench stability`. Below 1: registers hold more than A's codes do. `-`: the scheme does
    not bind, or the error is not finite.
    """
    from .core.files import write_text
    from .eval.bench.variants import FORMATS, variants

    with bar("variants", quiet) as progress:
        rows = variants(chunk_size, progress=progress)
    for key, title in (("worst_to_floor", "worst error / floor"), ("median", "median relative error of T")):
        out.print(_variant_table(f"{title}, chunks of {chunk_size}", rows, key, FORMATS))
    if json_file is not None:
        write_text(json_file, json.dumps({"chunk_size": chunk_size, "rows": rows}, indent=1, allow_nan=False) + "\n")


def _variant_table(title: str, rows: Sequence[Any], key: str, formats: Sequence[str]) -> Table:
    made = table(title, ("variant",), ("deep", *formats))
    for start in range(0, len(rows), len(formats)):
        own = rows[start : start + len(formats)]
        section = own[0]["part"] != rows[min(start + len(formats), len(rows) - 1)]["part"]
        made.add_row(own[0]["variant"], str(own[0]["depth"]), *(_short(r[key]) for r in own), end_section=section)
    return made


def _short(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def bench_cost(
    chunk_size: Annotated[int, typer.Option(help="C, a power of two.")] = 64,
    bits: Annotated[int | None, typer.Option(help="Of the integer runner that is timed.")] = 8,
    profile: Profile = "cpu",
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """The order in which a profile puts the methods beside the order in which this CPU runs them.

    Each method is verified before it is timed. Times are relative to the default method's.
    """
    from .core.files import write_text
    from .eval.bench.cost import compare_order
    from .profile import load_profile

    machine = load_profile(profile)
    with bar("cost", quiet) as progress:
        order = compare_order(machine, chunk_size, bits, progress=progress)
    made = table(
        f"time / default's, chunks of {chunk_size}, {order.rows[0].format}", ("method",), ("model", "measured")
    )
    for row in order.rows:
        made.add_row(row.method, f"{row.predicted:.2f}", f"{row.measured:.2f}")
    out.print(made)
    wrong = "; ".join(f"{a} before {b}" for a, b in order.inverted) or "none"
    out.print(f"rank correlation {order.rank_correlation:.3f}; pairs in the wrong order: {wrong}", highlight=False)
    if json_file is not None:
        content = {"rank_correlation": order.rank_correlation, "inverted": order.inverted}
        rows = [row.as_dict() for row in order.rows]
        write_text(json_file, json.dumps({**content, "rows": rows}, indent=1) + "\n")
    if not all(row.verified for row in order.rows):
        raise typer.Exit(1)

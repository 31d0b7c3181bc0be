"""The benchmark of checkpoint formats: does a model come back as it was."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Json, Quiet, out, say, table

ROLES = ("proj.qkv", "proj.z", "proj.out")
STATIC = "".join(f"+projections.{role}.scale=calibrated" for role in ROLES)
FLOAT_RULE = "+sites.*.format=float+inverse.format=float"
# (format, executed by, what its projections are, recipe)
ROWS = (
    ("qdeltanet", "qdeltanet", "W8A8 dynamic", "w8a8"),
    ("qdeltanet", "qdeltanet", "W4A16", "w4a16"),
    ("compressed-tensors", "qdeltanet", "W8A8 dynamic", "w8a8"),
    ("compressed-tensors", "qdeltanet", "W8A8 static", "w8a8" + STATIC),
    ("compressed-tensors", "qdeltanet", "W4A8 dynamic", "w4a8"),
    ("compressed-tensors", "qdeltanet", "W4A16", "w4a16"),
    ("modelslim", "qdeltanet", "W8A8 dynamic", "w8a8"),
    ("modelslim", "qdeltanet", "W8A8 static", "w8a8" + STATIC),
    ("onnx", "ONNX Runtime", "float", "int8"),
    ("onnx", "ONNX Runtime", "float", "int16"),
    ("onnx", "ONNX Runtime", "float", "int4-static"),
    ("compressed-tensors", "transformers", "W8A8 dynamic", "w8a8" + FLOAT_RULE),
    ("compressed-tensors", "transformers", "W8A8 static", "w8a8" + STATIC + FLOAT_RULE),
    ("compressed-tensors", "transformers", "W4A8 dynamic", "w4a8" + FLOAT_RULE),
    ("compressed-tensors", "transformers", "W4A16", "w4a16" + FLOAT_RULE),
)


def bench_formats(
    model: Annotated[str, typer.Argument(help="Embedded model, directory or hub id.")] = "tiny-hybrid",
    fmt: Annotated[str | None, typer.Option("--format", help="Only the rows of this format.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="What it is calibrated and compared on (default: its own).")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")] = 32,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences to compare on.")] = 4,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Export, load and evaluate again in every format that can be executed here; what differs from before.

    By qdeltanet the delta rule runs in integers. Stock transformers has no place for it: there it is float before and
    after. Nothing may differ but its float sums, and its dynamic scales (amax / 127.5, ours amax / 127). In ONNX
    Runtime codes are multiplied as floats: where a sum lies next to half a step, another order rounds it the other way.
    """
    from .core import unknown
    from .core.files import write_text
    from .workflow import versions

    start = time.perf_counter()
    wanted = [row for row in ROWS if fmt in (None, row[0])]
    if not wanted:
        raise unknown("format", str(fmt), dict.fromkeys(row[0] for row in ROWS))
    rows = [_row(each, model, dataset, samples, sequences, say(quiet)) for each in wanted]
    made = table(
        f"round trips of {model}: perplexity before and after, largest difference of a logit",
        ("format", "executed by", "projections"),
        _COLUMNS,
    )
    for r in rows:
        equal = "every bit" if r["equal"] else f"{r['difference']:.1e}"
        figures = (f"{r['perplexity_before']:.4f}", f"{r['perplexity_after']:.4f}", equal)
        made.add_row(r["format"], r["by"], r["projections"], *figures)
    out.print(made)
    if json_file is not None:
        conditions = {"date": time.strftime("%Y-%m-%d"), "seconds": round(time.perf_counter() - start, 1)}
        content = {"model": model, "samples": samples, "sequences": sequences, **conditions}
        write_text(json_file, json.dumps({**content, "versions": versions(), "rows": rows}, indent=1) + "\n")


_COLUMNS = ("before", "after", "logits")


def _row(
    wanted: tuple[str, str, str, str], model: str, dataset: str | None, samples: int, sequences: int, say: Any
) -> dict[str, Any]:
    """One round trip: a fresh model, its recipe calibrated, through a folder that is gone afterwards."""
    import tempfile

    from .eval.bench.formats import round_trip
    from .eval.embedded import model_path
    from .models import load_model
    from .workflow import recipe_of, run_calibration, samples_for

    fmt, by, projections, text = wanted
    say(f"{fmt}, {projections}, by {by}")
    tokens = samples_for(model, dataset, samples + sequences, None).tokens[-sequences:]
    calibration = run_calibration(model, recipe_of(text), dataset=dataset, samples=samples)
    loaded = load_model(model_path(model))
    calibration.apply(loaded)
    with tempfile.TemporaryDirectory() as folder:
        row = round_trip(loaded, calibration.recipe, fmt, by, Path(folder) / "checkpoint", tokens)
    return {"projections": projections, "recipe": text, **row}

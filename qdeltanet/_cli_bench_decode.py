"""The benchmark of what decode costs in a model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import Json, Quiet, bar, out, say, table

if TYPE_CHECKING:
    from .eval.bench.decode import Windows
    from .eval.evaluate import Row

TITLES = {"bits": "bits per token", "recall": "recall", "nll": "NLL"}


def bench_decode(
    model: Annotated[
        list[str] | None,
        typer.Argument(help="Embedded model, directory or hub id (default: tiny-hybrid tiny-recall)."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="One per row; NAME+key=value overrides (default: ways to hold the state)."),
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Calibration directory, one per static recipe (default: made here).")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="What is decoded: as `calibrate --dataset` (default: fresh recall samples, held-out bytes)."),
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="Sequences.")] = 64,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each (default: 256; tiny-recall: 128).")] = None,
    prefill: Annotated[
        int | None, typer.Option(min=0, help="Tokens to run in pieces of 32 first (default: 0; tiny-recall: 64).")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on, where that is done here.")] = 64,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """What integers cost above float where every token is decoded with a cache, and at once over the same windows.

    Differences are paired, window by window, to float at once; ± is one standard error over windows. clipped: codes of
    all sites that saturated in decode.
    """
    from .checkpoint import load_calibration
    from .core.files import write_text
    from .eval.bench.decode import RECIPES, decode_costs
    from .eval.bench.timing import machine
    from .workflow import recipe_of, row_name, versions

    loaded = [load_calibration(path) for path in calibration or ()]
    texts = recipe or ([] if loaded else RECIPES)
    named = [(row_name(t), recipe_of(t)) for t in texts] or [(c.recipe.name, c.recipe) for c in loaded]
    measured = []
    for name in model or ("tiny-hybrid", "tiny-recall"):
        start, decoded = time.perf_counter(), _windows(name, dataset, windows, tokens, prefill)
        rows = _rows(name, named, loaded, samples, say(quiet))
        with bar(f"decode {name}", quiet) as progress:
            found = decode_costs(decoded, [(r.name, partial(_model, name, r)) for r in rows], progress)
        for metric in decoded.metrics:
            out.print(_table(f"{name}: {TITLES[metric]} above float, {_size(decoded)}", metric, found))
        content = {"model": name, "tokens": decoded.tokens.shape[1], "prefill": decoded.prefill, "rows": found}
        measured.append({**content, "seconds": round(time.perf_counter() - start, 1)})
    if json_file is not None:
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine("cpu"), "versions": versions()}
        content |= {"windows": windows, "samples": samples, "dataset": dataset, "models": measured}
        write_text(json_file, json.dumps(content, indent=1) + "\n")


def _windows(name: str, dataset: str | None, windows: int, tokens: int | None, prefill: int | None) -> Windows:
    """Of tiny-recall its own task, of which the answers count; else text, of which every token does."""
    from .eval.bench.decode import Windows, recall_tokens
    from .eval.embedded import HELD_OUT_BYTES, model_path
    from .models import load_tokenizer
    from .workflow import RECALL_ANSWERS, samples_for

    if name == "tiny-recall" and dataset is None:
        drawn = recall_tokens(load_tokenizer(model_path(name)), windows, tokens or 128)
        return Windows(drawn, RECALL_ANSWERS, ("recall", "nll"), 64 if prefill is None else prefill)
    text = samples_for(name, dataset or HELD_OUT_BYTES, windows, tokens or 256).tokens
    return Windows(text, slice(1, None), ("bits",), prefill or 0)


def _rows(name: str, named: Sequence[Any], loaded: Sequence[Any], samples: int, tell: Any) -> list[Row]:
    """float and a row per recipe. A recipe with sites in float runs as fake quantization: the same numbers."""
    from .workflow import evaluation_rows

    rows = evaluation_rows(name, named, loaded, execution="integer", backend="auto", say=tell, samples=samples)
    return [replace(r, execution="fake") if r.recipe is not None and _has_float(r.recipe) else r for r in rows]


def _has_float(recipe: Any) -> bool:
    rules = [one.rule for one in recipe.schemes if one.rule is not None]
    return any(site.format is None for rule in rules for site in rule.sites.values())


def _model(name: str, row: Row) -> Any:
    from .eval.prepare import prepare_model

    return prepare_model(name, row.recipe, row.calibration, row.execution, row.backend)


def _size(windows: Windows) -> str:
    n, length = windows.tokens.shape
    return f"{n} windows of {length}" + (f", prefill {windows.prefill}" if windows.prefill else "")


def _table(title: str, metric: str, rows: Sequence[dict[str, Any]]) -> Any:
    """Values of float, differences of the others."""
    made = table(title, ("recipe",), ("at once", "decode", "clipped"))
    for i, row in enumerate(rows):
        at_once, decode = (row[way][metric] for way in ("at_once", "decode"))
        figures = [f"{x['difference']:+.4f} ±{x['difference_stderr']:.4f}" for x in (at_once, decode)]
        if i == 0:
            figures = [f"{x['value']:.4f} ±{x['stderr']:.4f}" for x in (at_once, decode)]
        made.add_row(row["recipe"], *figures, f"{row['decode']['clipped']:,}")
    return made

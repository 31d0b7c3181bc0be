"""The benchmark of long contexts: drift of state and output against float."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Json, Quiet, bar, out, say, table, writable

Png = Annotated[Path | None, typer.Option("--png", callback=writable, help="Also draw the errors into this file.")]


def bench_drift(
    model: Annotated[str, typer.Argument(help="Embedded model, directory or hub id.")] = "tiny-hybrid",
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only this row, e.g. 'int8 feedback'. Repeatable.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="chunks or decode (default: both).")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="What is followed: as `calibrate --dataset` (default: held-out bytes).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="Length, a multiple of 512.")] = 65536,
    slower: Annotated[float, typer.Option(min=1, help="Divide every log decay by this: longer memories.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")] = 64,
    quiet: Quiet = False,
    json_file: Json = None,
    png: Png = None,
) -> None:
    """Relative error of state and output over one long sequence, by how the state is held; all else as recipe int8.

    The inputs of the rule are those of the model's own layers on windows of 512 tokens, joined end to end. Errors are
    medians over all heads, and the worst head's. Growth compares the last eighth of the sequence with what came before:
    about 1 means that the error has reached its plateau.
    """
    from .core import QDeltaNetError
    from .core.files import write_text
    from .eval.bench.drift import MODES, STATES, drift
    from .workflow import versions

    if tokens % WINDOW:
        raise QDeltaNetError(f"--tokens {tokens}: must be a multiple of {WINDOW}")
    modes = MODES if mode is None else (_known("mode", mode, MODES),)
    names = [_known("state", name, STATES) for name in state or STATES]
    start = time.perf_counter()
    windows = _tokens(model, dataset, tokens)
    models = {name: _calibrated(model, name, samples, slower, say(quiet)) for name in names}
    with bar(f"drift {model}", quiet) as progress:
        rows = drift(models, windows, modes, progress)
    for each in modes:
        out.print(_table(f"{each}: relative error over {tokens:,} tokens", [r for r in rows if r["mode"] == each]))
    if png is not None:
        from .eval.bench.drift_plot import plot_drift

        plot_drift(rows, png)
    if json_file is not None:
        conditions = {"date": time.strftime("%Y-%m-%d"), "seconds": round(time.perf_counter() - start, 1)}
        content = {"model": model, "tokens": tokens, "slower": slower, "samples": samples, **conditions}
        write_text(json_file, json.dumps({**content, "versions": versions(), "rows": rows}, indent=1) + "\n")


WINDOW = 512


def _known(kind: str, name: str, names: Sequence[str] | dict[str, Any]) -> str:
    from .core.errors import unknown

    if name not in names:
        raise unknown(kind, name, names)
    return name


def _tokens(model: str, dataset: str | None, tokens: int) -> Any:
    """Windows [N, 512] of one long run of text."""
    from .eval.embedded import HELD_OUT_BYTES
    from .workflow import samples_for

    return samples_for(model, dataset or HELD_OUT_BYTES, 1, tokens).tokens.view(-1, WINDOW)


def _calibrated(name: str, state: str, samples: int, slower: float, tell: Any) -> Any:
    """A model with scales for one way to hold the state, in float execution."""
    from .calib import calibrate
    from .eval.bench.drift import STATES, slow_down
    from .eval.embedded import model_path
    from .models import load_model, quantize_model
    from .recipe import load_recipe
    from .workflow import samples_for

    tell(f"calibrating {name}, state: {state}")
    recipe = load_recipe("int8", [f"sites.state.{setting}" for setting in STATES[state]])
    model = load_model(model_path(name))
    quantize_model(model, recipe)
    slow_down(model, slower)
    calibrate(model, recipe, samples_for(name, None, samples, None))
    return model


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Any:
    from .eval.bench.drift import growth

    columns = ("output", "worst", "growth", "state", "worst", "growth", "clipped")
    made = table(title, ("state held as",), columns)
    for name in dict.fromkeys(r["state"] for r in rows):
        own = [r for r in rows if r["state"] == name]
        figures = []
        for key in ("output", "state"):
            figures += [f"{own[-1][f'{key}_median']:.4f}", f"{own[-1][f'{key}_worst']:.4f}"]
            figures += [f"{growth(own, f'{key}_median'):.2f}"]
        made.add_row(name, *figures, f"{own[-1]['state_clipped']:,}")
    return made

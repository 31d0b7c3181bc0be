"""The benchmark of calibrations that are larger than memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Dtype, Json, Quiet, out, say, table


def bench_layerwise(
    model: Annotated[
        str | None, typer.Argument(help="Embedded model, directory or hub id (default: random weights, 1.5B).")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Shipped name or YAML file.")] = "int8",
    samples: Annotated[int, typer.Option(min=1, help="Sequences of the embedded set bytes.")] = 4,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 1,
    dtype: Dtype = "bfloat16",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    limit: Annotated[float, typer.Option(help="GB (1e9 bytes) of anonymous memory that are allowed.")] = 1.5,
    folder: Annotated[
        Path | None, typer.Option(help="For the random model (3 GB) and scratch (default: temporary folder).")
    ] = None,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Peak memory of `calibrate --layerwise` in a fresh process; exit code 1 above the limit.

    Anonymous memory is the largest RssAnon in /proc/PID/status, at which it
    looks every 20 ms. Mapped pages are those of checkpoint and hidden states:
    the kernel drops them where memory is short. Of both together (resident)
    it keeps the peak itself.
    """
    from .core.files import write_text
    from .eval.bench.layerwise import MIB, Settings, layerwise_bench
    from .eval.bench.timing import machine
    from .workflow import recipe_of, versions

    settings = Settings(recipe, samples, seq_len, batch_size, dtype, threads)
    found = layerwise_bench(model, recipe_of(recipe), settings, folder, say(quiet))
    out.print(_table(model or "qwen3.5-1.5b, random", found))
    within = found["anonymous_mib"] * MIB <= limit * 1e9
    out.print(f"{found['how']}; {machine('cpu')}, {threads} threads", highlight=False, soft_wrap=True)
    out.print(f"{'within' if within else 'ABOVE'} {limit:g} GB of anonymous memory", highlight=False)
    if json_file is not None:
        conditions = {"date": time.strftime("%Y-%m-%d"), "machine": machine("cpu"), "versions": versions()}
        content = {"model": model, "limit_gb": limit, "within": within, **vars(settings), **conditions, **found}
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    if not (within and found["verified"]):
        raise typer.Exit(1)


def _table(name: str, found: dict[str, Any]) -> Any:
    made = table(f"calibrate --layerwise: {name}", ("peak of",), ("MiB",))
    for label, key in (
        ("anonymous memory", "anonymous_mib"),
        ("mapped file pages", "mapped_mib"),
        ("both (kernel)", "resident_mib"),
        ("scratch files", "scratch_mib"),
        ("the checkpoint's size", "model_mib"),
    ):
        made.add_row(label, "-" if found[key] is None else f"{found[key]:,.0f}")
    took = found["layer_seconds"]
    if took:
        made.caption = f"{found['seconds']:.0f} s; {len(took)} layers, {min(took):.1f} to {max(took):.1f} s each"
    return made

"""`qdeltanet inspect` and `qdeltanet sensitivity`: what a model's layers invert, and which of their sites matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Device, Dtype, Json, Model, Quiet, Set, bar, out, table, writable

MOST_ROWS = 64  # more heads than this are shown by their worst per layer


def inspect_command(
    model: Model,
    dataset: Annotated[str | None, typer.Option(help="Hub id[:config[:split]], local file, or recall / bytes.")] = None,
    samples: Annotated[int, typer.Option(help="Sequences to run.")] = 32,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence (default: as calibrate).")] = None,
    layer: Annotated[int | None, typer.Option(help="Only this decoder layer.")] = None,
    keep: Annotated[int, typer.Option(help="Matrices kept per head, a random choice with a fixed seed.")] = 64,
    chunk_size: Annotated[int, typer.Option(help="C, a power of two.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    matrices: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write the matrices here (safetensors), for `qdeltanet bench stability`."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Capture the matrices A of a model's layers: their powers, their inverse, and what each method would lose."""
    from .backends import check_device
    from .calib.inspect import capture, inspect
    from .checkpoint import write_tensors
    from .core.files import write_text
    from .eval.embedded import model_path
    from .models import load_model
    from .workflow import samples_for

    check_device(device)
    data = samples_for(model, dataset, samples, seq_len, text_column)
    loaded = load_model(model_path(model), dtype, device)
    with bar(f"running {model}", quiet) as progress:
        captures = capture(
            loaded, data, layer=layer, keep=keep, batch_size=batch_size, chunk_size=chunk_size, progress=progress
        )
    with bar("inspecting layers", quiet) as progress:
        layers = inspect(captures, progress)
    _print_layers(layers, chunk_size)
    if matrices is not None:
        write_tensors(matrices, {f"layers.{i}": c.A.float() for i, c in captures.items()})
        out.print(f"matrices of {len(captures)} layers written to {matrices}", highlight=False)
    if json_file is not None:
        head = {"model": model, "dataset": data.name, "samples": len(data.tokens), "seq_len": data.tokens.shape[1]}
        content = {**head, "chunk_size": chunk_size, "layers": layers}
        write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _print_layers(layers: dict[str, Any], chunk_size: int) -> None:
    rows = [(f"{index}.{h}", head) for index, one in layers.items() for h, head in enumerate(one["heads"])]
    if len(rows) > MOST_ROWS:
        worst = {index: max(one["heads"], key=lambda h: h["condition"]) for index, one in layers.items()}
        rows = [(f"{index}, worst", head) for index, head in worst.items()]
    powers, bins = list(rows[0][1]["powers"]), list(rows[0][1]["energy"])
    loss = [(method, fmt) for method, by in rows[0][1]["loss"].items() for fmt in by]
    first = table("largest entry of A^n, and condition of T", ("layer.head",), (*powers, "cond"))
    second = table("energy of T - I by distance from the diagonal", ("layer.head",), tuple(bins))
    third = table("worst relative error of T", ("layer.head",), tuple(f"{m}\n{f}" for m, f in loss))
    for name, head in rows:
        first.add_row(name, *(f"{head['powers'][n]:.0e}" for n in powers), f"{head['condition']:.1f}")
        second.add_row(name, *(f"{head['energy'][b]:.1%}" for b in bins))
        third.add_row(name, *(_error(head["loss"][m][f]) for m, f in loss))
    for made in (first, second, third):
        out.print(made)
    counts = {(one["matrices"], one["seen"]) for one in layers.values()}
    kept = "; ".join(f"{kept} of {seen}" for kept, seen in sorted(counts))
    out.print(f"chunks of {chunk_size}; matrices per head: {kept}", highlight=False)


def _error(x: float | None) -> str:
    return "overflow" if x is None else f"{x:.2g}"


def sensitivity_command(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped name (see `qdeltanet ls`) or YAML file.")
    ] = "int4",
    dataset: Annotated[str | None, typer.Option(help="Hub id[:config[:split]], local file, or recall / bytes.")] = None,
    samples: Annotated[int, typer.Option(help="Sequences to calibrate on and to run.")] = 32,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence (default: as calibrate).")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    overrides: Set = None,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """What each site costs when it alone is quantized as a recipe has it: increase of the loss, SQNR of the logits."""
    from .backends import check_device
    from .core.files import write_text
    from .workflow import recipe_of, run_sensitivity

    chosen = recipe_of(recipe, overrides or ())
    check_device(device)
    with bar(f"{model}, {recipe}", quiet) as progress:
        rows = run_sensitivity(
            model, chosen, dataset=dataset, samples=samples, seq_len=seq_len, text_column=text_column,
            dtype=dtype, device=device, progress=progress,
        )  # fmt: skip
    made = table(
        f"{model}, {recipe}: one site alone; * is all of them", ("site",), ("nats / token", "ppl ratio", "SQNR dB")
    )
    for r in rows:
        sqnr = "exact" if r.sqnr_db == float("inf") else f"{r.sqnr_db:.1f}"
        made.add_row(r.site, f"{r.nll - r.float_nll:+.5f}", f"{r.ratio:.4f}", sqnr)
    out.print(made)
    if json_file is not None:
        content = {"model": model, "recipe": chosen.name, "samples": samples, "rows": [r.as_dict() for r in rows]}
        write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")

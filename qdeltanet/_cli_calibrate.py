"""The command that calibrates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._console import Device, Dtype, Json, Model, Output, Overwrite, Quiet, Set, bar, err, out, say, table

if TYPE_CHECKING:
    from ._processes import Processes
    from .checkpoint import Calibration
    from .recipe import Recipe


def calibrate_command(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Shipped name (see `qdeltanet ls`) or YAML file.")],
    output: Output,
    dataset: Annotated[str | None, typer.Option(help="Hub id[:config[:split]], local file, or recall / bytes.")] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences to observe (default: 128, or what there is).")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per sequence (default: 512; 128 for tiny-recall).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Shuffle the dataset (default: its own order).")] = None,
    dtype: Dtype = "float32",
    backend: Annotated[
        str | None, typer.Option(help="Then execute the first batch on this backend and report it, e.g. auto.")
    ] = None,
    device: Device = "cpu",
    device_map: Annotated[
        str | None, typer.Option(help="auto: accelerate spreads the weights over devices, memory and disk.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each process, on which float sums depend (default: all cores)."),
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between saves of what an interrupted run goes on from.")
    ] = 30.0,
    layerwise: Annotated[
        bool,
        typer.Option("--layerwise", help="One decoder layer in memory at a time, hidden states on the output's disk."),
    ] = False,
    overrides: Set = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Observe every tensor inside the delta rule and write a scale for each.

    Interrupted, the same command goes on: until the output NAME is written,
    its state stands beside it in `.NAME.calibrating`.

    Started by torchrun or accelerate, the processes share the batches.
    With --layerwise a model may be larger than memory: the weights of one
    decoder layer at a time are loaded, and all batches run through it.
    None of these changes a bit of the result.
    """
    from . import _processes
    from .backends import check_device, get_backend
    from .workflow import recipe_of

    if _processes.only_one_started():
        err.print(f"qdeltanet: {_processes.ONE_PROCESS}", highlight=False, markup=False, soft_wrap=True)
    with _processes.joined() as processes:
        chosen = recipe_of(recipe, overrides or ())
        device = check_device(processes.device(device))
        options = {
            "model": model, "dataset": dataset, "samples": samples, "seq_len": seq_len, "batch_size": batch_size,
            "text_column": text_column, "seed": seed, "dtype": dtype, "threads": threads,
            "backend": None if backend is None else get_backend(backend, device).name,
        }  # fmt: skip
        run = {"device": device, "device_map": device_map, "layerwise": layerwise}
        done = _calibrated(output, chosen, options, processes, run, save_every, overwrite, quiet)
        if done is not None and processes.first:
            _print(done, output, json_file)


def _calibrated(
    output: Path,
    recipe: Recipe,
    options: dict[str, Any],
    processes: Processes,
    run: dict[str, Any],
    save_every: float,
    overwrite: bool,
    quiet: bool,
) -> Calibration | None:
    """What was written; None where the output was complete before. run: options that change no bit."""
    from ._threads import usable_cores
    from .calib.session import Resume
    from .core.files import check_output
    from .workflow import is_complete, run_calibration

    quiet = quiet or not processes.first
    resume = Resume.beside(output, save_every, overwrite)
    if processes.agree(processes.first and not overwrite and is_complete(output, recipe, options)):
        resume.remove()
        out.print(f"already complete: {output}", highlight=False)
        return None
    if processes.first:
        check_output(output, overwrite)
        if resume.folder is not None and resume.folder.exists():
            say(quiet)(f"found what an earlier run left: {resume.folder}")
    arguments = {k: v for k, v in options.items() if k not in ("model", "threads")}
    threads = options["threads"] or processes.agree(usable_cores())
    with bar(f"calibrating {options['model']}", quiet) as progress:
        calibration = run_calibration(
            options["model"], recipe, **arguments, **run, threads=threads, resume=resume, progress=progress
        )  # fmt: skip
    calibration = replace(calibration, report={**calibration.report, "request": options})
    if processes.first:
        calibration.save(output, overwrite)
    processes.gather(None)  # nobody's state goes before the result is there
    resume.remove()
    return calibration


def _print(calibration: Calibration, output: Path, json_file: Path | None) -> None:
    from .core.files import write_text

    report = calibration.report
    out.print(calibration_table(report))
    if "execution" in report:
        ran = report["execution"]
        out.print(f"executed on {ran['backend']}: logits {ran['sqnr_db']} dB from float, {ran['saturated']} clipped")
    out.print(f"{len(calibration.scales)} scales written to {output}", highlight=False)
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def calibration_table(report: Any) -> Table:
    """Sites by their worst head over all layers."""
    title = f"{report['recipe']['name']}: sites, worst head over all layers"
    made = table(title, ("site", "format", "scale"), ("largest |x|", "SQNR dB, least", "clipped"))
    merged: dict[str, list[Any]] = {}
    for sites in report["layers"].values():
        for site, row in sites.items():
            merged.setdefault(site, []).append(row)
    for site, rows in merged.items():
        heads = [h for row in rows for h in row["heads"]]
        largest = max(max(abs(v) for v in h["range"]) for h in heads)
        sqnrs = [h["sqnr_db"] for h in heads if h["sqnr_db"] is not None]
        worst = f"{min(sqnrs):.1f}" if sqnrs else "-"
        saturated = str(sum(h["saturated"] for h in heads))
        made.add_row(site, rows[0]["format"], rows[0]["scale"], f"{largest:.4g}", worst, saturated)
    return made

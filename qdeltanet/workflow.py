"""What the command does, as functions: calibrate, evaluate, export, demo. Above calib and eval, below the command."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import __version__
from ._processes import current
from ._threads import threads as pinned_threads
from .calib import Sensitivity, calibrate, calibrate_layerwise, load_samples, sensitivity
from .calib.data import Samples
from .calib.request import difference
from .calib.session import Resume
from .checkpoint import (
    Calibration,
    export_checkpoint,
    export_compressed_tensors,
    export_modelslim,
    load_calibration,
)
from .core import QDeltaNetError, sqnr, unknown
from .core.files import whole_directory
from .eval.embedded import DATASETS, MODELS, dataset_path, model_path
from .eval.evaluate import Row, evaluate
from .eval.prepare import check_recipe, prepare_model, saturation
from .eval.reload import save_logits
from .models import (
    StreamedModel,
    execution_device,
    load_model,
    load_tokenizer,
    set_execution,
    vocabulary_size,
    weights_digest,
)
from .recipe import Recipe, load_recipe

Say = Callable[[str], None]
Progress = Callable[[int, int], None]
T = TypeVar("T")

# The calibration set of each embedded model and the length of its sequences.
EMBEDDED_DATA = {"tiny-recall": ("recall", 128), "tiny-hybrid": ("bytes", 512)}
RECALL_ANSWERS = slice(33, None, 2)  # 16 pairs, then queries with their answers
DEMO_ROWS = ("float", "T=I", "neumann-int8", "int8", "int4-inverse", "int4")
DEMO_QUERIES = 4096


def recipe_of(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """`NAME_OR_FILE[+key=value...]`, then overrides: `neumann-int8+inverse.residual_steps=9`."""
    name, *more = text.split("+")
    return load_recipe(name, [*more, *overrides])


def row_name(text: str) -> str:
    """What a table calls `NAME_OR_FILE[+key=value...]`: a file by its stem."""
    name, *more = text.split("+")
    return "+".join([Path(name).stem if name.endswith((".yaml", ".yml")) else name, *more])


def run_calibration(
    model_name: str,
    recipe: Recipe,
    *,
    dataset: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 8,
    text_column: str | None = None,
    seed: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    resume: Resume | None = None,
    layerwise: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Load, calibrate, return. dataset and seq_len default to those of an embedded model.

    samples: None takes 128, or what there is. seed: shuffles the dataset. device_map: accelerate places the weights on
    all devices there are (`auto`), and what does not fit on the disk; device is not used then.
    backend: execute the first batch there afterwards; the report then says how far its logits are from float.
    threads, resume: as `calibrate`. Of several processes the first one reads the dataset. layerwise: never more than
    one decoder layer in memory; needs `resume`, and excludes `backend` and `device_map`.
    """
    if batch_size < 1:
        raise QDeltaNetError(f"batch size {batch_size}: must be at least 1")
    if layerwise and backend is not None:
        raise QDeltaNetError("backend executes the whole model, layerwise never loads it: leave one of them out")
    if layerwise and device_map is not None:
        raise QDeltaNetError("device_map places a whole model, layerwise never loads it: leave one of them out")
    data = _first(lambda: samples_for(model_name, dataset, samples, seq_len, text_column, seed))
    if layerwise:
        return calibrate_layerwise(
            model_path(model_name), recipe, data, resume=resume or Resume(), model_name=model_name,
            batch_size=batch_size, dtype=dtype, device=device, threads=threads, progress=progress,
        )  # fmt: skip
    with TemporaryDirectory(prefix="qdeltanet-offloaded-") as folder:
        placed = {} if device_map is None else {"device_map": device_map, "offload_folder": folder}
        model = load_model(model_path(model_name), dtype, device, **placed)
        done = calibrate(
            model, recipe, data, model_name=model_name, batch_size=batch_size, progress=progress, threads=threads,
            resume=resume,
        )  # fmt: skip
        if backend is None or recipe.is_float:
            return done
        with pinned_threads(threads or torch.get_num_threads()):
            first_batch = data.tokens[:batch_size].to(execution_device(model))
            execution = _first(lambda: _executed(model, first_batch, backend))
    return replace(done, report={**done.report, "execution": execution})


def _first(work: Callable[[], T]) -> T:
    """work() in the first process, its result in all."""
    result: Any = current().agree(work() if current().first else None)
    return result


def samples_for(
    model_name: str,
    dataset: str | None,
    samples: int | None,
    seq_len: int | None,
    text_column: str | None = None,
    seed: int | None = None,
) -> Samples:
    """Sequences for a model; dataset and seq_len default to those of an embedded model. Raises QDeltaNetError."""
    path = model_path(model_name)
    default, length = EMBEDDED_DATA.get(model_name, (None, 512))
    name = dataset or default
    if name is None:
        raise QDeltaNetError(
            "name a calibration set: --dataset FILE.jsonl, a hub id, or an embedded one (recall, bytes)"
        )
    if name not in DATASETS and difflib.get_close_matches(name, DATASETS):
        raise unknown("dataset", name, DATASETS)
    tokenizer = load_tokenizer(path)
    return load_samples(
        dataset_path(name),
        tokenizer,
        samples,
        seq_len or length,
        text_column,
        seed=seed,
        vocab_size=vocabulary_size(path),
    )


def run_sensitivity(
    model_name: str,
    recipe: Recipe,
    *,
    dataset: str | None = None,
    samples: int = 32,
    seq_len: int | None = None,
    text_column: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Calibrate on some sequences, then run them with each site alone quantized as the recipe has it.

    Of the embedded recall task only the answers count: the tokens between are random. Raises QDeltaNetError as
    `run_calibration` and `sensitivity`.
    """
    data = samples_for(model_name, dataset, samples, seq_len, text_column)
    model = load_model(model_path(model_name), dtype, device)
    calibrate(model, recipe, data, model_name=model_name).apply(model)
    counted = torch.ones_like(data.tokens, dtype=torch.bool)
    if data.name == dataset_path("recall"):
        counted[:] = False
        counted[:, RECALL_ANSWERS] = True
    place = execution_device(model)
    return sensitivity(model, recipe, data.tokens.to(place), counted=counted.to(place), progress=progress)


def _executed(model: Any, tokens: Tensor, backend: str) -> dict[str, Any]:
    """Integer execution of some tokens [B, T] beside float."""
    with torch.no_grad():
        set_execution(model, "float")
        expected = model(input_ids=tokens, use_cache=False).logits
        set_execution(model, "integer", backend)
        found = model(input_ids=tokens, use_cache=False).logits
    clipped = sum(saturation(model).values())
    return {"backend": backend, "sqnr_db": round(sqnr(expected, found), 2), "saturated": clipped}


def is_complete(path: Path, recipe: Recipe, options: Mapping[str, Any]) -> bool:
    """Whether `path` already holds the calibration that these options (the command's) would make.

    Raises QDeltaNetError that says what differs if it holds another one; False if it holds none.
    """
    try:
        report = load_calibration(path).report
    except QDeltaNetError:
        return False
    there = {"recipe": report["recipe"]["fingerprint"], **report.get("request", {})}
    differs = difference(there, {"recipe": recipe.fingerprint, **options}) or _other_inputs(report, options)
    if differs:
        raise QDeltaNetError(
            f"output {path} holds another calibration ({differs}): pass --overwrite to replace it, or name another "
            "--output"
        )
    return True


def _other_inputs(report: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Whether model and dataset are what they were when a calibration was made; nothing computes."""
    data = samples_for(*(options[k] for k in ("model", "dataset", "samples", "seq_len", "text_column", "seed")))
    streamed = StreamedModel(model_path(options["model"]), options["dtype"])
    model = {"fingerprint": streamed.fingerprint(), "weights": weights_digest(streamed.model)}
    there = {"model": {key: report["model"].get(key) for key in model}, "dataset": report["dataset"]["sha256"]}
    return difference(there, {"model": model, "dataset": data.digest})


def evaluation_rows(
    model_name: str,
    recipes: Sequence[tuple[str, Recipe]],
    calibrations: Sequence[Calibration],
    *,
    execution: str,
    backend: str,
    say: Say,
    device: str = "cpu",
    samples: int | None = None,
) -> list[Row]:
    """float first, then a row per recipe with the calibration that belongs to it.

    An embedded model without a calibration is calibrated on its own set (samples: as `run_calibration`), and says so.
    """
    rows = [Row("float", execution="float")]
    for name, recipe in recipes:
        if name == "float" and recipe.fingerprint == load_recipe("float").fingerprint:
            continue
        static = not recipe.is_float and _static(recipe)
        found = next((c for c in calibrations if c.recipe.fingerprint == recipe.fingerprint), None)
        if found is None and static and len(calibrations) == len(recipes) == 1:
            check_recipe(calibrations[0], recipe)  # it is meant for this row: say what differs before any work
        if found is None and static and model_name in MODELS:
            say(f"{name}: no calibration given; calibrating on {EMBEDDED_DATA[model_name][0]}")
            found = run_calibration(model_name, recipe, samples=samples, device=device)
        rows.append(Row(name, recipe, found, execution, backend))  # type: ignore[arg-type]
    return rows


def _static(recipe: Recipe) -> bool:
    """Whether any site asks for a calibrated scale, or a projection for codes that only data can give."""
    sites = [s for one in recipe.schemes if one.rule is not None for s in one.rule.sites.values()]
    sites += [p.activation for one in recipe.schemes for p in one.projections.values()]
    return recipe.codes_by_data or any(s.format is not None and s.scale == "calibrated" for s in sites)


def run_export(
    model_name: str,
    calibration: Calibration,
    output: Path,
    overwrite: bool,
    dtype: str = "float32",
    fmt: str = "qdeltanet",
    **options: Any,
) -> dict[str, Any]:
    """Load the float model, apply the calibration, write it in one of `export_formats`.

    options: of that format. Raises QDeltaNetError.
    """
    exporter = export_formats().get(fmt)
    if exporter is None:
        raise unknown("format", fmt, export_formats())
    path = model_path(model_name)
    model = load_model(path, dtype)
    calibration.apply(model)
    return exporter(model, calibration.recipe, output, lambda: load_tokenizer(path), overwrite, options)


def export_formats() -> dict[str, Callable[..., dict[str, Any]]]:
    """What `qdeltanet export` writes, by name. ONNX and AIMET hold the rule's graphs, the others whole models."""

    def whole(export: Callable[..., Any]) -> Callable[..., Any]:
        def write(model: Any, recipe: Recipe, output: Path, tokenizer: Any, overwrite: bool, options: Any) -> Any:
            if options:
                raise QDeltaNetError(f"options {', '.join(options)}: only the formats onnx and aimet take them")
            return export(model, recipe, output, tokenizer=tokenizer(), overwrite=overwrite)

        return write

    def graphs(name: str) -> Callable[..., Any]:
        def write(model: Any, recipe: Recipe, output: Path, tokenizer: Any, overwrite: bool, options: Any) -> Any:
            onnx = importlib.import_module("qdeltanet.checkpoint.onnx")
            return getattr(onnx, f"export_{name}")(model, recipe, output, overwrite=overwrite, **options)

        return write

    return {
        "qdeltanet": whole(export_checkpoint),
        "compressed-tensors": whole(export_compressed_tensors),
        "modelslim": whole(export_modelslim),
        "onnx": graphs("onnx"),
        "aimet": graphs("aimet"),
    }


def versions() -> dict[str, str]:
    """Of this program and of what it computes with."""
    from importlib.metadata import version

    names = ("torch", "transformers", "brevitas", "lm-eval", "datasets", "safetensors")
    return {"qdeltanet": __version__, "python": sys.version.split()[0]} | {n: version(n) for n in names}


# -- demo --------------------------------------------------------------------------------------------------------------


def run_demo(output: Path, overwrite: bool, say: Say) -> dict[str, Any]:
    """Calibrate tiny-recall, evaluate the demo's rows, export int8, reload it in a fresh process, evaluate again.

    Returns the content of results.json. Raises QDeltaNetError if the output directory may not be written.
    """
    with whole_directory(output, overwrite) as folder:
        rows, calibrations = _demo_rows(folder, say)
        say(f"evaluating {len(rows)} rows on {DEMO_QUERIES} queries of the recall task")
        measured = evaluate("tiny-recall", rows, ["recall"], limit=DEMO_QUERIES, progress=lambda n: say(f"  {n}"))
        say("exporting int8 and loading it in a fresh process")
        export = _demo_export(calibrations["int8"], folder)
        export["path"] = str(output / "int8")
        results = {
            "model": "tiny-recall",
            "versions": versions(),
            "rows": [demo_row(r) for r in measured],
            "export": export,
        }
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _demo_rows(folder: Path, say: Say) -> tuple[list[Row], dict[str, Calibration]]:
    rows, calibrations = [Row("float", execution="float")], {}
    for name in DEMO_ROWS[1:]:
        recipe = recipe_of("float+inverse.method=identity") if name == "T=I" else load_recipe(name)
        if _static(recipe) and not recipe.is_float:
            say(f"calibrating tiny-recall for {name}")
            calibrations[name] = run_calibration("tiny-recall", recipe)
            calibrations[name].save(folder / f"calibration-{name}")
        rows.append(Row(name, recipe, calibrations.get(name)))
    return rows, calibrations


def demo_row(row: dict[str, Any]) -> dict[str, Any]:
    """One line of the demo's table from one row of `evaluate`."""
    acc, nll = row["tasks"]["recall"]["acc"], row["tasks"]["recall"]["nll"]
    return {
        "name": row["name"],
        "execution": row["execution"],
        "accuracy": acc["value"],
        "stderr": acc["stderr"],
        "difference": acc["difference"],
        "difference_stderr": acc["difference_stderr"],
        "nll": nll["value"],
        "saturated": row["saturated"],
    }


def _demo_export(calibration: Calibration, folder: Path) -> dict[str, Any]:
    checkpoint = folder / "int8"
    run_export("tiny-recall", calibration, checkpoint, overwrite=False)
    model = prepare_model("tiny-recall", calibration.recipe, calibration)
    set_execution(model, "integer")
    tokens = load_samples(DATASETS["recall"], load_tokenizer(model_path("tiny-recall")), 16, 128).tokens
    logits, result = folder / "logits.safetensors", folder / "reload.json"
    save_logits(model, tokens, logits)
    command = [
        sys.executable,
        "-m",
        "qdeltanet.eval.reload",
        str(checkpoint),
        str(logits),
        str(result),
        str(DEMO_QUERIES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"the fresh process failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    logits.unlink()
    result.unlink()
    return found

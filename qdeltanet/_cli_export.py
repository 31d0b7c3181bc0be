"""`qdeltanet export`: one calibrated model in the formats of several runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Dtype, Model, Output, Overwrite, out

FORMATS = ("qdeltanet", "compressed-tensors", "modelslim", "onnx", "aimet")
FLOAT_RULE = "executed there are the projections alone: the delta rule runs in float, its scales are in qdeltanet/"


def export_command(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="Directory that `qdeltanet calibrate` wrote.")],
    output: Output,
    fmt: Annotated[str, typer.Option("--format", "-f", help=f"One of {', '.join(FORMATS)}.")] = "qdeltanet",
    dtype: Dtype = "float32",
    layer: Annotated[int | None, typer.Option(help="onnx, aimet: this decoder layer alone.")] = None,
    chunks: Annotated[int | None, typer.Option(help="onnx, aimet: chunks of the prefill graph (4).")] = None,
    batch: Annotated[int | None, typer.Option(help="onnx, aimet: sequences at a time (1).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with integer weights and every scale, for this program or for another runtime.

    qdeltanet holds everything and loads with transformers. compressed-tensors (transformers, vLLM) and modelslim
    (vllm-ascend) hold the projections, and are checked as a whole before they are written; onnx and aimet hold graphs
    of the delta rule.
    """
    from .checkpoint import load_calibration
    from .core import unknown
    from .core.files import check_output
    from .workflow import run_export

    if fmt not in FORMATS:
        raise unknown("format", fmt, FORMATS)
    check_output(output, overwrite)
    options = {k: v for k, v in (("layer", layer), ("chunks", chunks), ("batch", batch)) if v is not None}
    done = run_export(model, load_calibration(calibration), output, overwrite, dtype, fmt, **options)
    for line in _report(fmt, output, done):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _report(fmt: str, output: Path, done: dict[str, Any]) -> list[str]:
    """What was written, and how to load it."""
    load = f'AutoModelForCausalLM.from_pretrained("{output}")'
    if fmt == "qdeltanet":
        return [f"{done['tensors']} tensors written to {output}", f"load it: import qdeltanet; {load}"]
    if fmt == "compressed-tensors":
        count = sum(len(g["targets"]) for g in done["config_groups"].values())
        wrote = f"{count} projections ({done['format']}) written to {output}, and checked"
        return [wrote, FLOAT_RULE, f"load it: {load} (pip install compressed-tensors), or vllm serve {output}"]
    if fmt == "modelslim":
        count = sum(k.endswith(".weight") and v != "FLOAT" for k, v in done.items())
        wrote = f"{count} projections ({done['model_quant_type']}) written to {output}, and checked"
        return [wrote, FLOAT_RULE, f"load it: vllm serve {output} --quantization ascend"]
    return [f"the rule's graphs written to {output} (export.json lists them)"]

"""Export: a Hugging Face checkpoint with integer weights and every scale, in safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import QDeltaNetError
from ..core.files import sha256_file, whole_directory
from ..models import quantized_layers
from ..recipe import Recipe
from .description import describe_layers
from .folder import exported_tensors, save_rest, save_tensors

FORMAT_VERSION = 2
METHOD = "qdeltanet"


def export_checkpoint(
    model: Any, recipe: Recipe, path: Path, *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a quantized in-memory model as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    A multimodal model stays one: `AutoModelForImageTextToText` loads it whole, `AutoModelForCausalLM` its text part.
    The directory holds config.json with `quantization_config: {"quant_method": "qdeltanet", ...}`, model*.safetensors
    and the tokenizer; docs/checkpoint.md specifies it. Returns the quantization_config. Raises QDeltaNetError if the
    model is not quantized or the directory may not be written.
    """
    check_quantized(model)
    with whole_directory(path, overwrite) as folder:
        tensors = exported_tensors(model)
        save_tensors(tensors, folder)
        config = {
            "quant_method": METHOD,
            "version": FORMAT_VERSION,
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "schemes": describe_layers(model),
            "files": file_digests(folder),
            "tensors": len(tensors),
        }
        save_rest(model, folder, tokenizer, quantization_config=config)
    return config


def check_quantized(model: Any) -> None:
    """Raises QDeltaNetError for a model that no calibration was applied to."""
    if not quantized_layers(model):
        raise QDeltaNetError("the model is not quantized: apply a calibration before exporting")


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every safetensors file in a folder, by its path in it."""
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*.safetensors"))}

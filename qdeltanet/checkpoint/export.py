"""Export: a Hugging Face checkpoint with integer weights and every scale, in safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..core import QDeltaNetError
from ..core.files import sha256_file, whole_directory
from ..models import delta_net_layers
from ..recipe import Recipe

FORMAT_VERSION = 1
METHOD = "qdeltanet"


def export_checkpoint(
    model: Any, recipe: Recipe, path: Path, *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a quantized in-memory model as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    A multimodal model stays one: `AutoModelForImageTextToText` loads it whole, `AutoModelForCausalLM` its text part.
    The directory holds config.json with `quantization_config: {"quant_method": "qdeltanet", ...}`, model*.safetensors
    and the tokenizer. Returns the quantization_config. Raises QDeltaNetError if the model is not quantized or the
    directory may not be written.
    """
    if not delta_net_layers(model):
        raise QDeltaNetError("the model is not quantized: apply a calibration before exporting")
    with whole_directory(path, overwrite) as folder:
        tensors = _save_weights(model, folder)
        config = {
            "quant_method": METHOD,
            "version": FORMAT_VERSION,
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "files": {p.name: sha256_file(p) for p in sorted(folder.glob("*.safetensors"))},
            "tensors": len(tensors),
        }
        _save_config(model, config, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    return config


def exported_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict of an exported checkpoint: no float originals of coded weights, tied weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = model.state_dict()
    return {k: v.detach().contiguous() for k, v in state.items() if ".original." not in k and k not in tied}


def _save_weights(model: Any, folder: Path) -> dict[str, Tensor]:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = exported_tensors(model)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB")
    for name, keys in split.filename_to_tensors.items():
        save_file({k: tensors[k] for k in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return tensors


def _save_config(model: Any, quantization_config: dict[str, Any], folder: Path) -> None:
    content = model.config.to_dict()
    content["architectures"] = [type(model).__name__]
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    content["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

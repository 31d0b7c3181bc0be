"""The files that every Hugging Face checkpoint consists of, whatever its tensors mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
# Of this machine, not of the model.
OWN_KEYS = ("_name_or_path",)


def exported_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict of an exported checkpoint: no float originals of coded weights, tied weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = model.state_dict()
    return {k: v.detach().contiguous() for k, v in state.items() if ".original." not in k and k not in tied}


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """model.safetensors, or shards of 5 GB with their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size="5GB")
    for name, keys in split.filename_to_tensors.items():
        save_file({k: tensors[k] for k in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def save_rest(model: Any, folder: Path, tokenizer: Any, **keys: Any) -> None:
    """config.json with these keys at its top level, the generation settings and the tokenizer."""
    content = {k: v for k, v in model.config.to_dict().items() if k not in OWN_KEYS}
    content["architectures"] = [type(model).__name__]
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    content.pop("quantization_config", None)  # of the checkpoint that the model was loaded from
    content |= keys
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def read_headers(files: Iterable[Path]) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """(shape, safetensors' name of the dtype) of every tensor, and by file name why a file could not be read."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    unreadable = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(key)
                    found[key] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as e:
            unreadable[file.name] = f"{file.name} cannot be read ({str(e).splitlines()[0]})"
    return found, unreadable

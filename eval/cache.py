"""Answers that are kept belong to all that they depend on: weights, recipe, calibration, execution, tasks, versions.

lm-eval's own `--use_cache` keys a request by its text alone, whatever model or recipe answered it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checkpoint import Calibration
from ..core import QDeltaNetError
from ..core.files import check_output, write_text
from ..nn import GatedDeltaNet, QuantLinear

OWNER = "qdeltanet: these answers are of"  # lm-eval's own keys are hashes


def digest_of(content: Any) -> str:
    """sha256 of plain data as JSON; whatever is not plain by its text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """sha256 over names, dtypes, shapes and every byte, in order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def executed_digest(model: Any) -> dict[str, str]:
    """What a prepared model computes with: `weights` (floats, codes and scales) and `arithmetic` (config, and every
    quantized module's scheme, execution and backend)."""
    schemes = [
        (name, _ordered(module.scheme), module.execution, module.backend_name)
        for name, module in model.named_modules()
        if isinstance(module, (GatedDeltaNet, QuantLinear))
    ]
    config = model.config.to_dict()
    for of_its_place in ("_name_or_path", "transformers_version"):
        config.pop(of_its_place, None)
    return {"weights": tensors_digest(model.state_dict().items()), "arithmetic": digest_of([config, schemes])}


def _ordered(part: Any) -> Any:
    """A scheme as plain data. Its text would not do: sets have another order in every process."""
    if is_dataclass(part):
        return [type(part).__name__, *((f.name, _ordered(getattr(part, f.name))) for f in fields(part))]
    if isinstance(part, Mapping):
        return [(_ordered(k), _ordered(v)) for k, v in part.items()]
    if isinstance(part, (set, frozenset)):
        return sorted(map(str, part))
    return [_ordered(p) for p in part] if isinstance(part, (list, tuple)) else part


def calibration_digest(calibration: Calibration | None) -> str | None:
    """Of its scales and coded weights; how it came about does not matter."""
    return None if calibration is None else tensors_digest([*calibration.scales.items(), *calibration.weights.items()])


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what turns text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else backend.to_str()
    return digest_of([words, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)])


@cache
def program_digest() -> str:
    """Of this program's sources: what an older or a changed one answered is not served."""
    names = ("qdeltanet", "qdeltanet.calib", "qdeltanet.eval")  # in a checkout links, which `rglob` does not enter
    folders = [Path(place) for name in names for place in import_module(name).__path__]
    files = {hashlib.sha256(file.read_bytes()).hexdigest() for folder in folders for file in folder.rglob("*.py")}
    return digest_of(sorted(files))


class Cache:
    """A folder with one JSON file per key, named by the key's hash and holding it in full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: Mapping[str, Any]) -> Any:
        """What is kept under a key; None if nothing is, or it is damaged."""
        try:
            kept = json.loads(self._file(key).read_text(encoding="utf-8"))
            return kept["content"] if digest_of(kept["key"]) == digest_of(key) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: Mapping[str, Any], content: Any) -> None:
        """Raises QDeltaNetError if it cannot be written."""
        write_text(self._file(key), json.dumps({"key": key, "content": content}, default=str) + "\n")

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest_of(key)}.json"


def check_cache(folder: Path | None) -> Cache | None:
    """A cache in a folder, which need not be there yet. Raises QDeltaNetError if it could not be written."""
    if folder is None:
        return None
    check_output(folder, overwrite=True)
    return Cache(folder)


def claim(answers: MutableMapping[str, Any], key: Mapping[str, Any]) -> None:
    """Make an lm-eval cache belong to what is about to answer. Raises QDeltaNetError if it belongs to another."""
    key = {**key, "program": program_digest()}
    owner = answers.get(OWNER)
    if owner is None and len(answers):
        raise QDeltaNetError("--use_cache: the file's answers are of an unknown model and recipe; name another file")
    if owner is not None and owner != key:
        differs = ", ".join(k for k in key if owner.get(k) != key[k])
        raise QDeltaNetError(f"--use_cache: the file holds answers of another {differs}; name another file")
    answers[OWNER] = key

"""What identifies a model: cheap enough for hundreds of gigabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .check import weight_files
from .placement import materialised

# Small tensors whose content is hashed; of the rest, names, shapes and dtypes.
_HASHED = ("A_log", "dt_bias", "conv1d.weight", "norm.weight")
SAMPLES, BLOCK = 1024, 4096  # blocks of a file that its digest reads, and their bytes
_TEXT = "language_model."  # what holds the text part of a multimodal model


def model_fingerprint(model: Any, small: Mapping[str, Tensor] | None = None) -> str:
    """sha256 over the names and shapes of all float weights and the content of the small ones.

    The same before and after `quantize_model`, and for any execution. Of a multimodal model only the text part counts,
    under the names of the text model: a calibration of either is one of the other. small: content of the small tensors
    by float name, for a model on the meta device; of one that accelerate has offloaded they are fetched.
    """
    small = _offloaded(model) if small is None else small
    digest = hashlib.sha256()
    for name, tensor in sorted(_text_parameters(model, small)):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if is_hashed(name):
            data = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def weights_digest(model: Any) -> str | None:
    """Of the files that a model was loaded from: sha256 over their sizes and SAMPLES blocks spread over each.

    What `model_fingerprint` cannot see, large weights that were trained further or merged, changes nearly every block.
    A hub model is identified by its commit. None for a model that was made in memory.
    """
    folder = Path(getattr(model, "name_or_path", "") or "")
    if not folder.name or not folder.is_dir():
        return getattr(model.config, "_commit_hash", None)
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(size // SAMPLES, BLOCK)):
                opened.seek(start)
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()


def float_name(name: str) -> str:
    """What a parameter was called before `quantize_model`."""
    return name.replace(".original.", ".")


def is_hashed(name: str) -> bool:
    """Whether the content of a parameter belongs to the fingerprint."""
    return name.endswith(_HASHED)


def _offloaded(model: Any) -> dict[str, Tensor]:
    """Content of the small tensors that are not in memory, by float name."""
    small: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        names = [n for n, p in module.named_parameters(recurse=False) if p.is_meta and is_hashed(f"{path}.{n}")]
        with materialised(module, recurse=False) if names else nullcontext():
            small |= {float_name(f"{path}.{n}"): getattr(module, n).detach() for n in names}
    return small


def _text_parameters(model: Any, small: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    named = {float_name(name): tensor for name, tensor in model.named_parameters()}
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():  # offloading takes them for two
        if source in named:
            named.pop(name, None)
    multimodal = any(f".{_TEXT}" in name for name in named)
    for name, tensor in named.items():
        if not multimodal or _TEXT in name or name.startswith("lm_head."):
            yield name.replace(_TEXT, ""), small.get(name, tensor)

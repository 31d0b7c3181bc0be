"""What identifies a model: cheap enough for hundreds of gigabytes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

# Small tensors whose content is hashed; of the rest, names, shapes and dtypes.
_HASHED = ("A_log", "dt_bias", "conv1d.weight", "norm.weight")


def model_fingerprint(model: Any) -> str:
    """sha256 over the names and shapes of all float weights and the content of the small ones.

    The same before and after `quantize_model`, and for any execution.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        name = name.replace(".original.", ".")
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if name.endswith(_HASHED):
            data = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()

"""One state file: watchers' states by layer, and the batches that are in them; whole, or seen to be damaged."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core import QDeltaNetError
from ..core.files import write_bytes

PLAIN = "plain"  # the tensor that holds what is none, by layer and name: JSON in UTF-8, compressed


@dataclass(frozen=True)
class StateFile:
    """batches: in the state. layers: a state by name of each layer."""

    batches: list[int]
    layers: dict[int, dict[str, Any]]


def write_state(path: Path, key: str, batches: Sequence[int], layers: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace a state file in one step. key: of the request that it belongs to. Raises QDeltaNetError if it cannot."""
    tensors = {f"{i}/{name}": x for i, s in layers.items() for name, x in s.items() if isinstance(x, Tensor)}
    plain = {i: {name: x for name, x in s.items() if not isinstance(x, Tensor)} for i, s in layers.items()}
    tensors[PLAIN] = torch.frombuffer(bytearray(zlib.compress(json.dumps(plain).encode())), dtype=torch.uint8)
    metadata = {"key": key, "batches": json.dumps(list(batches))}
    write_bytes(path, save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))


def read_state(path: Path, key: str) -> StateFile:
    """Raises QDeltaNetError for a file that is damaged, or of another request."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sha256 = metadata.pop("sha256")
        whole = sha256 == _digest(tensors, metadata) and metadata["key"] == key
    except (SafetensorError, OSError, KeyError, TypeError) as e:
        raise _damaged(path) from e
    if not whole:
        raise _damaged(path)
    layers: dict[int, dict[str, Any]] = {}
    for layer, state in json.loads(zlib.decompress(tensors.pop(PLAIN).numpy().tobytes())).items():
        layers[int(layer)] = dict(state)
    for place, x in tensors.items():
        layer, _, name = place.partition("/")
        layers[int(layer)][name] = x
    return StateFile(json.loads(metadata["batches"]), layers)


def _damaged(path: Path) -> QDeltaNetError:
    return QDeltaNetError(f"{path}: damaged; delete it and give the same command: its batches are run again")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.contiguous().reshape(-1).numpy().tobytes())
    return digest.hexdigest()

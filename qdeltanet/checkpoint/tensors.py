"""Tensors by name in one safetensors file: captured matrices and gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..core import QDeltaNetError
from ..core.files import write_bytes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises QDeltaNetError for a file that is missing or damaged."""
    if not path.is_file():
        raise QDeltaNetError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise QDeltaNetError(f"{path}: not a safetensors file, or damaged ({str(e).splitlines()[0]})") from e


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file whole or not at all. Raises QDeltaNetError if it cannot be written."""
    write_bytes(path, save({name: x.contiguous() for name, x in tensors.items()}))

"""Tensors by name in one safetensors file: captured matrices and gates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import QDeltaNetError


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
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial)
        os.replace(partial, path)
    except OSError as e:
        raise QDeltaNetError(f"cannot write {path}: {e.strerror}") from e
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)

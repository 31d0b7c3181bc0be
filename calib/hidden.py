"""What passes from decoder layer to decoder layer for the whole calibration set: on disk, mapped into memory."""

from __future__ import annotations

import os
import re
import shutil
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..core import QDeltaNetError

_NAME = re.compile(r"hidden-\d+\.bin$")


class HiddenStates:
    """Inputs of decoder layers 1, 2, ... for all samples, in two files that take turns.

    A file is called after the layer whose input it is for, so that none is taken for another's. shape: [samples,
    tokens, width].
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._mapped: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Of each file."""
        return prod(self.shape) * self.dtype.itemsize

    def reserve(self, layer: int) -> None:
        """Room on disk for both files; the input of this layer must be there, unless it is 0, which has none.

        Writing into a mapped file on a full disk would kill the process: so the room is taken before. Raises
        QDeltaNetError if there is too little, or if the input is gone.
        """
        if not self._is_whole(self._file(layer)):
            if layer:
                raise QDeltaNetError(
                    f"{self._file(layer)} is missing or cut off: delete {self.folder} and give the same command"
                )
            self._allocate(self._file(layer))
        if self._other(layer) is None:
            self._allocate(self._file(layer + 1))

    def prepare(self, layer: int) -> None:
        """The file that is not the input of the layer before becomes this layer's."""
        other = self._other(layer - 1)
        assert other is not None
        other.rename(self._file(layer))

    def _other(self, layer: int) -> Path | None:
        files = [self.folder / name for name in sorted(os.listdir(self.folder)) if _NAME.match(name)]
        return next((file for file in files if self._is_whole(file) and file != self._file(layer)), None)

    def read(self, layer: int, rows: Tensor) -> Tensor:
        """What enters a layer for these samples (int64 [B]), in memory: [B, tokens, width]."""
        return self._map(layer)[rows]

    def write(self, layer: int, rows: Tensor, hidden: Tensor) -> None:
        """Keep what enters a layer. Raises QDeltaNetError if it has another dtype than the model."""
        if hidden.dtype != self.dtype:
            raise QDeltaNetError(
                f"layer {layer - 1} gives {hidden.dtype} in a model of {self.dtype}: calibrate without --layerwise"
            )
        self._map(layer)[rows] = hidden.cpu()

    def sync(self, layer: int) -> None:
        """What was written for a layer survives the machine. Raises QDeltaNetError if it cannot be written."""
        try:
            with self._file(layer).open("r+b") as file:
                os.fsync(file.fileno())
        except OSError as e:
            raise QDeltaNetError(f"cannot write {self._file(layer)}: {e.strerror}") from e

    def _file(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05}.bin"

    def _is_whole(self, file: Path) -> bool:
        return file.is_file() and file.stat().st_size == self.nbytes

    def _map(self, layer: int) -> Tensor:
        if layer not in self._mapped:
            self._mapped = {k: x for k, x in self._mapped.items() if abs(k - layer) == 1}
            file = str(self._file(layer))
            self._mapped[layer] = torch.from_file(file, True, prod(self.shape), dtype=self.dtype).view(self.shape)
        return self._mapped[layer]

    def _allocate(self, file: Path) -> None:
        try:
            with file.open("wb") as opened:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, self.nbytes)
                else:
                    opened.truncate(self.nbytes)
        except OSError as e:
            file.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise QDeltaNetError(
                f"cannot reserve {2 * self.nbytes:,} bytes for hidden states in {self.folder} ({e.strerror}; {free:,} "
                "are free): name an --output on another disk, or lower --samples or --seq-len"
            ) from e

"""The numbers that a kernel multiplies by, made in torch by core's functions and laid out for the kernel to read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import Region


@dataclass
class Pack:
    """One row of numbers per head; a requantization reads its own by offset.

    rows, columns: of the output tile. padded: of the tile in the kernel, powers of two.
    """

    heads: int
    rows: int
    columns: int
    padded: tuple[int, int]
    dtype: torch.dtype
    width: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def add(self, m: Tensor, blocks: int = 1, region: Region | None = None, inner: int | None = None) -> str:
        """Text that loads a multiplier: a scalar, [rows, 1], [1, columns] or a tile.

        m: [H or 1, R or 1, C or 1], or [H or 1, n or 1, r or 1, c or 1] for `blocks` blocks on the diagonal; region:
        rows and columns of a block that it covers; inner: [H or 1, n or 1, f or 1, r or 1, c or 1], where it covers
        the smaller blocks of this size on the diagonal of each.
        """
        if inner is not None:
            parts = self.rows // (blocks * inner)
            m = m.expand(-1, blocks, parts, -1, -1).flatten(1, 2) if max(m.shape[1:]) > 1 else m[:, 0]
            blocks *= parts
        index, values = self._spread(m if m.dim() == 4 else m.unsqueeze(-3), blocks, region)
        offset = self.width
        self.parts.append(values.to(self.dtype).expand(self.heads, -1))
        self.width += values.shape[-1]
        return f"tl.load(multipliers + {offset}{index})"

    def _spread(self, m: Tensor, blocks: int, region: Region | None) -> tuple[str, Tensor]:
        """(index text, [h, values]) over the whole padded axes; zeros where the region does not reach."""
        h, n, r, c = m.shape
        if n == r == c == 1:
            return "", m.reshape(h, 1)
        (rows, columns), (tall, wide) = region or (slice(None), slice(None)), self.padded
        b_rows, b_columns = self.rows // blocks, self.columns // blocks
        if c == 1:
            whole = m.new_zeros(h, blocks, b_rows)
            whole[:, :, rows] = m[..., 0]
            return " + i", F.pad(whole.flatten(1), (0, tall - self.rows))
        if r == 1:
            whole = m.new_zeros(h, blocks, b_columns)
            whole[:, :, columns] = m[:, :, 0]
            return " + j", F.pad(whole.flatten(1), (0, wide - self.columns))
        whole = m.new_zeros(h, blocks, b_rows, blocks, b_columns)
        diagonal = whole.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        diagonal[:, :, rows, columns] = m
        tile = F.pad(whole.reshape(h, self.rows, self.columns), (0, wide - self.columns, 0, tall - self.rows))
        return f" + i * {wide} + j", tile.flatten(1)

    def tensor(self, device: torch.device) -> Tensor:
        """[heads, width], contiguous; never empty, so that a kernel always has a pointer."""
        if not self.parts:
            return torch.zeros(self.heads, 1, dtype=self.dtype, device=device)
        return torch.cat([p.to(device) for p in self.parts], dim=1).contiguous()

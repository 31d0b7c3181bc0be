"""A tensor of the rule as the arithmetics hand it on: codes with their scale, or real numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import QDeltaNetError
from .formats import IntFormat
from .quantize import check_scale


@dataclass(frozen=True)
class Operand:
    """codes [..., H, R, C] with a float32 scale that broadcasts against them.

    format: None where codes are real numbers (scale None). compact: a register of the inverse held as its blocks on
    the diagonal, [..., H, n, b, b]. residual: of a state with error feedback, what its codes leave out, as codes of a
    finer step.
    """

    site: str
    codes: Tensor
    scale: Tensor | None = None
    format: IntFormat | None = None
    compact: bool = False
    residual: Operand | None = None

    @property
    def parts(self) -> tuple[Operand, ...]:
        """What adds up to the tensor: the codes, and the residual where there is one."""
        return (self,) if self.residual is None else (replace(self, residual=None), self.residual)

    def with_residual(self, codes: Tensor, feedback: IntFormat) -> Operand:
        """With residual codes of step scale * 2^-bits: a format of `bits` bits just holds half a step of the codes."""
        assert self.scale is not None
        return replace(self, residual=Operand(self.site, codes, self.scale * 2.0**-feedback.bits, feedback))

    @property
    def mT(self) -> Operand:
        return replace(self, codes=self.codes.mT, scale=None if self.scale is None else self.scale.mT)

    def __getitem__(self, n: int) -> Operand:
        """Chunk n of [N, B, H, R, C]."""
        scale = self.scale[n] if self.scale is not None and self.scale.dim() > 3 else self.scale
        return replace(self, codes=self.codes[n], scale=scale)

    def part(self, rows: slice, columns: slice) -> Operand:
        """Some rows and columns of the matrix (of each block, where compact)."""
        scale = self.scale
        if scale is not None:
            scale = scale[..., rows, :] if scale.shape[-2] > 1 else scale
            scale = scale[..., columns] if scale.shape[-1] > 1 else scale
        return replace(self, codes=self.codes[..., rows, columns], scale=scale)

    @property
    def contracted(self) -> int:
        """Length of the axis that a product contracts where this is the left operand, of the whole matrix."""
        return self.codes.shape[-1] * (self.codes.shape[-3] if self.compact else 1)

    def real(self) -> Tensor:
        """float32 values, the residual included."""
        real = self.codes.to(torch.float32)
        real = real if self.scale is None else real * self.scale
        return real if self.residual is None else real + self.residual.real()


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[..., H, R, C] -> [..., heads, R, C]: each key head serves heads // H consecutive value heads."""
    if x.dim() < 3 or x.shape[-3] in (1, heads):
        return x
    return x.repeat_interleave(heads // x.shape[-3], dim=-3)


def check_codes(x: Operand) -> None:
    """Raise QDeltaNetError if codes from outside are no whole numbers within their format, or their scale is no scale.

    On an accelerator this would wait for the device, so there it is left to whoever made the codes.
    """
    if x.residual is not None:
        check_codes(x.residual)
    if x.format is None or x.codes.device.type != "cpu" or not x.codes.numel():
        return
    low, high = (float(v) for v in x.codes.detach().aminmax())
    if not (low >= x.format.qmin and high <= x.format.qmax):
        raise QDeltaNetError(f"site {x.site}: codes reach [{low:g}, {high:g}], outside of {x.format.name}")
    if x.codes.is_floating_point() and bool((x.codes != x.codes.round()).any()):
        raise QDeltaNetError(f"site {x.site}: codes must be whole numbers; quantize real numbers first")
    if x.scale is None:
        raise QDeltaNetError(f"site {x.site}: codes come without a scale")
    check_scale(x.scale, x.site)


def sub_blocks(x: Tensor, size: int, block: int | None = None) -> Tensor:
    """[..., n, b, b] -> [..., n / f, f, b, b], the blocks that make up each larger one of `size` = f b.

    block: b where x is a scale, whose last axes may be 1.
    """
    if x.shape[-3] == 1:
        return x.unsqueeze(-3)
    return x.unflatten(-3, (-1, size // (block or x.shape[-1])))


def block_part(x: Operand, size: int, rows: slice, columns: slice) -> Operand:
    """Rows and columns of the diagonal blocks of `size`, of a matrix or of a register of blocks up to that size.

    size 0: of the matrix as it is. What lies within one of the smaller blocks is a view of them; else they are
    embedded first.
    """
    block = x.codes.shape[-1]
    if size == 0:
        return x.part(rows, columns)
    if x.compact and block < size:
        which = rows.start // block
        if {which} == {i // block for i in (rows.stop - 1, columns.start, columns.stop - 1)}:
            start = which * block
            inside = (slice(axis.start - start, axis.stop - start) for axis in (rows, columns))
            return _every(x, size // block, which).part(*inside)
    return diagonal_blocks(x, size).part(rows, columns)


def _every(x: Operand, stride: int, which: int) -> Operand:
    """Every stride-th block of a compact register, from number `which` on."""
    scale = x.scale
    if scale is not None and scale.shape[-3] > 1:
        scale = scale[..., which::stride, :, :]
    return replace(x, codes=x.codes[..., which::stride, :, :], scale=scale)


def _split_axis(scale: Tensor, axis: int, block: int) -> Tensor:
    """[..., C, 1] -> [..., n, b, 1] or [..., 1, C] -> [..., n, 1, b]; a scale that keeps no axis gains one of 1."""
    if scale.shape[axis] == 1:
        return scale
    blocks = scale.unflatten(axis, (-1, block))
    return blocks if axis == -2 else blocks.transpose(-3, -2)


def diagonal_blocks(x: Operand, block: int) -> Operand:
    """The [block, block] blocks on the diagonal of a [..., C, C] operand (whole or compact), compact."""
    if x.compact and x.codes.shape[-1] == block:
        return x
    if x.compact and x.codes.shape[-1] < block:
        return _embed(x, block)
    if x.compact:
        return _cut(x, block)
    codes = x.codes.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    scale = x.scale
    if scale is not None:
        kept = next((axis for axis in (-2, -1) if scale.shape[axis] > 1), None)
        scale = scale.unsqueeze(-3) if kept is None else _split_axis(scale, kept, block)
    return replace(x, codes=codes, scale=scale, compact=True)


def _cut(x: Operand, block: int) -> Operand:
    """Compact blocks into the smaller ones on their diagonals."""
    single = replace(x, compact=False)  # the axis of blocks as one more leading axis
    parts = diagonal_blocks(single, block)
    scale = None if parts.scale is None else _joined_blocks(parts.scale)
    return replace(parts, codes=_joined_blocks(parts.codes), scale=scale)


def _joined_blocks(x: Tensor) -> Tensor:
    """[..., n, f, b, b] -> [..., n f, b, b]; axes of 1 stand for all."""
    return x.squeeze(-3) if x.shape[-3] == 1 else x.flatten(-4, -3) if x.shape[-4] > 1 else x.squeeze(-4)


def _embed(x: Operand, block: int) -> Operand:
    """Smaller diagonal blocks into larger ones, zeros between."""
    *lead, n, b, _ = x.codes.shape
    f = block // b
    codes = x.codes.new_zeros(*lead, n // f, block, block)
    view = codes.view(*lead, n // f, f, b, f, b).diagonal(dim1=-4, dim2=-2)
    view.copy_(x.codes.view(*lead, n // f, f, b, b).movedim(-3, -1))
    scale = x.scale
    if scale is not None and scale.shape[-3] > 1:
        kept = -2 if scale.shape[-2] > 1 else -1
        merged = scale if kept == -2 else scale.transpose(-1, -2)
        merged = merged.unflatten(-3, (n // f, f)).flatten(-3, -2)
        scale = merged if kept == -2 else merged.transpose(-1, -2)
    return replace(x, codes=codes, scale=scale)


def whole(x: Operand) -> Operand:
    """A compact operand of one block as an ordinary [..., C, C] one."""
    if not x.compact:
        return x
    assert x.codes.shape[-3] == 1, "only one block spans the matrix"
    return replace(x, codes=x.codes.squeeze(-3), scale=None if x.scale is None else x.scale.squeeze(-3), compact=False)

"""Summands of a requantization, and their float32 sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Region = tuple[slice, slice]


@dataclass(frozen=True)
class Term:
    """One summand of a requantization: an exact accumulator (or codes) and the scales that make it real.

    acc: [..., R, C] whole numbers in any container (int64, float32, float64), or real float32 where nothing is
    quantized. scales: float32 factors, each broadcastable to the output and keeping at most one of the last two axes.
    sign: +1 or -1. bound: largest |acc| (times coefficient), 0 for real numbers. region: rows and columns of the output
    that acc covers, None for all of them; the rest of the output is zero for this term. coefficient: coefficient codes
    that multiply acc into a wide accumulator; they may have a multiple of acc's heads. blocks: acc holds the diagonal
    blocks of this size of each matrix, [..., f, b, b]; the rest is zero. fresh: acc is nobody else's and may be written
    to.
    """

    acc: Tensor
    scales: tuple[Tensor, ...] = ()
    sign: int = 1
    bound: int = 0
    region: Region | None = None
    coefficient: Tensor | None = None
    blocks: int | None = None
    fresh: bool = False

    def __getitem__(self, n: int) -> Term:
        """The term of chunk n, for [N, B, H, R, C] accumulators."""
        coefficient = None if self.coefficient is None else self.coefficient[n]
        scales = tuple(s[n] if s.dim() > 3 else s for s in self.scales)
        return replace(self, acc=self.acc[n], scales=scales, coefficient=coefficient)

    def float32(self) -> tuple[Tensor, bool]:
        """f32(acc): the accumulator as one whole number, converted once. Also says whether the tensor is a new one.

        A float32 container and coefficient codes are both exact in float32, so their float32 product is the wide
        accumulator rounded once: no wider container is needed.
        """
        if self.coefficient is None:
            value = self.acc.to(torch.float32)
            return value, self.fresh or value is not self.acc
        if not self.acc.is_floating_point():
            return self.int64().to(torch.float32), True
        wide = per_head(torch.mul, self.acc, self.coefficient.to(self.acc.dtype))
        return wide.to(torch.float32), True

    def int64(self) -> Tensor:
        """The accumulator, times its coefficient codes."""
        acc = self.acc.detach().long()
        return acc if self.coefficient is None else per_head(torch.mul, acc, self.coefficient.long())


def per_head(operation: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """operation(x, y) where y may have a multiple of x's heads: consecutive heads of y share one of x."""
    if has_torch_function((x, y)):  # as in `hadamard`
        result: Tensor = handle_torch_function(per_head, (x, y), operation, x, y)
        return result
    if x.dim() < 3 or y.dim() < 3 or x.shape[-3] in (1, y.shape[-3]) or y.shape[-3] == 1:
        return operation(x, y)
    grouped = y.unflatten(-3, (x.shape[-3], -1))
    return operation(x.unsqueeze(-3), grouped).flatten(-4, -3)


def multipliers(scales: Sequence[Tensor], out_scale: Tensor | None, sign: int) -> list[Tensor]:
    """float32(float64(s_a) * s_b / s_out): one factor, or two (row, column) where rows and columns both vary."""
    factors = [(s.double(), False) for s in scales] + ([] if out_scale is None else [(out_scale.double(), True)])
    columns = [f for f in factors if f[0].shape[-1] > 1]
    rows = [f for f in factors if f[0].shape[-1] == 1]
    groups = [rows, columns] if columns and any(f[0].shape[-2] > 1 for f in rows) else [rows + columns]
    result = []
    for i, group in enumerate(groups):
        value: Tensor | None = None
        for factor, inverse in group:
            if value is None:
                value = factor.reciprocal() if inverse else factor
            else:
                value = value / factor if inverse else value * factor
        if value is not None:
            result.append(((value * sign) if i == 0 else value).to(torch.float32))
    return result


def part_of_scale(scale: Tensor | None, term: Term) -> Tensor | None:
    """The part of an output scale that belongs to what a term covers."""
    region, blocks = term.region, term.blocks
    if scale is None:
        return None
    if blocks is not None:
        if scale.shape[-2] > 1:
            return scale.unflatten(-2, (-1, blocks))
        return scale.unflatten(-1, (-1, blocks)).transpose(-3, -2) if scale.shape[-1] > 1 else scale.unsqueeze(-3)
    if region is None:
        return scale
    rows, columns = region
    scale = scale[..., rows, :] if scale.shape[-2] > 1 else scale
    return scale[..., columns] if scale.shape[-1] > 1 else scale


def place(x: Tensor, term: Term) -> Tensor:
    """The view of an output that a term covers, of the term's own shape."""
    if term.blocks is not None:
        split = x.unflatten(-1, (-1, term.blocks)).unflatten(-3, (-1, term.blocks))
        return split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return x if term.region is None else x[..., term.region[0], term.region[1]]


@dataclass
class Piece:
    """A sum of neighbouring terms that cover the same part of the output; term: the first of them."""

    term: Term
    value: Tensor


def scaled_pieces(terms: Sequence[Term], out_scale: Tensor | None = None) -> list[Piece]:
    """r = f32(acc_0) * m_0, then r = r + f32(acc_t) * m_t in order, each operation rounded to float32.

    One piece for each part of the output; where parts overlap, their sum in order is the result (`assemble`).
    """
    assert terms, "a requantization needs at least one term"
    pieces: list[Piece] = []
    for term in terms:
        value = _scaled(term, out_scale)
        # only to the first: what comes between would be added in another order
        if len(pieces) == 1 and (pieces[0].term.region, pieces[0].term.blocks) == (term.region, term.blocks):
            pieces[0].value = pieces[0].value.add_(value)
        else:
            pieces.append(Piece(term, value))
    return pieces


def are_disjoint(pieces: Sequence[Piece]) -> bool:
    """Whether no element of the output lies in two pieces: one piece, or diagonal blocks and what joins two of them."""
    if len(pieces) == 1:
        return True
    if len(pieces) > 2:
        return False
    blocks = next((p.term.blocks for p in pieces if p.term.blocks is not None), None)
    region = next((p.term.region for p in pieces if p.term.region is not None), None)
    return blocks is not None and region == (slice(blocks, 2 * blocks), slice(0, blocks))


def assemble(pieces: Sequence[Piece], shape: Sequence[int] | None, disjoint: bool) -> Tensor:
    """The whole output: zero where no piece lies, the sum in order where several do."""
    first = pieces[0]
    if len(pieces) == 1 and first.term.region is None and first.term.blocks is None:
        return first.value
    assert shape is not None
    total = first.value.new_zeros(*shape)
    for piece in pieces:
        view = place(total, piece.term)
        view.copy_(piece.value) if disjoint else view.add_(piece.value)
    return total


def scaled_sum(terms: Sequence[Term], out_scale: Tensor | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """`scaled_pieces`, put together. shape: of the output; needed only where terms cover parts of it.

    Returns float32 [..., R, C], never a tensor of the caller's.
    """
    pieces = scaled_pieces(terms, out_scale)
    return assemble(pieces, shape, are_disjoint(pieces))


def _fits(factor: Tensor, value: Tensor) -> bool:
    """Whether a product with the factor has value's shape."""
    pairs = zip(reversed(factor.shape), reversed(value.shape), strict=False)
    return factor.dim() <= value.dim() and all(f in (1, v) for f, v in pairs)


def _scaled(term: Term, out_scale: Tensor | None) -> Tensor:
    """f32(acc) * m as a new tensor."""
    value, new = term.float32()
    factors = multipliers(term.scales, part_of_scale(out_scale, term), term.sign)
    if not factors and term.sign < 0:
        factors = [torch.full((), -1.0, device=value.device)]
    for factor in factors:
        fits = new and _fits(factor, value)
        value = value.mul_(factor) if fits else per_head(torch.mul, value, factor)
        new = True
    return value if new else value.clone()

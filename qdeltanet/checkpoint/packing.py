"""Codes of a few bits in 32-bit words, as compressed-tensors packs them."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [out, in] -> int32 [out, ceil(in bits / 32)]: code + 2^(bits-1), the first in the lowest bits.

    bits divides 32. Rows are filled up with zero bits.
    """
    per_word = WORD // bits
    padding = -codes.shape[1] % per_word
    unsigned = torch.nn.functional.pad(codes.to(torch.int64) + (1 << (bits - 1)), (0, padding))
    shifts = torch.arange(0, WORD, bits)
    words = (unsigned.view(len(codes), -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int8 [out, columns]."""
    fields = words.to(torch.int64)[..., None] >> torch.arange(0, WORD, bits)
    codes = (fields & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.flatten(1)[:, :columns].to(torch.int8).contiguous()

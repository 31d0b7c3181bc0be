"""Decay in integers: 2^x for x <= 0 from an int32 log2 in Q16 and a table, the same bits on every machine.

exp differs between devices, and between the vector body and the scalar tail of one tensor. A kernel that makes decay
itself uses this instead: additions, one table of 257 int32 entries, shifts.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LOG2_BITS = 16  # fractional bits of the log2 decay
VALUE_BITS = 22  # fractional bits of the result: exact in float32, as fine as the finest coefficient codes
TABLE_BITS = 8
ONE_BITS = 30  # fractional bits of the table
FLOOR = -(64 << LOG2_BITS)  # below it every result is 0


@lru_cache(maxsize=8)
def exp2_table(device: torch.device) -> Tensor:
    """int64 [257]: round(2^(j / 256) * 2^30) for j = 0..256, made with Python's floats, which are IEEE doubles."""
    entries = [round(math.ldexp(2.0 ** (j / 2**TABLE_BITS), ONE_BITS)) for j in range(2**TABLE_BITS + 1)]
    return torch.tensor(entries, dtype=torch.int64, device=device)


def log2_decay(log_decay: Tensor) -> Tensor:
    """Natural log decay (float32, <= 0) to int32 log2 decay in Q16, rounded half to even and floored at -64.

    A cumulative decay is made by one conversion of its float32 sum, so that errors do not add up over a chunk.
    """
    scaled = torch.round(log_decay.double() * (2**LOG2_BITS / math.log(2)))
    return scaled.clamp(FLOOR, 0).to(torch.int32)


def exp2(x: Tensor) -> Tensor:
    """2^(x / 2^16) * 2^22 as int32 whole numbers, for int32 x <= 0 in Q16.

    With x = 2^16 e + f: the table at the top 8 bits of f, linear interpolation with the low 8 bits (truncated), then a
    shift by 8 - e that rounds half up. Absolute error below 1.4e-6 (interpolation .9e-6, rounding half of 2^-22 and of
    the table's last bit).

    >>> exp2(torch.tensor([0, -65536, -32768], dtype=torch.int32)).tolist()
    [4194304, 2097152, 2965821]
    """
    x = x.long()
    whole, fraction = x >> LOG2_BITS, x & (2**LOG2_BITS - 1)
    low_bits = LOG2_BITS - TABLE_BITS
    index, low = fraction >> low_bits, fraction & (2**low_bits - 1)
    table = exp2_table(x.device)
    left = table[index]
    mantissa = left + (((table[index + 1] - left) * low) >> low_bits)
    shift = (ONE_BITS - VALUE_BITS - whole).clamp(max=62)
    return ((mantissa + (torch.ones_like(shift) << (shift - 1))) >> shift).to(torch.int32)


def difference_decay(x: Tensor) -> Tensor:
    """2^(x / 2^16) as float32 for int32 x <= 0 in Q16, e.g. a difference of two cumulative log2 decays."""
    return exp2(x).to(torch.float32) * 2.0**-VALUE_BITS

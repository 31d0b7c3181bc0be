"""The Hadamard rotation of the last axis: additions in a fixed order and one factor, the same bits on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .errors import QDeltaNetError


def is_rotatable(width: int) -> bool:
    """Sylvester's matrices exist for powers of two."""
    return width > 0 and width & (width - 1) == 0


def hadamard(x: Tensor) -> Tensor:
    """x @ H / sqrt(d) over the last axis [..., d], H the Sylvester matrix H_2d = [[H_d, H_d], [H_d, -H_d]].

    Symmetric and orthogonal, so it undoes itself. log2 d stages of additions (the fast Walsh-Hadamard transform) in a
    fixed order instead of a product, whose rounding would depend on the device and on the number of rows.

    >>> hadamard(torch.tensor([3.0, 1.0, 1.0, 1.0]))
    tensor([3., 1., 1., 1.])

    Raises QDeltaNetError if d is no power of two.
    """
    if has_torch_function_unary(x):  # a stand-in that writes a graph has its own form of this
        rotated: Tensor = handle_torch_function(hadamard, (x,), x)
        return rotated
    width = x.shape[-1]
    if not is_rotatable(width):
        raise QDeltaNetError(f"a Hadamard rotation needs a power of two, not {width}")
    half = 1
    while half < width:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x * width**-0.5


def rotate_state(state: Tensor, rotate: frozenset[str]) -> Tensor:
    """A state [..., K, V] between the caller's basis and the rotated one, either way: keys on K, values on V."""
    if "v" in rotate:
        state = hadamard(state)
    return hadamard(state.mT).mT if "qk" in rotate else state

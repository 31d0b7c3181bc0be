"""Granularity: which axes of a tensor a scale keeps.

Tensors of the rule are [..., H, R, C]: any leading axes (chunks, batch), heads, rows (tokens, or key channels for
the state) and columns (channels, or tokens of the right side for a [C, C] matrix). A *compact* register of the inverse
holds only its blocks on the diagonal: [..., H, n, b, b].
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

# Below this a tensor counts as zero: scale = max(amax, TINY) / qmax.
TINY = 2.0**-100


class Granularity(str, Enum):
    """Axes a scale keeps. A static scale is [H or 1, R or 1, C or 1]; a dynamic one has the leading axes before it.

    | value | static shape | dynamic shape |
    |---|---|---|
    | per_tensor | [1, 1, 1] | [..., 1, 1, 1] |
    | per_head | [H, 1, 1] | [..., H, 1, 1] |
    | per_token | [H, R, 1] | [..., H, R, 1] |
    | per_channel | [H, 1, C] | [..., H, 1, C] |

    `finest` is the axis that the product at hand does not contract: per_token for a left operand, per_channel for a
    right one. It is resolved to one of the others when a rule is bound.
    """

    PER_TENSOR = "per_tensor"
    PER_HEAD = "per_head"
    PER_TOKEN = "per_token"
    PER_CHANNEL = "per_channel"
    FINEST = "finest"


def reduced_dims(granularity: Granularity, compact: bool = False) -> tuple[int, ...]:
    """Axes over which the maximum of one scale is taken, leading axes excepted."""
    if granularity is Granularity.PER_TOKEN:
        return (-1,)
    if granularity is Granularity.PER_CHANNEL:
        return (-2,)
    matrix = (-1, -2, -3) if compact else (-1, -2)
    if granularity is Granularity.PER_HEAD:
        return matrix
    if granularity is Granularity.PER_TENSOR:
        return (*matrix, -4 if compact else -3)
    raise ValueError("finest must be resolved to an axis first")


def dynamic_scale(x: Tensor, qmax: int, granularity: Granularity, compact: bool = False) -> Tensor:
    """max(amax, 2^-100) / qmax in float32, leading axes (chunk, batch) kept, so no result depends on its batch."""
    amax = x.detach().abs().amax(dim=reduced_dims(granularity, compact), keepdim=True)
    # by a tensor: a GPU would multiply by the reciprocal of a Python number
    return amax.to(torch.float32).clamp(min=TINY) / torch.full((), float(qmax), device=x.device)


def fit_scale(scale: Tensor, shape: Sequence[int], compact: bool = False) -> Tensor:
    """A static scale [H or 1, R or 1, C or 1] made to broadcast against a tensor of `shape`.

    A decode step has one row where the calibrated chunk had many: its scale is the largest of them.
    """
    rows, columns = shape[-2:]
    if compact:
        rows = columns = rows * shape[-3]
    for axis, size in ((-2, rows), (-1, columns)):
        if scale.shape[axis] not in (1, size):
            scale = scale.amax(axis, keepdim=True)
    if not compact:
        return scale
    if scale.shape[-2] > 1:
        return scale.unflatten(-2, (shape[-3], -1))
    if scale.shape[-1] > 1:
        return scale.unflatten(-1, (shape[-3], -1)).transpose(-3, -2)
    return scale.unsqueeze(-3)


def grouped(x: Tensor, granularity: Granularity, compact: bool = False) -> Tensor:
    """Rearrange so that an observer's min-max is one amax over the first and last axis.

    [..., H, R, C] -> [observations, h, r, c, group] where [h, r, c] is the shape of the static scale.
    """
    if compact and granularity in (Granularity.PER_TOKEN, Granularity.PER_CHANNEL):
        if granularity is Granularity.PER_CHANNEL:
            x = x.transpose(-1, -2)
        x = x.flatten(-3, -2)  # [..., H, C, b]: what lies outside of the blocks is zero and needs no place
        x = x.flatten(0, -4) if x.dim() > 3 else x.unsqueeze(0)
        return x.unsqueeze(-2) if granularity is Granularity.PER_TOKEN else x.unsqueeze(-3)
    if compact:
        x = x.flatten(-3, -2)
    x = x.flatten(0, -4) if x.dim() > 3 else x.unsqueeze(0)
    if granularity is Granularity.PER_TENSOR:
        return x.flatten(1)[:, None, None, None, :]
    if granularity is Granularity.PER_HEAD:
        return x.flatten(2)[:, :, None, None, :]
    if granularity is Granularity.PER_TOKEN:
        return x.unsqueeze(-2)
    if granularity is Granularity.PER_CHANNEL:
        return x.transpose(-1, -2).unsqueeze(-3)
    raise ValueError("finest must be resolved to an axis first")

"""The state of a layer in a cache: one tensor of bytes for codes, their scale and the residual."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import TINY, Granularity, IntFormat, Operand, SiteScheme


def pack_state(state: Operand) -> Tensor:
    """A state [B, H, K, V] for a cache that holds one tensor per layer, batch first.

    Codes as int8 (int16 where codes or residual have more than 8 bits) [B, H, K + R + K', V]: the codes, the bits of
    their float32 scale as R = 4 (or 2) rows, then with error feedback the K' = K rows of residual codes. A state in
    INT8 takes a quarter of a float32 one. Real-valued states are stored as they are. Either stays in the basis in which
    the rule holds it: codes of a rotated state cannot be turned back without rounding them again, and every reader of
    a cache runs the same scheme.
    """
    if state.scale is None:
        return state.codes
    residual = state.residual
    dtype = _container(state.format, None if residual is None else residual.format)
    batch, heads, _, width = state.codes.shape
    scale = state.scale.detach().to(torch.float32).expand(batch, heads, 1, width).contiguous()
    rows = [state.codes.to(dtype), scale.view(dtype).view(batch, heads, -1, width)]
    return torch.cat(rows if residual is None else [*rows, residual.codes.to(dtype)], dim=-2)


def unpack_state(packed: Tensor, scheme: SiteScheme) -> Operand:
    """The inverse of pack_state; a zeroed cache gives a zero state.

    The scale comes back with the axes it had, so that further steps round as if there had been no cache.
    """
    count = 4 // packed.element_size()
    keys = (packed.shape[-2] - count) // (1 if scheme.feedback is None else 2)
    codes, bits, left = packed.split([keys, count, packed.shape[-2] - keys - count], dim=-2)
    scale = bits.flatten(-2).contiguous().view(torch.float32).unsqueeze(-2).clamp(min=TINY)
    if scheme.held_granularity is not Granularity.PER_CHANNEL:
        scale = scale[..., :1]
    state = Operand("state", codes.to(torch.float32), scale, scheme.held)
    return state if scheme.feedback is None else state.with_residual(left.to(torch.float32), scheme.feedback)


def _container(*formats: IntFormat | None) -> torch.dtype:
    return torch.int16 if max(f.bits for f in formats if f is not None) > 8 else torch.int8

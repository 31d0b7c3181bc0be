"""The token-by-token reference: slow, obviously right, float only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError
from .front import check_inputs, l2norm


def recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """S <- exp(g) S; S <- S + k beta (v - k^T S)^T; o = q^T S, one token after the other.

    Arguments, shapes and errors as `chunk_gated_delta_rule`, without chunk_size, arithmetic and plan. Computes in
    float32, or in float64 where the query is float64.
    """
    if kwargs.get("cu_seqlens") is not None:
        raise QDeltaNetError("cu_seqlens: packed sequences are not supported; pad them and pass an attention mask")
    check_inputs(query, key, value, g, beta)
    dtype = torch.promote_types(torch.float32, query.dtype)
    q, k, v, decay, write = (x.to(dtype) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    group = value.shape[2] // key.shape[2]
    q, k = q.repeat_interleave(group, dim=2) * q.shape[-1] ** -0.5, k.repeat_interleave(group, dim=2)
    batch, _, heads, value_dim = v.shape
    state = v.new_zeros(batch, heads, k.shape[-1], value_dim) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        predicted = (state * k[:, t, :, :, None]).sum(-2)
        delta = (v[:, t] - predicted) * write[:, t, :, None]
        state = state + k[:, t, :, :, None] * delta[:, :, None, :]
        outputs.append((state * q[:, t, :, :, None]).sum(-2))
    output = torch.stack(outputs, dim=1).to(query.dtype)
    return output, state if output_final_state else None

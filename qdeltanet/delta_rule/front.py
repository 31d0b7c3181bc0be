"""The float32 front end of the chunkwise rule: normalisation, padding, decay. It runs in torch, once, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Decay, QDeltaNetError, difference_decay, hadamard, log2_decay, per_head


@dataclass(frozen=True)
class Front:
    """Chunked float32 inputs; N chunks, B sequences, HK key heads, H value heads, C tokens.

    q, k: [N, B, HK, C, K]; v_beta: [N, B, H, C, V]; k_beta, q_decay, k_decay: [N, B, H, C, K];
    write_decay (beta_i D_ij below the diagonal), pairwise_decay: [N, B, H, C, C]; chunk_decay: [N, B, H, 1, 1].
    rotate: what is in the rotated basis (`RuleScheme.rotate`), and the state with it; the output's is undone.
    """

    q: Tensor
    k: Tensor
    v_beta: Tensor
    k_beta: Tensor
    q_decay: Tensor
    k_decay: Tensor
    write_decay: Tensor
    pairwise_decay: Tensor
    chunk_decay: Tensor
    rotate: frozenset[str] = frozenset()

    def to(self, device: torch.device | str) -> Front:
        """The same numbers on another device: what floats were made here is not made again there."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "rotate"}
        return Front(**tensors, rotate=self.rotate)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis, as flash-linear-attention and transformers do."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps)


def check_inputs(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> None:
    """Raise QDeltaNetError that names the argument whose shape does not fit."""
    if query.dim() != 4 or key.shape != query.shape:
        raise QDeltaNetError(f"query {list(query.shape)} and key {list(key.shape)}: both must be [B, T, HK, K]")
    batch, tokens, key_heads, _ = key.shape
    if value.dim() != 4 or value.shape[:2] != (batch, tokens):
        raise QDeltaNetError(f"value {list(value.shape)}: must be [B, T, H, V] with B, T = {batch}, {tokens}")
    for name, x in (("query", query), ("key", key), ("value", value), ("g", g), ("beta", beta)):
        if not x.is_floating_point():
            raise QDeltaNetError(f"{name} is {x.dtype}: must be floating point")
        if x.device != query.device:
            raise QDeltaNetError(f"{name} is on {x.device}, query on {query.device}: move them to one device")
    heads = value.shape[2]
    if heads % key_heads:
        raise QDeltaNetError(f"{heads} value heads are no multiple of {key_heads} key heads")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (batch, tokens, heads):
            raise QDeltaNetError(f"{name} {list(x.shape)}: must be [B, T, H] = {[batch, tokens, heads]}")


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int,
    normalise: bool,
    decay: Decay = "exp",
    rotate: frozenset[str] = frozenset(),
) -> Front:
    """Everything float that depends on one chunk only. Arguments as `chunk_gated_delta_rule`.

    decay: `exp` in float32, or `exp2`, core's integer one on int32 log2 decay. rotate: q and k after normalisation (A
    and attn are products of two of them and stay what they are), v before beta. Raises QDeltaNetError for a width that
    cannot be rotated.
    """
    if normalise:
        query, key = l2norm(query.float()), l2norm(key.float())
    q = _chunked(query, chunk_size) * query.shape[-1] ** -0.5
    k = _chunked(key, chunk_size)
    v = _chunked(value, chunk_size)
    q, k = (hadamard(q), hadamard(k)) if "qk" in rotate else (q, k)
    v = hadamard(v) if "v" in rotate else v
    beta_ = _chunked(beta.unsqueeze(-1), chunk_size)
    cum_decay = _chunked(g.unsqueeze(-1), chunk_size).cumsum(dim=-2)  # [N, B, H, C, 1]
    exp: Callable[[Tensor], Tensor] = torch.exp
    if decay == "exp2":
        cum_decay, exp = log2_decay(cum_decay), difference_decay
    # The mask comes after exp: above the diagonal differences are positive and would overflow, so zero them first.
    pairwise_decay = exp((cum_decay - cum_decay.mT).tril_()).tril()
    last = cum_decay[..., -1:, :]
    from_start = exp(cum_decay)
    return Front(
        q=q,
        k=k,
        v_beta=v * beta_,
        k_beta=per_head(torch.mul, k, beta_ * from_start),
        q_decay=per_head(torch.mul, q, from_start),
        k_decay=per_head(torch.mul, k, exp(last - cum_decay)),
        write_decay=(pairwise_decay * beta_).tril(-1),
        pairwise_decay=pairwise_decay,
        chunk_decay=exp(last),
        rotate=rotate,
    )


def _chunked(x: Tensor, chunk_size: int) -> Tensor:
    """[B, T, H, D] -> float32 [N, B, H, C, D], zero-padded to whole chunks."""
    batch, tokens, heads, width = x.shape
    x = F.pad(x.to(torch.float32), (0, 0, 0, 0, 0, -tokens % chunk_size))
    return x.view(batch, -1, chunk_size, heads, width).permute(1, 0, 3, 2, 4).contiguous()

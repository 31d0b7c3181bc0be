"""The chunkwise gated delta rule, written once over an `Arithmetic`. Decode is the same with chunks of one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Arithmetic, FloatArithmetic, Operand, QDeltaNetError, Term
from ..inverse import Plan, run_plan
from ..inverse import plan as make_plan
from .front import Front, check_inputs, prepare


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    arithmetic: Arithmetic | None = None,
    plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet over chunks; drops in for transformers' `torch_chunk_gated_delta_rule`.

    Args:
        query, key: [B, T, HK, K]. value: [B, T, H, V], H a multiple of HK (consecutive value heads share a key head).
        g: log decay <= 0, [B, T, H]. beta: write strength, [B, T, H].
        chunk_size: tokens per triangular system; 1 is the decode step.
        initial_state: [B, H, K, V] or None for zeros.
        use_qk_l2norm_in_kernel: L2-normalise query and key in float32 first.
        arithmetic: FloatArithmetic (default) or an IntegerArithmetic bound to scales.
        plan: the inverse's plan for this chunk size (default block_merge).
        kwargs: what transformers passes along; a `cu_seqlens` that is not None is refused.

    Returns: output [B, T, H, V] in query's dtype, and the final state float32 [B, H, K, V] or None.

    Raises: QDeltaNetError for shapes that do not fit, packed sequences, or a plan of another chunk size.
    """
    if kwargs.get("cu_seqlens") is not None:
        raise QDeltaNetError("cu_seqlens: packed sequences are not supported; pad them and pass an attention mask")
    arithmetic = arithmetic or FloatArithmetic()
    plan = plan or make_plan("block_merge", chunk_size)
    state = None if initial_state is None else arithmetic.quantize("state", initial_state.to(torch.float32))
    inputs = (query, key, value, g, beta)
    output, final = run_rule(
        *inputs, state, arithmetic=arithmetic, plan=plan, normalise=use_qk_l2norm_in_kernel, chunk_size=chunk_size
    )
    return output.to(query.dtype), final.real() if output_final_state else None


def run_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Operand | None,
    *,
    arithmetic: Arithmetic,
    plan: Plan,
    normalise: bool,
    chunk_size: int,
) -> tuple[Tensor, Operand]:
    """As `chunk_gated_delta_rule`, with the state as an operand, so that codes are carried from call to call.

    Returns float32 output [B, T, H, V] and the state operand [B, H, K, V].
    """
    check_inputs(query, key, value, g, beta)
    if plan.chunk_size != chunk_size:
        raise QDeltaNetError(f"the plan is for chunk size {plan.chunk_size}, the rule runs chunks of {chunk_size}")
    batch, tokens, heads, value_dim = value.shape
    front = prepare(query, key, value, g, beta, chunk_size, normalise)
    if state is None:
        state = arithmetic.quantize(
            "state", value.new_zeros(batch, heads, key.shape[-1], value_dim, dtype=torch.float32)
        )
    output, state = _scan(front, state, arithmetic, plan)
    output = output.permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, value_dim)  # [N, B, H, C, V] -> [B, T, H, V]
    return output[:, :tokens], state


def _scan(front: Front, state: Operand, ar: Arithmetic, plan: Plan) -> tuple[Tensor, Operand]:
    """First what every chunk can do at once, then the walk over chunks that carries the state."""
    q, k = ar.quantize("q", front.q), ar.quantize("k", front.k)
    A = ar.store("A", [ar.product(k, k.mT, coefficient=front.write_decay, sign=-1)])
    attn = ar.store("attn", [ar.product(q, k.mT, coefficient=front.pairwise_decay)])
    T = run_plan(plan, A, ar)
    v_beta, k_beta = ar.quantize("v_beta", front.v_beta), ar.quantize("k_beta", front.k_beta)
    w = ar.store("w", _transformed(T, k_beta, ar))
    u = _transformed(T, v_beta, ar)  # never stored: its accumulators are addends of v_new
    q_decay, k_decay = ar.quantize("q_decay", front.q_decay), ar.quantize("k_decay", front.k_decay)

    outputs = []
    for n in range(front.q.shape[0]):
        v_new = ar.store("v_new", [ar.product(w[n], state, sign=-1), *(term[n] for term in u)])
        outputs.append(ar.read([ar.product(q_decay[n], state), ar.product(attn[n], v_new)]))
        carried = ar.addend(state, coefficient=front.chunk_decay[n])
        state = ar.store("state", [ar.product(k_decay[n].mT, v_new), carried])
    return torch.stack(outputs), state


def _transformed(T: Operand | None, x: Operand, ar: Arithmetic) -> list[Term]:
    """Terms of (I + T) x: the diagonal is implicit."""
    return [ar.addend(x)] if T is None else [ar.product(T, x), ar.addend(x)]

"""The chunkwise gated delta rule, written once over an `Arithmetic`. Decode is the same with chunks of one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Arithmetic, FloatArithmetic, Operand, QDeltaNetError, Term, check_codes, hadamard, rotate_state
from ..inverse import Plan, run_steps
from ..inverse import plan as make_plan
from .front import Front, check_inputs, prepare

# Elements of one [B, H, C, D] tensor of a block on the CPU, and on an accelerator.
BLOCK_ELEMENTS = (2**20, 2**27)


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
        initial_state: [B, H, K, V] or None for zeros; it and the final state are never in a rotated basis.
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
    state = None
    if initial_state is not None:
        state = arithmetic.quantize("state", rotate_state(initial_state.to(torch.float32), arithmetic.rotate))
    inputs = (query, key, value, g, beta)
    output, final = run_rule(
        *inputs, state, arithmetic=arithmetic, plan=plan, normalise=use_qk_l2norm_in_kernel, chunk_size=chunk_size
    )
    return output.to(query.dtype), rotate_state(final.real(), arithmetic.rotate) if output_final_state else None


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
    chunk_block: int | None = None,
) -> tuple[Tensor, Operand]:
    """As `chunk_gated_delta_rule`, with the state as an operand, so that codes are carried from call to call.

    chunk_block: chunks handled at once. It bounds the memory of a call beside its inputs and its output, and changes
    no result; None chooses.

    Returns float32 output [B, T, H, V] and the state operand [B, H, K, V]. Where the arithmetic rotates, the operand
    is in the rotated basis, and a state given must be.
    """
    check_inputs(query, key, value, g, beta)
    if plan.chunk_size != chunk_size:
        raise QDeltaNetError(f"the plan is for chunk size {plan.chunk_size}, the rule runs chunks of {chunk_size}")
    batch, tokens, heads, value_dim = value.shape
    if state is None:
        state = arithmetic.quantize(
            "state", value.new_zeros(batch, heads, key.shape[-1], value_dim, dtype=torch.float32)
        )
    else:
        check_codes(state)
    size = chunk_size * (chunk_block or default_chunk_block(value, key, chunk_size))
    output = value.new_empty(batch, -(-tokens // chunk_size), chunk_size, heads, value_dim, dtype=torch.float32)
    for start in range(0, tokens, size):
        stop = start + size
        q, k, v, decay, write = (x[:, start:stop] for x in (query, key, value, g, beta))
        front = prepare(q, k, v, decay, write, chunk_size, normalise, arithmetic.decay, arithmetic.rotate)
        state = _scan(front, state, arithmetic, plan, output[:, start // chunk_size :])
    return output.flatten(1, 2)[:, :tokens], state


def default_chunk_block(value: Tensor, key: Tensor, chunk_size: int) -> int:
    """Chunks handled at once: as many as keep a block's tensors within a CPU's cache, or fill an accelerator."""
    batch, _, heads, value_dim = value.shape
    elements = batch * heads * chunk_size * max(key.shape[-1], value_dim)
    return max(1, BLOCK_ELEMENTS[value.device.type != "cpu"] // elements)


def run_front(front: Front, arithmetic: Arithmetic, plan: Plan) -> tuple[Tensor, Operand]:
    """The rule from a front end on, over its chunks and from a zero state; everything on the front's device.

    Returns float32 output [B, N * C, H, V] and the state operand [B, H, K, V].
    """
    chunks, batch, heads, tokens, value_dim = front.v_beta.shape
    zeros = front.v_beta.new_zeros(batch, heads, front.k_decay.shape[-1], value_dim)
    output = front.v_beta.new_empty(batch, chunks, tokens, heads, value_dim)
    state = _scan(front, arithmetic.quantize("state", zeros), arithmetic, plan, output)
    return output.flatten(1, 2), state


def _scan(front: Front, state: Operand, ar: Arithmetic, plan: Plan, output: Tensor) -> Operand:
    """First what every chunk of the block can do at once, then the walk over chunks that carries the state.

    output: [B, N or more, C, H, V], written chunk by chunk.
    """
    q, k = ar.quantize("q", front.q), ar.quantize("k", front.k)
    T = _inverse(k, front.write_decay, ar, plan)
    attn = ar.store("attn", [ar.product(q, k.mT, coefficient=front.pairwise_decay)])
    v_beta, k_beta = ar.quantize("v_beta", front.v_beta), ar.quantize("k_beta", front.k_beta)
    u, w = _transform(T, v_beta, k_beta, ar)
    q_decay, k_decay = ar.quantize("q_decay", front.q_decay), ar.quantize("k_decay", front.k_decay)

    for n in range(front.q.shape[0]):
        v_new = ar.store("v_new", [ar.product(w[n], state, sign=-1), *(term[n] for term in u)])
        o = ar.read([ar.product(q_decay[n], state), ar.product(attn[n], v_new)])
        output[:, n] = (hadamard(o) if "v" in front.rotate else o).transpose(1, 2)
        carried = (ar.addend(x, coefficient=front.chunk_decay[n]) for x in state.parts)
        state = ar.store("state", [ar.product(k_decay[n].mT, v_new), *carried])
    return state


def _inverse(k: Operand, write_decay: Tensor, ar: Arithmetic, plan: Plan) -> Operand | None:
    """T - I, from A = -tril(diag(beta) (k k^T) * D, -1); None for T = I."""
    fused: Operand | None = ar.fused("front", plan, k, write_decay) if plan.steps else None
    if fused is not None:
        return fused
    return run_steps(plan, ar.store("A", [ar.product(k, k.mT, coefficient=write_decay, sign=-1)]), ar)


def _transform(T: Operand | None, v_beta: Operand, k_beta: Operand, ar: Arithmetic) -> tuple[list[Term], Operand]:
    """u = T (beta v) as terms (never stored: its accumulators are addends of v_new), and w = T (beta exp(c) k)."""
    fused: tuple[list[Term], Operand] | None = None if T is None else ar.fused("back", T, v_beta, k_beta)
    if fused is not None:
        return fused
    return _transformed(T, v_beta, ar), ar.store("w", _transformed(T, k_beta, ar))


def _transformed(T: Operand | None, x: Operand, ar: Arithmetic) -> list[Term]:
    """Terms of (I + T) x: the diagonal is implicit."""
    return [ar.addend(x)] if T is None else [ar.product(T, x), ar.addend(x)]

"""The float rule against transformers, against the token-by-token recurrence, and against its own other chunk sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Inputs, rule_inputs
from torch import Tensor

from qdeltanet.core import QDeltaNetError
from qdeltanet.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from qdeltanet.inverse import METHODS, plan

LENGTHS = (1, 63, 64, 65, 1000)


def theirs() -> Callable[..., tuple[Tensor, Tensor]]:
    """transformers' torch function, whatever kernels the hub or fla put before it."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    function: Any = modeling_qwen3_5.torch_chunk_gated_delta_rule
    return getattr(function, "__wrapped__", function)


def state_for(inputs: Inputs, seed: int = 7) -> Tensor:
    batch, _, heads, value_dim = inputs[2].shape
    make = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(batch, heads, inputs[1].shape[-1], value_dim, generator=make)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("key_heads", "heads"), [(2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_transformers(tokens: int, key_heads: int, heads: int, with_state: bool) -> None:
    inputs = rule_inputs(2, tokens, key_heads, heads, 32, 16, seed=tokens)
    options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    options["initial_state"] = state_for(inputs) if with_state else None
    expected, expected_state = theirs()(*inputs, **options)
    for function in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        output, state = function(*inputs, **options)
        assert output.dtype is expected.dtype
        assert output.shape == expected.shape
        assert apart(output, expected) < 1e-5
        assert state is not None
        assert apart(state, expected_state) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 65, 200])
def test_every_chunk_size_gives_the_same(chunk_size: int, tokens: int) -> None:
    inputs = rule_inputs(2, tokens, 2, 4, 16, 8)
    state = state_for(inputs)
    options: dict[str, Any] = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, expected_state = recurrent_gated_delta_rule(*inputs, **options)
    output, final = chunk_gated_delta_rule(*inputs, chunk_size=chunk_size, **options)
    assert apart(output, expected) < 1e-5
    assert final is not None
    assert expected_state is not None
    assert apart(final, expected_state) < 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if m != "identity"])
def test_decode_is_the_rule_with_chunks_of_one_token(method: str) -> None:
    inputs = rule_inputs(2, 1, 2, 4, 16, 8)
    state = state_for(inputs)
    expected, _ = recurrent_gated_delta_rule(*inputs, initial_state=state)
    output, _ = chunk_gated_delta_rule(*inputs, chunk_size=1, initial_state=state, plan=plan(method, 1))
    assert apart(output, expected) < 1e-6


def test_the_inverse_is_felt() -> None:
    inputs = rule_inputs(2, 128, 2, 4, 16, 8, decay=0.01)
    expected, _ = chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)
    broken, _ = chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True, plan=plan("identity", 64))
    assert apart(broken, expected) > 0.01


def test_prefill_then_decode_equals_the_whole() -> None:
    inputs = rule_inputs(2, 100, 2, 4, 16, 8)
    expected, final = chunk_gated_delta_rule(*inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)
    outputs, state = [], None
    for start, stop, chunk_size in [(0, 70, 64), *((t, t + 1, 1) for t in range(70, 80)), (80, 100, 16)]:
        part = [x[:, start:stop] for x in inputs]
        output, state = chunk_gated_delta_rule(
            *part, chunk_size=chunk_size, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        outputs.append(output)
    assert apart(torch.cat(outputs, dim=1), expected) < 1e-5
    assert final is not None
    assert apart(state, final) < 1e-5


@pytest.mark.parametrize("decay", [166.0, 1000.0])
def test_hard_decay_gives_numbers(decay: float) -> None:
    inputs = list(rule_inputs(1, 130, 1, 2, 16, 8))
    inputs[3] = torch.full_like(inputs[3], -decay)
    inputs[3][..., 1] = torch.where(torch.arange(130) % 3 == 0, -decay, -1e-4)
    options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    output, state = chunk_gated_delta_rule(*inputs, **options)
    assert output.isfinite().all()
    assert state is not None
    assert state.isfinite().all()
    # float32 resolves a cumulative decay of 166 * 64 / 3 in steps of 2^-12: less near to the recurrence
    for function, tolerance in ((theirs(), 1e-5), (recurrent_gated_delta_rule, 1e-3)):
        expected, expected_state = function(*inputs, **options)
        assert apart(output, expected) < tolerance
        assert apart(state, expected_state) < tolerance


def test_half_precision_comes_back_as_it_went_in() -> None:
    inputs = tuple(x.bfloat16() for x in rule_inputs(1, 40))
    output, state = chunk_gated_delta_rule(*inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert output.dtype is torch.bfloat16
    assert state is not None
    assert state.dtype is torch.float32
    assert chunk_gated_delta_rule(*inputs)[1] is None


def test_packed_sequences_are_refused() -> None:
    inputs = rule_inputs(1, 16)
    assert chunk_gated_delta_rule(*inputs, chunk_size=16, cu_seqlens=None)[0].isfinite().all()
    for function in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        with pytest.raises(QDeltaNetError, match="cu_seqlens: packed sequences are not supported"):
            function(*inputs, cu_seqlens=torch.tensor([0, 8, 16]))


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 16, 8), r"query \[2, 16, 8\] and key \[2, 16, 2, 8\]: both must be \[B, T, HK, K\]"),
        (1, (2, 16, 2, 4), r"query \[2, 16, 2, 8\] and key \[2, 16, 2, 4\]"),
        (2, (2, 15, 4, 8), r"value \[2, 15, 4, 8\]: must be \[B, T, H, V\] with B, T = 2, 16"),
        (2, (2, 16, 3, 8), "3 value heads are no multiple of 2 key heads"),
        (3, (2, 16, 2), r"g \[2, 16, 2\]: must be \[B, T, H\] = \[2, 16, 4\]"),
        (4, (2, 4, 16), r"beta \[2, 4, 16\]: must be \[B, T, H\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(position: int, shape: tuple[int, ...], message: str) -> None:
    inputs = list(rule_inputs(2, 16, 2, 4, 8, 8))
    inputs[position] = torch.zeros(shape)
    for function in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        with pytest.raises(QDeltaNetError, match=message):
            function(*inputs)


def test_a_plan_of_another_chunk_size_is_refused() -> None:
    with pytest.raises(QDeltaNetError, match="the plan is for chunk size 32, the rule runs chunks of 64"):
        chunk_gated_delta_rule(*rule_inputs(1, 16), plan=plan("block_merge", 32))

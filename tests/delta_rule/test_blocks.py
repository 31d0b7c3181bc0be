"""Blocks of chunks bound memory and change no bit; inputs of any layout are read as they are."""

from __future__ import annotations

import pytest
import torch
from helpers import INTEGER_KINDS, KINDS, Recording, bound_rule, rule_inputs, run

from qdeltanet.core import FloatArithmetic, IntFormat, Operand, QDeltaNetError
from qdeltanet.delta_rule import chunk_gated_delta_rule
from qdeltanet.inverse import plan, run_plan

P = plan("block_merge", 16)


@pytest.mark.parametrize("kind", ["per_head", "finest dynamic", "fixed_point finest"])
@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_the_block_changes_no_bit(kind: str, block: int) -> None:
    inputs = rule_inputs(2, 16 * 7 + 3, 2, 4, 16, 8)
    scheme, scales = bound_rule(inputs, P, 8, (KINDS | INTEGER_KINDS)[kind])
    one, other = (Recording(scheme, scales, "cpu") for _ in range(2))
    expected, state = run(inputs, P, one)
    got, got_state = run(inputs, P, other, chunk_block=block)
    assert torch.equal(got, expected)
    assert torch.equal(got_state.codes, state.codes)
    assert other.saturated == one.saturated


def test_views_are_read_as_they_are() -> None:
    inputs = rule_inputs(2, 64, 1, 2, 16, 8)
    scheme, scales = bound_rule(inputs, P, 8, KINDS["per_head"])
    expected, _ = run(inputs, P, Recording(scheme, scales, "cpu"))
    strided = tuple(
        torch.stack([x, x + 1], dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for x in inputs
    )
    assert not any(x.is_contiguous() for x in strided)
    got, _ = run(strided, P, Recording(scheme, scales, "cpu"))  # type: ignore[arg-type]
    assert torch.equal(got, expected)


def test_inputs_are_never_written_to() -> None:
    inputs = rule_inputs(2, 64, 1, 2, 16, 8)
    before = [x.clone() for x in inputs]
    scheme, scales = bound_rule(inputs, P, 8, KINDS["per_head"])
    for arithmetic in (FloatArithmetic(), Recording(scheme, scales, "cpu"), Recording(scheme, scales, "reference")):
        run(inputs, P, arithmetic)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    A = torch.rand(1, 2, 16, 16).tril(-1)
    kept = A.clone()
    run_plan(P, Operand("A", A), FloatArithmetic())
    assert torch.equal(A, kept)


@pytest.mark.parametrize(("position", "name"), enumerate(["query", "key", "value", "g", "beta"]))
def test_integers_are_no_inputs(position: int, name: str) -> None:
    inputs = list(rule_inputs(1, 32))
    inputs[position] = inputs[position].long()
    with pytest.raises(QDeltaNetError, match=rf"{name} is torch\.int64: must be floating point"):
        chunk_gated_delta_rule(*inputs)


@pytest.mark.parametrize(("position", "name"), list(enumerate(["query", "key", "value", "g", "beta"]))[1:])
def test_inputs_on_two_devices_are_refused(position: int, name: str) -> None:
    inputs = list(rule_inputs(1, 32))
    inputs[position] = inputs[position].to("meta")
    with pytest.raises(QDeltaNetError, match=rf"{name} is on meta, query on cpu"):
        chunk_gated_delta_rule(*inputs)


BAD_CODES = {
    "outside of int8": (torch.full((1, 2, 16, 16), 128.0), 1.0),
    "must be whole numbers": (torch.full((1, 2, 16, 16), 0.5), 1.0),
    "outside of int8 ": (torch.full((1, 2, 16, 16), float("nan")), 1.0),
    "finite and greater than 0": (torch.zeros(1, 2, 16, 16), 0.0),
    "finite and greater than 0 ": (torch.zeros(1, 2, 16, 16), -1.0),
    "finite and greater than 0  ": (torch.zeros(1, 2, 16, 16), float("nan")),
}


@pytest.mark.parametrize("message", BAD_CODES)
def test_codes_and_scales_from_outside_are_checked(message: str) -> None:
    codes, scale = BAD_CODES[message]
    scheme, scales = bound_rule(rule_inputs(1, 32), P, 8, KINDS["per_head"])
    A = Operand("A", codes, torch.full((1, 1, 1), scale), IntFormat(8))
    with pytest.raises(QDeltaNetError, match=f"site A: .*{message.strip()}"):
        run_plan(P, A, Recording(scheme, scales, "cpu"))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_static_scales_are_checked_when_bound(bad: float) -> None:
    scheme, scales = bound_rule(rule_inputs(1, 32), P, 8, KINDS["per_head"])
    scales["w"] = scales["w"].clone()
    scales["w"][0] = bad
    with pytest.raises(QDeltaNetError, match="site w: scales must be finite and greater than 0; calibrate again"):
        Recording(scheme, scales, "cpu")

"""Rotated q, k and v: nothing changes but the rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import KINDS, Kind, Recording, bound_rule, differing, float_rule, rule_inputs, rule_scheme, run
from torch import Tensor

from qdeltanet.core import BindingError, ObservingArithmetic, QDeltaNetError, hadamard, rotate_state
from qdeltanet.delta_rule import bind, chunk_gated_delta_rule, recurrent_gated_delta_rule
from qdeltanet.inverse import plan

ROTATIONS = [frozenset({"qk"}), frozenset({"v"}), frozenset({"qk", "v"})]
TOLERANCE = 1e-5  # float32 sums in another order
PLAN = plan("block_merge", 16)


class Seen(ObservingArithmetic):
    """Float in the rotated basis that keeps what entered each site."""

    def __init__(self, rotate: frozenset[str]) -> None:
        super().__init__(lambda site, x, compact: self.sites.__setitem__(site, x), rotate=rotate)
        self.sites: dict[str, Tensor] = {}


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_float_is_what_it_was(rotate: frozenset[str]) -> None:
    inputs = rule_inputs(2, 70, 2, 4, 16, 8, decay=0.01)
    start = 0.1 * torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"initial_state": start, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, state = recurrent_gated_delta_rule(*inputs, **options)
    found = chunk_gated_delta_rule(*inputs, chunk_size=16, arithmetic=Seen(rotate), **options)
    assert state is not None
    assert found[1] is not None
    torch.testing.assert_close(found[0], expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1], state, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_observers_see_the_rotated_basis(rotate: frozenset[str]) -> None:
    inputs = rule_inputs(1, 48, 2, 4, 16, 8)
    plain, turned = Seen(frozenset()), Seen(rotate)
    for arithmetic in (plain, turned):
        run(inputs, PLAN, arithmetic)
    keys = ("q", "k", "k_beta", "q_decay", "k_decay", "w") if "qk" in rotate else ()
    values = ("v_beta", "v_new") if "v" in rotate else ()
    for site, x in plain.sites.items():
        expected = hadamard(x) if site in (*keys, *values) else x
        expected = rotate_state(x, rotate) if site == "state" else expected
        torch.testing.assert_close(turned.sites[site], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["cpu", "fake"])
@pytest.mark.parametrize("kind", ["per_head", "finest dynamic"])
def test_integers_equal_the_reference(kind: str, backend: str) -> None:
    inputs = rule_inputs(2, 40, 2, 4, 16, 8)
    scheme, scales = bound_rule(inputs, PLAN, 8, KINDS[kind])
    turned = replace(scheme, rotate=frozenset({"qk", "v"}))
    one, two = Recording(turned, scales, "reference"), Recording(turned, scales, backend)
    outputs = [run(inputs, PLAN, ar)[0] for ar in (one, two)]
    assert torch.equal(*outputs)
    assert not differing(one, two)
    assert not torch.equal(outputs[0], run(inputs, PLAN, Recording(scheme, scales, "reference"))[0])
    error = (outputs[0] - float_rule(inputs, 16)).norm() / float_rule(inputs, 16).norm()
    assert error < 0.05  # INT8's own


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_a_carried_state_and_single_tokens_go_on_in_the_same_basis(rotate: frozenset[str]) -> None:
    inputs = rule_inputs(2, 48, 2, 4, 16, 8)
    scheme = replace(bound_rule(inputs, PLAN, 8, KINDS["finest dynamic"])[0], rotate=rotate)
    whole, last = run(inputs, PLAN, Recording(scheme, {}, "cpu"))
    first, state = run(tuple(x[:, :32] for x in inputs), PLAN, Recording(scheme, {}, "cpu"))
    rest, final = run(tuple(x[:, 32:] for x in inputs), PLAN, Recording(scheme, {}, "cpu"), state)
    assert torch.equal(torch.cat([first, rest], 1), whole)
    assert torch.equal(final.codes, last.codes)
    decode, steps = plan("identity", 1), [first]
    for t in range(32, 48):
        step, state = run(tuple(x[:, t : t + 1] for x in inputs), decode, Recording(scheme, {}, "cpu"), state)
        steps.append(step)
    stepped = torch.cat(steps, 1)
    assert (stepped - whole).norm() / whole.norm() < 0.02  # INT8 rounds single tokens elsewhere than chunks


def test_an_outlier_channel_costs_the_others_less() -> None:
    q, k, v, g, beta = rule_inputs(2, 64, 2, 4, 32, 32)
    outlier = torch.arange(32) == 5
    inputs = (q, k, v * torch.where(outlier, 8.0, 1.0), g, beta)
    errors = []
    for rotate in (frozenset[str](), frozenset({"v"})):
        scheme = bind(replace(rule_scheme(PLAN, 4, Kind(scale="dynamic")), rotate=rotate), PLAN, 32, 32)
        found = run(inputs, PLAN, Recording(scheme, {}, "reference"))[0]
        errors.append(float((found - float_rule(inputs, 16))[..., ~outlier].norm()))
    assert errors[1] < 0.7 * errors[0]


def test_widths_are_checked_when_bound() -> None:
    for names, dims in (({"qk"}, (24, 32)), ({"v"}, (32, 24))):
        scheme = replace(rule_scheme(PLAN, 8, Kind()), rotate=frozenset(names))
        with pytest.raises(BindingError, match=f"rotate: {min(names)}: a head dimension of 24 is no power of two"):
            bind(scheme, PLAN, *dims)
    bind(replace(rule_scheme(PLAN, 8, Kind()), rotate=frozenset({"v"})), PLAN, 24, 32)  # K is not turned
    with pytest.raises(QDeltaNetError, match="power of two, not 12"):
        chunk_gated_delta_rule(*rule_inputs(1, 16, 1, 1, 12, 8), chunk_size=16, arithmetic=Seen(ROTATIONS[0]))

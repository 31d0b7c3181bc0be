"""The state between chunks and steps: what it is held in, error feedback, and cuts that change no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import INT16, INTEGER_KINDS, KINDS, Inputs, Kind, bound_rule, collector, rule_inputs, rule_scheme, run

from qdeltanet.backends import get_backend
from qdeltanet.conformance import run_suite, suite
from qdeltanet.conformance.inputs import FEEDBACK_KINDS
from qdeltanet.core import (
    BindingError,
    FloatArithmetic,
    Granularity,
    IntegerArithmetic,
    IntFormat,
    ObservingArithmetic,
    Operand,
    QDeltaNetError,
    RuleScheme,
    SiteScheme,
    relative_error,
)
from qdeltanet.delta_rule import bind, make_scales, scale_specs
from qdeltanet.inverse import Plan, plan
from qdeltanet.recipe import load_recipe

INT4, INT8 = IntFormat(4), IntFormat(8)
P, STEP = plan("block_merge", 16), plan("identity", 1)
Scales = dict[str, torch.Tensor]


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    q, k, v, g, beta = (x[:, start:stop] for x in inputs)
    return q, k, v, g, beta


def bound_state(inputs: Inputs, state: SiteScheme, rotate: frozenset[str] = frozenset()) -> tuple[RuleScheme, Scales]:
    """INT8 everywhere but at the state; scales from the inputs themselves."""
    loose = replace(rule_scheme(P, 8, KINDS["per_head"], state=state), rotate=rotate)
    scheme = bind(loose, P, 16, 8)
    amax, observe = collector(scale_specs(scheme, P))
    run(inputs, P, ObservingArithmetic(observe, rotate=rotate))
    return scheme, make_scales(scale_specs(scheme, P), amax)


def integers(scheme: RuleScheme, scales: Scales, backend: str = "cpu") -> IntegerArithmetic:
    return IntegerArithmetic(scheme, scales, get_backend(backend))


def assert_same(a: Operand, b: Operand) -> None:
    for x, y in zip(a.parts, b.parts, strict=True):
        assert x.scale is not None
        assert y.scale is not None
        assert torch.equal(x.codes, y.codes)
        assert torch.equal(x.scale.expand(x.codes.shape), y.scale.expand(y.codes.shape))


# -- what a residual is ------------------------------------------------------------------------------------------------


def test_codes_and_residual_are_the_bytes_of_a_16_bit_state() -> None:
    """256 codes + residual is what INT16 at 1/256 of the scale gives, but where the low byte would be 128."""
    inputs = rule_inputs(2, 16, 1, 2, 16, 8)
    scheme, scales = bound_state(inputs, SiteScheme(INT8, feedback=INT8))
    wide = replace(scheme, sites={**scheme.sites, "state": SiteScheme(INT16)})
    scales["state"] = scales["state"] * 0.9  # some saturate
    _, state = run(inputs, P, integers(scheme, scales))
    _, other = run(inputs, P, integers(wide, {**scales, "state": scales["state"] / 256}))
    assert state.residual is not None
    assert state.residual.scale is not None
    assert torch.equal(state.residual.scale, scales["state"] / 256)
    low = other.codes - 256 * state.codes
    assert bool((low.abs() <= 128).all())
    assert torch.equal(low.clamp(-127, 127), state.residual.codes)
    assert int(state.codes.abs().max()) == 127
    assert int((low != 0).sum()) > 0.9 * low.numel()


@pytest.mark.parametrize("kind", FEEDBACK_KINDS)
def test_a_residual_is_what_its_codes_leave_out(kind: str) -> None:
    """A given float state comes back within half a step of the residual, by codes and residual together."""
    inputs = rule_inputs(2, 48, 1, 2, 16, 8)
    scheme, scales = bound_rule(inputs, P, 8, FEEDBACK_KINDS[kind])
    _, final = run(inputs, P, FloatArithmetic())
    given = integers(scheme, scales).quantize("state", final.real())
    assert given.residual is not None
    step = given.residual.scale
    assert step is not None
    inside = given.codes.abs() < 127  # a chunk boundary need not hold the largest state
    error = ((given.real() - final.real()).abs() / step)[inside]
    assert float(error.max()) < 1.01  # a low byte of 128 is cut to 127
    assert float(error.mean()) < 0.3


def test_powers_of_two_stay_powers_of_two() -> None:
    inputs = rule_inputs()
    scheme, scales = bound_rule(inputs, P, 8, FEEDBACK_KINDS["power_of_two, feedback"])
    _, state = run(inputs, P, integers(scheme, scales))
    for x in state.parts:
        assert x.scale is not None
        assert bool((torch.frexp(x.scale).mantissa == 0.5).all())


def test_clipping_is_counted_once_and_half_a_step_of_it_is_kept() -> None:
    scheme, scales = bound_state(rule_inputs(), SiteScheme(INT8, feedback=INT8))
    ar = integers(scheme, scales)
    step = scales["state"]
    x = ar.quantize("state", (torch.tensor([127.4, 130.0, -127.4]) * step).view(2, 3, 1)[None])
    assert ar.saturated == {"state": 2}
    assert x.residual is not None
    assert x.codes.flatten().tolist() == [127, 127, -127, 127, 127, -127]
    assert x.residual.codes.flatten().tolist() == [102, 127, -102, 102, 127, -102]


def test_backends_agree_to_the_bit() -> None:
    cases = [c for c in suite(quick=True) if "feedback" in c.name]
    for name in ("cpu", "fake"):
        report = run_suite(get_backend(name), get_backend("reference"), cases)
        assert (report.cases, report.mismatches) == (12, 0), report.failures


def test_gradients_pass() -> None:
    inputs = rule_inputs(1, 32)
    scheme, scales = bound_state(inputs, SiteScheme(INT8, feedback=INT8))
    ar = IntegerArithmetic(scheme, scales, get_backend("fake"))
    q, k, v, g, beta = (x.clone().requires_grad_() for x in inputs)
    output, state = run((q, k, v, g, beta), P, ar)
    (output.sum() + state.real().sum()).backward()
    for x in (q, k, v, g, beta):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert float(x.grad.abs().max()) > 0


# -- cuts --------------------------------------------------------------------------------------------------------------

HELD = {
    "int16": SiteScheme(INT16),
    "channel": SiteScheme(INT8, granularity=Granularity.PER_CHANNEL),
    "channel dynamic": SiteScheme(INT8, "dynamic", Granularity.PER_CHANNEL),
    "carry": SiteScheme(INT8, carry=INT16),
    "feedback": SiteScheme(INT8, feedback=INT8),
    "int4 feedback": SiteScheme(INT8, feedback=INT4),
    "channel feedback": SiteScheme(INT8, granularity=Granularity.PER_CHANNEL, feedback=INT8),
    "channel dynamic feedback": SiteScheme(INT8, "dynamic", Granularity.PER_CHANNEL, feedback=INT8),
}


@pytest.mark.parametrize("p", [P, STEP], ids=["chunks", "decode"])
@pytest.mark.parametrize("rotate", [(), ("qk", "v")], ids=["", "rotated"])
@pytest.mark.parametrize("held", HELD)
def test_cuts_at_multiples_of_the_chunk_size_change_no_bit(held: str, rotate: tuple[str, ...], p: Plan) -> None:
    inputs = rule_inputs(2, 96, 1, 2, 16, 8)
    scheme, scales = bound_state(inputs, HELD[held], frozenset(rotate))
    once, ar = (integers(scheme, scales) for _ in range(2))
    at_once, final = run(inputs, p, once)
    pieces, state = [], None
    for start, stop in ((0, 16), (16, 64), (64, 80), (80, 96)):
        output, state = run(part(inputs, start, stop), p, ar, state)
        pieces.append(output)
    assert torch.equal(torch.cat(pieces, dim=1), at_once)
    assert state is not None
    assert_same(state, final)
    assert ar.saturated == once.saturated


@pytest.mark.parametrize("kind", [*FEEDBACK_KINDS.values(), INTEGER_KINDS["fixed_point finest"]], ids=str)
def test_cuts_change_no_bit_in_any_mode(kind: Kind) -> None:
    inputs = rule_inputs(2, 64, 1, 2, 16, 8)
    scheme, scales = bound_rule(inputs, P, 8, kind)
    at_once, final = run(inputs, P, integers(scheme, scales))
    first, state = run(part(inputs, 0, 32), P, integers(scheme, scales))
    second, state = run(part(inputs, 32, 64), P, integers(scheme, scales), state)
    assert torch.equal(torch.cat([first, second], dim=1), at_once)
    assert_same(state, final)


# -- what it is good for -----------------------------------------------------------------------------------------------


def state_error(inputs: Inputs, held: SiteScheme, p: Plan) -> float:
    """Mean relative error of the final state over heads; the other sites in INT16, so that it is the state's own."""
    loose = rule_scheme(P, 16, KINDS["per_head"], state=held)
    scheme = bind(loose, P, 16, 8)
    amax, observe = collector(scale_specs(scheme, P))
    _, exact = run(inputs, P, ObservingArithmetic(observe))
    scales = make_scales(scale_specs(scheme, P), amax)
    _, state = run(inputs, p, IntegerArithmetic(scheme, scales, get_backend("cpu")))
    return float(relative_error(exact.real(), state.real()).mean())


@pytest.fixture(scope="module")
def slow() -> Inputs:
    """2,048 tokens whose writes are small beside a state that hardly decays: what rounding at every token swallows."""
    q, k, v, g, beta = rule_inputs(1, 2048, 1, 2, 16, 8, seed=3, decay=0.004)
    return q, k + 1, v, g, 0.2 * beta


def test_feedback_ends_the_drift_of_an_int8_state(slow: Inputs) -> None:
    plain, fed = (state_error(slow, SiteScheme(INT8, feedback=f), STEP) for f in (None, INT8))
    assert plain > 0.05
    assert fed < plain / 15
    assert fed < 2 * state_error(slow, SiteScheme(INT8, carry=INT16), STEP)


def test_few_bits_of_feedback_are_worth_most(slow: Inputs) -> None:
    plain, four = (state_error(slow, SiteScheme(INT8, feedback=f), STEP) for f in (None, INT4))
    assert four < plain / 5


def test_a_scale_per_channel_is_worth_it_where_channels_differ() -> None:
    q, k, v, g, beta = rule_inputs(1, 256, 1, 2, 16, 8)
    inputs = (q, k, v * torch.logspace(-2, 0, 8), g, beta)
    for source in ("calibrated", "dynamic"):
        per_head, per_channel = (
            state_error(inputs, SiteScheme(INT8, source, kept), P)  # type: ignore[arg-type]
            for kept in (Granularity.PER_HEAD, Granularity.PER_CHANNEL)
        )
        assert per_channel < per_head / 1.5


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "scheme", "message"),
    [
        ("v_new", SiteScheme(INT8, feedback=INT8), "site v_new: only state has error feedback"),
        ("state", SiteScheme(INT8, carry=INT16, feedback=INT8), "site state: carry keeps what feedback would"),
        ("state", SiteScheme(None, feedback=INT8), "site state: a float state loses nothing; leave feedback out"),
        ("state", SiteScheme(INT16, feedback=INT16), "site state: int16 with feedback int16 is more than the 24 bits"),
    ],
)
def test_feedback_that_makes_no_sense_is_refused(site: str, scheme: SiteScheme, message: str) -> None:
    with pytest.raises(BindingError, match=message):
        bind(rule_scheme(P, 8, KINDS["per_head"], **{site: scheme}), P, 16, 8)


def test_recipes_ask_for_it() -> None:
    rule = load_recipe("int8", ["sites.state.feedback=int4"]).layer(0).rule
    assert rule is not None
    assert {s for s, x in rule.sites.items() if x.feedback is not None} == {"state"}
    assert rule.sites["state"].feedback == INT4
    with pytest.raises(QDeltaNetError, match="bits must be in 2"):
        load_recipe("int8", ["sites.state.feedback=int99"])


def test_a_residual_from_outside_is_checked() -> None:
    inputs = rule_inputs(2, 32, 1, 2, 16, 8)
    scheme, scales = bound_state(inputs, SiteScheme(INT8, feedback=INT8))
    _, state = run(inputs, P, integers(scheme, scales))
    assert state.residual is not None
    wrong = state.with_residual(state.residual.codes + 1000, INT8)
    with pytest.raises(QDeltaNetError, match=r"site state: codes reach .* outside of int8"):
        run(inputs, P, integers(scheme, scales), wrong)

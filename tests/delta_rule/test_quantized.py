"""The quantized rule: accuracy, independence of batch and of cuts, state codes, errors at run time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import INTEGER_KINDS, KINDS, Kind, Recording, bound_rule, float_rule, rule_inputs, rule_scheme, run

from qdeltanet.backends import get_backend
from qdeltanet.core import (
    BindingError,
    Granularity,
    IntegerArithmetic,
    IntFormat,
    NonFiniteError,
    Operand,
    QDeltaNetError,
    SiteScheme,
    sqnr,
)
from qdeltanet.delta_rule import bind, chunk_gated_delta_rule, make_scales, scale_specs
from qdeltanet.inverse import Plan, plan

MERGE = plan("block_merge", 32)


def quality(bits: int, kind: Kind, p: Plan = MERGE) -> float:
    """SQNR of the integer output in dB."""
    inputs = rule_inputs(2, 160, 2, 4, 32, 16)
    scheme, scales = bound_rule(inputs, p, bits, kind)
    output, _ = run(inputs, p, IntegerArithmetic(scheme, scales, get_backend("cpu")))
    return sqnr(float_rule(inputs), output)


@pytest.mark.parametrize(
    ("bits", "kind", "least"),
    [
        (16, "per_head", 78.0),
        (12, "per_head", 54.0),
        (8, "per_head", 30.5),
        (8, "per_tensor", 29.5),
        (8, "per_head dynamic", 32.0),
        (8, "finest", 33.0),
        (8, "finest dynamic", 36.0),
        (4, "finest dynamic", 11.0),
    ],
)
def test_accuracy(bits: int, kind: str, least: float) -> None:
    assert quality(bits, KINDS[kind]) > least


def test_finest_is_what_makes_int4_work() -> None:
    assert quality(4, KINDS["finest dynamic"]) > quality(4, KINDS["per_head dynamic"]) + 2


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_integer_requantization_is_as_accurate_as_float(kind: str, bits: int) -> None:
    k = INTEGER_KINDS[kind]
    like = Kind(k.scale, k.granularity, k.carry)
    # scales rounded up to powers of two lose up to one bit; one shift for a matrix loses nothing that shows
    loss = 4.2 if k.requantize == "power_of_two" else 0.1
    assert quality(bits, k) > quality(bits, like) - loss


def test_other_modes_refuse_dynamic_scales_and_crooked_powers_of_two() -> None:
    inputs = rule_inputs()
    with pytest.raises(BindingError, match="dynamic scale needs requantize: float"):
        bound_rule(inputs, MERGE, 8, Kind("dynamic", requantize="fixed_point"))
    scheme, scales = bound_rule(inputs, MERGE, 8, INTEGER_KINDS["power_of_two"])
    scales["k"] = scales["k"] * 1.5
    with pytest.raises(BindingError, match="site k: requantize: power_of_two needs scales that are powers of two"):
        IntegerArithmetic(scheme, scales, get_backend("cpu"))


CUTS = [KINDS["per_head"], KINDS["per_head dynamic"], KINDS["finest"], KINDS["finest dynamic"],
        INTEGER_KINDS["fixed_point"]]  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", CUTS, ids=lambda k: f"{k.scale}-{k.granularity.value}-{k.requantize}")
def test_prefill_in_chunks_equals_prefill_at_once_to_the_bit(bits: int, kind: Kind) -> None:
    p = plan("block_merge", 16)
    inputs = rule_inputs(2, 96, 1, 2, 16, 8)
    scheme, scales = bound_rule(inputs, p, bits, kind)

    def arithmetic() -> IntegerArithmetic:
        return IntegerArithmetic(scheme, scales, get_backend("reference"))

    at_once, final = run(inputs, p, arithmetic())
    pieces, state = [], None
    ar = arithmetic()
    for start, stop in ((0, 16), (16, 64), (64, 96)):
        output, state = run(tuple(x[:, start:stop] for x in inputs), p, ar, state)  # type: ignore[arg-type]
        pieces.append(output)
    assert torch.equal(torch.cat(pieces, dim=1), at_once)
    assert state is not None
    assert torch.equal(state.codes, final.codes)
    assert torch.equal(state.scale.expand_as(final.codes), final.scale.expand_as(final.codes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_alone_equals_itself_in_a_batch_to_the_bit(kind: str) -> None:
    p = plan("block_merge", 16)
    inputs = list(rule_inputs(3, 64, 2, 4, 16, 8))
    inputs[2][1] *= 50  # a neighbour that would take all the range
    inputs[4][2] = 0
    scheme, scales = bound_rule(tuple(inputs), p, 8, KINDS[kind])  # type: ignore[arg-type]
    together, final = run(tuple(inputs), p, IntegerArithmetic(scheme, scales, get_backend("cpu")))  # type: ignore[arg-type]
    for b in range(3):
        row = tuple(x[b : b + 1] for x in inputs)
        alone, state = run(row, p, IntegerArithmetic(scheme, scales, get_backend("cpu")))  # type: ignore[arg-type]
        assert torch.equal(alone[0], together[b])
        assert torch.equal(state.codes[0], final.codes[b])


def test_the_state_is_carried_as_codes() -> None:
    inputs = rule_inputs(1, 64)
    scheme, scales = bound_rule(inputs, MERGE, 8, KINDS["per_head"])
    ar = IntegerArithmetic(scheme, scales, get_backend("reference"))
    _, state = run(inputs, MERGE, ar)
    assert state.format == IntFormat(8)
    assert state.codes.dtype is torch.int64
    assert int(state.codes.abs().max()) <= 127
    assert torch.equal(state.scale, scales["state"])
    # handing the state on as codes or as the float that they stand for is the same
    step = tuple(x[:, :32] for x in inputs)
    by_codes, _ = run(step, MERGE, ar, state)  # type: ignore[arg-type]
    by_float, _ = chunk_gated_delta_rule(
        *step, chunk_size=32, initial_state=state.real(), use_qk_l2norm_in_kernel=True, arithmetic=ar, plan=MERGE
    )
    assert torch.equal(by_codes, by_float)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_runs_on_the_scales_of_prefill(kind: str) -> None:
    inputs = rule_inputs(2, 96, 2, 4, 16, 8)
    scheme, scales = bound_rule(inputs, MERGE, 8, KINDS[kind])
    ar = IntegerArithmetic(scheme, scales, get_backend("reference"))
    outputs = []
    first, state = run(tuple(x[:, :64] for x in inputs), MERGE, ar)  # type: ignore[arg-type]
    outputs.append(first)
    for t in range(64, 96):
        output, state = run(tuple(x[:, t : t + 1] for x in inputs), plan("block_merge", 1), ar, state)  # type: ignore[arg-type]
        outputs.append(output)
    assert sqnr(float_rule(inputs), torch.cat(outputs, dim=1)) > 22


@pytest.mark.parametrize("kind", ["per_head", "finest dynamic"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_hard_decay_gives_numbers(bits: int, kind: str) -> None:
    inputs = list(rule_inputs(1, 96))
    inputs[3] = torch.full_like(inputs[3], -166.0)
    inputs[3][..., 1] = -1e-4
    scheme, scales = bound_rule(tuple(inputs), MERGE, bits, KINDS[kind])  # type: ignore[arg-type]
    output, state = run(tuple(inputs), MERGE, IntegerArithmetic(scheme, scales, get_backend("cpu")))  # type: ignore[arg-type]
    assert output.isfinite().all()
    assert state.real().isfinite().all()
    assert sqnr(float_rule(tuple(inputs)), output) > {4: 3, 8: 25, 16: 70}[bits]  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bound_scales_never_saturate(bits: int) -> None:
    p = plan("block_merge", 64)
    inputs = list(rule_inputs(2, 128, decay=0.0))
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1]) + 0.05 * inputs[1]  # keys that hardly differ
    inputs[4] = torch.ones_like(inputs[4])
    bound = SiteScheme(IntFormat(bits), "bound")
    proven = {f"inverse__{r}": bound for r in p.registers} | {"A": bound, "T": bound}
    scheme = bind(rule_scheme(p, bits, KINDS["per_head dynamic"], **proven), p, 16)
    scales = make_scales(scale_specs(scheme, p), {})
    ar = IntegerArithmetic(scheme, scales, get_backend("reference"))
    run(tuple(inputs), p, ar)  # type: ignore[arg-type]
    # a range that the exact numbers keep can be left by the rounding of codes before, at the last code only
    limit = 0 if bits == 16 else 2 * 2 * 128 * 64
    assert sum(n for site, n in ar.saturated.items() if site in {"A", "T"} or "inverse" in site) <= limit


@pytest.mark.parametrize("kind", ["per_head", "finest dynamic"])
@pytest.mark.parametrize(
    ("position", "site"),
    [(0, "q"), (1, "k"), (2, "v_beta"), (3, "decay (g, beta)"), (4, "decay (g, beta)")],
    ids=["query", "key", "value", "g", "beta"],
)
def test_nan_is_refused_by_the_site_it_reaches_first(position: int, site: str, kind: str) -> None:
    inputs = list(rule_inputs(1, 64))
    scheme, scales = bound_rule(tuple(inputs), MERGE, 8, KINDS[kind])  # type: ignore[arg-type]
    inputs[position] = inputs[position].clone()
    inputs[position].view(-1)[5] = float("nan")
    for backend in ("reference", "cpu"):
        with pytest.raises(NonFiniteError) as caught:
            run(tuple(inputs), MERGE, IntegerArithmetic(scheme, scales, get_backend(backend)))  # type: ignore[arg-type]
        assert caught.value.site == site


def test_coefficients_that_break_the_bound_are_refused() -> None:
    scheme, scales = bound_rule(rule_inputs(1, 64), MERGE, 8, KINDS["per_head"])
    for position, value in ((3, 0.5), (4, 2.5)):
        inputs = list(rule_inputs(1, 64))
        inputs[position] = torch.full_like(inputs[position], value)
        with pytest.raises(QDeltaNetError, match=r"a decay or beta reaches .*; g must be <= 0 and beta <= 2"):
            run(tuple(inputs), MERGE, IntegerArithmetic(scheme, scales, get_backend("cpu")))  # type: ignore[arg-type]


def test_an_infinite_state_is_refused() -> None:
    inputs = rule_inputs(1, 64)
    scheme, scales = bound_rule(inputs, MERGE, 8, KINDS["per_head"])
    options: dict[str, Any] = {"chunk_size": 32, "plan": MERGE, "initial_state": torch.full((1, 2, 16, 8), torch.inf)}
    with pytest.raises(NonFiniteError, match="site state"):
        chunk_gated_delta_rule(*inputs, arithmetic=IntegerArithmetic(scheme, scales, get_backend("cpu")), **options)


def test_one_site_alone_costs_less_than_all() -> None:
    """Fake execution carries real numbers through sites without a format."""
    inputs = rule_inputs(2, 96)
    reference = float_rule(inputs)
    every, scales = bound_rule(inputs, MERGE, 4, KINDS["per_head"])
    alone = {s: (x if s == "v_new" else SiteScheme(None, granularity=Granularity.PER_HEAD))
             for s, x in every.sites.items()}  # fmt: skip
    from dataclasses import replace

    fake = get_backend("fake")
    one, _ = run(inputs, MERGE, IntegerArithmetic(replace(every, sites=alone), scales, fake, allow_float=True))
    all_sites, _ = run(inputs, MERGE, IntegerArithmetic(every, scales, fake))
    none = {s: SiteScheme(None) for s in every.sites}
    unquantized, _ = run(inputs, MERGE, IntegerArithmetic(replace(every, sites=none), scales, fake, allow_float=True))
    assert sqnr(reference, unquantized) > 110
    assert sqnr(reference, all_sites) + 3 < sqnr(reference, one) < 60


def test_codes_stay_within_their_formats() -> None:
    inputs = rule_inputs(1, 64)
    scheme, scales = bound_rule(inputs, MERGE, 4, KINDS["finest"])
    ar = Recording(scheme, {k: s / 4 for k, s in scales.items()}, "reference")  # scales that are too small: much clips
    run(inputs, MERGE, ar)
    assert sum(ar.saturated.values()) > 100
    for site, codes, _ in ar.seen:
        held = scheme.sites[site].held
        assert held is not None
        assert int(codes.abs().max()) <= held.qmax
        assert torch.equal(codes, codes.round())
    assert isinstance(ar.quantize("q", torch.zeros(1, 1, 32, 16)), Operand)

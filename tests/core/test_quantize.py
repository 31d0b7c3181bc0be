from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeltanet.core import (
    COEFFICIENT_BITS,
    IntFormat,
    QDeltaNetError,
    check_scale,
    coefficient_codes,
    dequantize,
    fake_quantize,
    power_of_two_ceil,
    quantize,
    round_half_even,
    saturate,
    straight_through,
)

BITS = range(2, 17)
bits_of = st.integers(2, 16)
scale_of = st.floats(2.0**-60, 2.0**60, width=32)


def grid(fmt: IntFormat) -> torch.Tensor:
    return torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.float32)


@given(bits=bits_of, scale=scale_of)
def test_every_code_survives_the_round_trip(bits: int, scale: float) -> None:
    fmt, s = IntFormat(bits), torch.tensor(scale, dtype=torch.float32)
    codes = grid(fmt)
    real = dequantize(codes, s)
    assert torch.equal(quantize(real, s, fmt), codes)
    assert torch.equal(fake_quantize(real, s, fmt), real)


@given(bits=bits_of, exponent=st.integers(-40, 40))
def test_ties_go_to_even_over_the_whole_grid(bits: int, exponent: int) -> None:
    fmt, s = IntFormat(bits), torch.tensor(2.0**exponent)
    middle = grid(fmt)[:-1] + 0.5
    expected = torch.tensor([float(round(Fraction(x))) for x in middle.tolist()])
    assert torch.equal(quantize(middle * s, s, fmt), expected)
    assert bool((expected % 2 == 0).all())


def test_ties_are_found_by_division_not_by_a_reciprocal() -> None:
    fmt, ties = IntFormat(8), torch.arange(-127, 127) + 0.5
    scales = torch.arange(1.0, 60.0)[:, None]
    codes = quantize(ties * scales, scales, fmt)
    assert torch.equal(codes, torch.round(ties).expand_as(codes))
    assert not torch.equal(torch.round(ties * scales * (1 / scales)), codes)


@given(bits=bits_of, scale=scale_of, x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_quantize_follows_its_definition(bits: int, scale: float, x: list[float]) -> None:
    fmt = IntFormat(bits)
    s = torch.tensor(scale, dtype=torch.float32)
    ratio = (torch.tensor(x, dtype=torch.float32) / s).tolist()
    expected = [float(max(fmt.qmin, min(fmt.qmax, round(r)))) if abs(r) < 1e30 else fmt.qmax * (r > 0) or fmt.qmin
                for r in ratio]  # fmt: skip
    assert quantize(torch.tensor(x), s, fmt).tolist() == expected


@given(bits=bits_of, scale=scale_of)
def test_error_within_the_range_is_half_a_step(bits: int, scale: float) -> None:
    fmt, s = IntFormat(bits), torch.tensor(scale, dtype=torch.float32)
    x = torch.linspace(-1, 1, 4001) * fmt.qmax * s
    error = (fake_quantize(x, s, fmt) - x).abs().double()
    assert float(error.max()) <= float(s) * 0.5 * (1 + 2.0**-7)


@pytest.mark.parametrize("bits", BITS)
def test_clamp_and_saturation_count(bits: int) -> None:
    fmt, one = IntFormat(bits), torch.tensor(1.0)
    x = torch.tensor([-1e30, -fmt.qmax - 1.0, -fmt.qmax, 0.0, fmt.qmax, fmt.qmax + 0.4, fmt.qmax + 1.0, 1e30])
    q = float(fmt.qmax)
    assert quantize(x, one, fmt).tolist() == [-q, -q, -q, 0.0, q, q, q, q]
    codes, n = saturate(round_half_even(x), fmt)
    assert torch.equal(codes, quantize(x, one, fmt))
    assert int(n) == 4


@given(bits=bits_of, scale=st.floats(2.0**-10, 2.0**10, width=32))
def test_gradient_is_straight_through_inside_and_zero_outside(bits: int, scale: float) -> None:
    fmt = IntFormat(bits)
    s = torch.tensor(scale, dtype=torch.float32)
    inside = (torch.linspace(-1, 1, 33) * (fmt.qmax - 0.25) * s).requires_grad_()
    fake_quantize(inside, s, fmt).sum().backward()
    assert torch.allclose(inside.grad, torch.ones_like(inside), rtol=1e-6)
    outside = (torch.tensor([-3.0, -1.5, 1.5, 3.0]) * (fmt.qmax + 1) * s).requires_grad_()
    fake_quantize(outside, s, fmt).sum().backward()
    assert torch.equal(outside.grad, torch.zeros_like(outside))


def test_straight_through_has_one_forward_and_another_gradient() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out = straight_through(x * 3, torch.tensor([10.0, 20.0]))
    assert out.tolist() == [10.0, 20.0]
    out.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]
    exact = torch.tensor([5.0])
    assert straight_through(torch.tensor([1.0]), exact) is exact


@given(st.floats(2.0**-120, 2.0**120, width=32))
def test_power_of_two_ceil(scale: float) -> None:
    power = float(power_of_two_ceil(torch.tensor(scale, dtype=torch.float32)))
    numerator, denominator = power.as_integer_ratio()
    assert numerator & (numerator - 1) == 0
    assert denominator & (denominator - 1) == 0
    assert power / 2 < scale <= power


@given(x=st.lists(st.floats(0, 2, width=32), min_size=1, max_size=50), bits=st.integers(COEFFICIENT_BITS, 22))
def test_coefficient_codes_are_rounded_exactly(x: list[float], bits: int) -> None:
    codes = coefficient_codes(torch.tensor(x, dtype=torch.float32), bits).tolist()
    assert codes == [float(round(Fraction(v) * 2**bits)) for v in x]
    assert all(0 <= c <= 2 ** (bits + 1) for c in codes)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused(bad: float) -> None:
    check_scale(torch.tensor([1.0, 2.0]))
    with pytest.raises(QDeltaNetError, match="greater than 0"):
        check_scale(torch.tensor([1.0, bad]))

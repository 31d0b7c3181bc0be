"""Integer decay against exact powers of two."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import KINDS, Recording, bound_rule, differing, float_rule, rule_inputs, run
from hypothesis import given
from hypothesis import strategies as st

from qdeltanet.core import difference_decay, exp2, log2_decay, sqnr
from qdeltanet.core.exp2 import VALUE_BITS, exp2_table
from qdeltanet.inverse import plan

EVERY = torch.arange(-(24 << 16), 1, dtype=torch.int32)


def test_error_is_what_the_docstring_says() -> None:
    exact = torch.pow(2.0, EVERY.double() / 2**16)
    assert float((exp2(EVERY).double() / 2**VALUE_BITS - exact).abs().max()) < 1.4e-6
    assert bool((exp2(EVERY).diff() >= 0).all())


def test_the_table_is_rounded_exactly() -> None:
    table = exp2_table(torch.device("cpu")).tolist()
    assert len(table) == 257
    for j in (0, 1, 100, 255, 256):
        # t / 2^30 = 2^(j/256) within half a unit: compare 256th powers, which are whole
        low, high = (Fraction(2 * table[j] + s, 2**31) ** 256 for s in (-1, 1))
        assert low <= Fraction(2) ** j <= high


@given(st.integers(-(70 << 16), 0))
def test_against_python_integers(x: int) -> None:
    whole, fraction = x >> 16, x & 0xFFFF
    table = exp2_table(torch.device("cpu")).tolist()
    left, right = table[fraction >> 8], table[(fraction >> 8) + 1]
    mantissa = left + (((right - left) * (fraction & 255)) >> 8)
    shift = min(62, 8 - whole)
    expected = (mantissa + (1 << (shift - 1))) >> shift
    assert int(exp2(torch.tensor(x, dtype=torch.int32))) == expected


def test_conversion_is_one_rounding_with_a_floor() -> None:
    x = torch.tensor([0.0, -math.log(2), -1e-9, -1e30, -math.inf])
    assert log2_decay(x).tolist() == [0, -65536, 0, -(64 << 16), -(64 << 16)]
    assert difference_decay(log2_decay(x)).tolist() == [1.0, 0.5, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [8, 16])
def test_the_rule_is_as_near_to_float_with_either_decay(bits: int) -> None:
    from dataclasses import replace

    p = plan("block_merge", 32)
    inputs = rule_inputs(2, 96)
    scheme, scales = bound_rule(inputs, p, bits, KINDS["per_head"])
    integer = replace(scheme, decay="exp2")
    runs = {b: Recording(integer, scales, b) for b in ("reference", "cpu")}
    outputs = {b: run(inputs, p, ar)[0] for b, ar in runs.items()}
    assert differing(runs["reference"], runs["cpu"]) == {}
    plain = run(inputs, p, Recording(scheme, scales, "cpu"))[0]
    reference = float_rule(inputs, 32)
    # each cumulative log2 is rounded to 2^-17: 1e-5 of a decay, 80 dB and more below it
    assert sqnr(reference, outputs["cpu"]) > min(sqnr(reference, plain), 80) - 1
    assert not torch.equal(outputs["cpu"], plain)

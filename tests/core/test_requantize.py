"""Requantization against a slow implementation on Python integers, fractions and single numpy float32 operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeltanet.core import (
    MODES,
    TINY,
    BindingError,
    Granularity,
    IntFormat,
    Mode,
    Region,
    Result,
    Target,
    Term,
    requantize,
    scaled_sum,
)
from qdeltanet.core.requantize import fixed_point_bits

f32, f64 = np.float32, np.float64
HEADS, ROWS, COLUMNS = 2, 3, 5
SHAPE = (HEADS, ROWS, COLUMNS)
LAYOUTS = {"tensor": (1, 1, 1), "head": (HEADS, 1, 1), "row": (HEADS, ROWS, 1), "column": (HEADS, 1, COLUMNS)}


@dataclass
class Case:
    """Terms of a requantization, as numpy arrays; a region is (rows, columns) as slices."""

    accs: list[np.ndarray]
    scales: list[list[np.ndarray]]
    signs: list[int]
    regions: list[Region | None]
    out: np.ndarray
    mask: np.ndarray
    bits: int
    wide: bool = False
    containers: list[torch.dtype] = field(default_factory=list)

    def terms(self) -> list[Term]:
        bound = 2**34 if self.wide else 2**20
        return [
            Term(torch.from_numpy(a).to(c), tuple(torch.from_numpy(s) for s in scales), sign, bound, region)
            for a, scales, sign, region, c in zip(
                self.accs, self.scales, self.signs, self.regions, self.containers, strict=True
            )
        ]

    def covers(self, t: int, r: int, c: int) -> tuple[int, int] | None:
        """Position inside term t of the element (r, c) of the output."""
        region = self.regions[t]
        if region is None:
            return r, c
        if not (region[0].start <= r < region[0].stop and region[1].start <= c < region[1].stop):
            return None
        return r - region[0].start, c - region[1].start


def at(x: np.ndarray, h: int, r: int, c: int) -> np.float32:
    index = tuple(0 if n == 1 else i for i, n in zip((h, r, c), x.shape, strict=True))
    return x[index]


def elements() -> Iterator[tuple[int, int, int]]:
    return itertools.product(range(HEADS), range(ROWS), range(COLUMNS))


@st.composite
def cases(draw: st.DrawFn, powers: bool = False, wide: bool | None = None) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = draw(st.integers(2, 16))
    wide = draw(st.booleans()) if wide is None else wide
    with_regions = draw(st.booleans())

    def scale(layout: str, low: int = -8, high: int = 0) -> np.ndarray:
        exponents = rng.uniform(low, high, LAYOUTS[layout])
        return (2.0 ** (np.round(exponents) if powers else exponents)).astype(f32)

    accs, scales, signs, regions, containers = [], [], [], [], []
    for t in range(draw(st.integers(1, 3))):
        pairs = [("head", "head"), ("row", "column"), ("head", "column"), ("row", "tensor"), ("tensor",), ("row",)]
        names = draw(st.sampled_from(pairs))
        region = None
        if with_regions and (t == 0 or draw(st.booleans())):
            # at least two rows and columns: a scale that keeps an axis then still shows it
            region = (slice(draw(st.integers(0, 1)), ROWS), slice(draw(st.integers(0, 2)), COLUMNS - 1))
        rows, columns = (slice(0, ROWS), slice(0, COLUMNS)) if region is None else region
        top = 2 ** (33 if wide and t == 0 else 19)
        acc = rng.integers(-top, top, SHAPE)[:, rows, columns]
        factors = [scale(n)[:, rows if n == "row" else slice(None), columns if n == "column" else slice(None)]
                   for n in names]  # fmt: skip
        if wide and t == 0:
            factors.append(np.full((1, 1, 1), 2.0**-15, f32))
        accs.append(np.ascontiguousarray(acc))
        scales.append([np.ascontiguousarray(f) for f in factors])
        signs.append(draw(st.sampled_from([1, -1])))
        regions.append(region)
        choices = [torch.int64, torch.float64] + ([] if wide and t == 0 else [torch.float32])
        containers.append(draw(st.sampled_from(choices)))
    # an output scale that lets some elements saturate and the others spread over the codes
    spread = 2.0 ** (19 - 8 - bits + draw(st.integers(0, 3)))
    out = scale(draw(st.sampled_from(list(LAYOUTS))), -1, 1) * f32(2.0 ** round(math.log2(spread)))
    mask = (rng.random((ROWS, COLUMNS)) < 0.8).astype(f32) if draw(st.booleans()) else np.ones((ROWS, COLUMNS), f32)
    return Case(accs, scales, signs, regions, out.astype(f32), mask, bits, wide, containers)


def split_factors(case: Case, t: int, out: np.ndarray | None) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Scales of a term that keep columns, those that do not, and which group the output scale divides."""
    columns = [s for s in case.scales[t] if s.shape[-1] > 1]
    rows = [s for s in case.scales[t] if s.shape[-1] == 1]
    of_out = "none" if out is None else "columns" if out.shape[-1] > 1 else "rows"
    row_varies = any(s.shape[-2] > 1 for s in rows) or (of_out == "rows" and out is not None and out.shape[-2] > 1)
    column_varies = bool(columns) or of_out == "columns"
    if not (row_varies and column_varies):
        return [], rows + columns, "none" if out is None else "rows"  # one multiplier for all
    return columns, rows, of_out


def slow_real(case: Case, h: int, r: int, c: int, out: np.ndarray | None) -> np.float32:
    """r = f32(acc) m_0, r = r + f32(x_t) m_t, every operation rounded to float32."""
    total: np.float32 | None = None
    for t in range(len(case.accs)):
        where = case.covers(t, r, c)
        if where is None:
            continue
        acc = f32(int(case.accs[t][h, where[0], where[1]]))
        columns, rows, of_out = split_factors(case, t, out)
        value = acc
        for name, group in (("rows", rows), ("columns", columns)):
            if not group and of_out != name:
                continue
            m = f64(1)
            for s in group:
                m = m * f64(at(s, h, *where))
            if of_out == name and out is not None:
                m = m / f64(at(out, h, r, c))
            value = f32(value * f32(m))
        value = f32(value * f32(case.signs[t]))
        total = value if total is None else f32(total + value)
    return f32(0) if total is None else total


def clamp(n: int, bits: int) -> int:
    q = IntFormat(bits).qmax
    return max(-q, min(q, n))


def run(case: Case, out_scale: torch.Tensor | Granularity, mode: Mode) -> Result:
    shape = SHAPE if any(r is not None for r in case.regions) else None
    mask = None if case.mask.all() else torch.from_numpy(case.mask)
    return requantize(case.terms(), Target(IntFormat(case.bits), out_scale, mode, shape, mask))


def check(result: Result, expected: dict[tuple[int, int, int], int], bits: int) -> None:
    saturated = 0
    for index, unclamped in expected.items():
        assert int(result.codes[index]) == clamp(unclamped, bits), index
        saturated += clamp(unclamped, bits) != unclamped
    assert int(result.saturated) == saturated


@given(case=cases())
@settings(max_examples=150)
def test_float_mode(case: Case) -> None:
    expected = {(h, r, c): round(float(slow_real(case, h, r, c, case.out) * case.mask[r, c])) for h, r, c in elements()}
    check(run(case, torch.from_numpy(case.out), "float"), expected, case.bits)


@given(case=cases(), granularity=st.sampled_from([g for g in Granularity if g is not Granularity.FINEST]))
@settings(max_examples=100)
def test_float_mode_with_a_dynamic_output_scale(case: Case, granularity: Granularity) -> None:
    real = np.zeros(SHAPE, f32)
    for h, r, c in elements():
        real[h, r, c] = slow_real(case, h, r, c, None) * case.mask[r, c]
    axes = {"per_tensor": (0, 1, 2), "per_head": (1, 2), "per_token": (2,), "per_channel": (1,)}[granularity.value]
    amax = np.maximum(np.abs(real).max(axis=axes, keepdims=True), f32(TINY))
    scale = (amax / f32(IntFormat(case.bits).qmax)).astype(f32)
    result = run(case, granularity, "float")
    assert result.scale.shape == scale.shape
    assert np.array_equal(result.scale.numpy(), scale)
    expected = {(h, r, c): round(float(f32(real[h, r, c] / at(scale, h, r, c)))) for h, r, c in elements()}
    check(result, expected, case.bits)
    assert int(result.saturated) == 0


def half_away(x: int, shift: int) -> int:
    """x / 2^shift, rounded half away from zero."""
    magnitude = math.floor(Fraction(abs(x), 2**shift) + Fraction(1, 2))
    return magnitude if x > 0 else -magnitude


def slow_fixed_point(case: Case, h: int) -> dict[tuple[int, int, int], int]:
    """Unclamped codes of one head, on Python integers."""
    bounds = [t.bound for t in case.terms()]
    pre = [max(0, math.ceil(math.log2(b + 1)) - 31) for b in bounds]
    bits = min(31, 62 - math.ceil(math.log2(sum((b >> p) + (p > 0) for b, p in zip(bounds, pre, strict=True)) + 1)))
    m: dict[tuple[int, int, int], np.float64] = {}
    for t, (r, c) in itertools.product(range(len(case.accs)), itertools.product(range(ROWS), range(COLUMNS))):
        where = case.covers(t, r, c)
        if where is None:
            continue
        product = f64(1)
        for s in case.scales[t]:
            product = product * f64(at(s, h, *where))
        m[t, r, c] = f64(f32(product / f64(at(case.out, h, r, c)) * case.signs[t])) * 2.0 ** pre[t]
    n = bits - math.frexp(max(abs(float(x)) for x in m.values()))[1]
    n = max(1, min(62, n))
    codes = {}
    for r, c in itertools.product(range(ROWS), range(COLUMNS)):
        total = 0
        for t in range(len(case.accs)):
            where = case.covers(t, r, c)
            if where is not None:
                fixed = round(Fraction(float(m[t, r, c])) * 2**n)
                assert abs(fixed) <= 2**bits
                total += half_away(int(case.accs[t][h, where[0], where[1]]), pre[t]) * fixed
        assert abs(total) < 2**62
        codes[h, r, c] = half_away(total, n) * int(case.mask[r, c])
    return codes


@given(case=cases())
@settings(max_examples=150)
def test_fixed_point_mode(case: Case) -> None:
    expected = slow_fixed_point(case, 0) | slow_fixed_point(case, 1)
    check(run(case, torch.from_numpy(case.out), "fixed_point"), expected, case.bits)


@given(case=cases(powers=True, wide=False))
@settings(max_examples=100)
def test_power_of_two_mode_is_exact_but_for_one_rounding(case: Case) -> None:
    expected = {}
    for h, r, c in elements():
        total = Fraction(0)
        for t in range(len(case.accs)):
            where = case.covers(t, r, c)
            if where is not None:
                product = Fraction(case.signs[t]) / Fraction(float(at(case.out, h, r, c)))
                for s in case.scales[t]:
                    product *= Fraction(float(at(s, h, *where)))
                total += int(case.accs[t][h, where[0], where[1]]) * product
        magnitude = math.floor(abs(total) + Fraction(1, 2))  # half away from zero
        expected[h, r, c] = (magnitude if total > 0 else -magnitude) * int(case.mask[r, c])
    check(run(case, torch.from_numpy(case.out), "power_of_two"), expected, case.bits)


def test_the_modes_differ_at_ties() -> None:
    acc = torch.tensor([[[1.0, 3.0, 5.0, -1.0, -3.0, -5.0]]])
    term = Term(acc, (torch.tensor([[[0.5]]]),), bound=10)
    one, fmt = torch.ones(1, 1, 1), IntFormat(8)
    assert requantize([term], Target(fmt, one)).codes.flatten().tolist() == [0, 2, 2, 0, -2, -2]
    modes: tuple[Mode, ...] = ("fixed_point", "power_of_two")
    for mode in modes:
        assert requantize([term], Target(fmt, one, mode)).codes.flatten().tolist() == [1, 2, 3, -1, -2, -3]


def test_a_wide_accumulator_is_converted_once() -> None:
    # 2^24 + 1 is a tie in float32 and goes to 2^24; 2^24 + 3 goes to 2^24 + 4
    acc = torch.tensor([[[2**24 + 1, 2**24 + 3]]])
    term = Term(acc, (torch.tensor([[[1.0]]]),), bound=2**25)
    for container in (torch.int64, torch.float64):
        out = scaled_sum([Term(acc.to(container), term.scales, bound=2**25)])
        assert out.tolist() == [[[2.0**24, 2.0**24 + 4]]]


def test_row_and_column_scales_are_two_roundings() -> None:
    make = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**20), 2**20, (1, 40, 40), generator=make)
    row, column = torch.rand(1, 40, 1, generator=make), torch.rand(1, 1, 40, generator=make)
    got = scaled_sum([Term(acc, (row, column))])
    assert torch.equal(got, (acc.float() * row) * column)
    assert not torch.equal(got, acc.float() * (row * column))


def test_a_scale_that_is_next_to_nothing_saturates_in_every_mode() -> None:
    """An output that calibration saw as zero: its multiplier is huge, and must not wrap around."""
    acc = torch.tensor([[[5, -5, 0, 2**20]]])
    term = Term(acc, (torch.full((1, 1, 1), 0.01),), bound=2**21)
    tiny = torch.full((1, 1, 1), TINY / 127)
    for mode in MODES:
        result = requantize([term], Target(IntFormat(8), tiny, mode))
        assert result.codes.flatten().tolist() == [127, -127, 0, 127], mode
        assert int(result.saturated) == 3


def test_a_dynamic_scale_divides_as_ieee_does() -> None:
    """r / scale at exact ties; a product with the reciprocal would round some of them to the other side."""
    ties = torch.arange(127) + 0.5
    expected = torch.round(ties)
    felt = False
    for step in range(1, 60):
        acc = torch.cat([ties * 2 * step, torch.tensor([254.0 * step])])  # the last one makes the scale 2 * step
        result = requantize([Term(acc[None, None], bound=2**20)], Target(IntFormat(8), Granularity.PER_HEAD))
        assert float(result.scale) == 2 * step
        assert torch.equal(result.codes[0, 0, :-1], expected)
        felt |= not torch.equal(torch.round(acc[:-1] * (1 / result.scale[0, 0])), expected)
    assert felt


@pytest.mark.parametrize(
    ("bounds", "shifts", "bits"),
    [
        ([2**31 - 1], (0,), 31),
        ([2**31], (1,), 31),
        ([2**31 - 1, 1], (0, 0), 30),
        ([2**53], (23,), 31),
        ([2**53, 2**53, 2**53, 127], (23, 23, 23, 0), 30),
        ([127, 127], (0, 0), 31),
    ],
)
def test_wide_accumulators_are_shifted_until_the_sum_is_proven(
    bounds: list[int], shifts: tuple[int, ...], bits: int
) -> None:
    assert fixed_point_bits(bounds) == (shifts, bits)
    assert sum((b >> p) + (p > 0) for b, p in zip(bounds, shifts, strict=True)) * 2**bits < 2**62


@given(codes=st.lists(st.integers(-(2**22), 2**22), min_size=4, max_size=4), wide=st.booleans())
def test_coefficients_make_the_wide_accumulator_that_is_converted_once(codes: list[int], wide: bool) -> None:
    acc = torch.tensor(codes).reshape(1, 2, 2)
    coefficient = torch.tensor([[[65536.0, 1.0], [32767.0, 3.0]], [[0.0, 7.0], [65535.0, 2.0]]])  # two heads share acc
    exact = [int(a) * int(c) for c, a in zip(coefficient.flatten().tolist(), 2 * codes, strict=True)]
    for container in (torch.int64, torch.int32, torch.float64, torch.float32):
        term = Term(acc.to(container), (), bound=2**39, coefficient=coefficient)
        assert term.int64().flatten().tolist() == exact
        assert term.float32()[0].flatten().tolist() == [float(f32(x)) for x in exact]


@pytest.mark.parametrize("mode", ["fixed_point", "power_of_two"])
def test_dynamic_scales_need_float_requantization(mode: Mode) -> None:
    with pytest.raises(BindingError, match=f"{mode} needs static scales"):
        requantize([Term(torch.ones(1, 2, 2))], Target(IntFormat(8), Granularity.PER_HEAD, mode))


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_straight_through(mode: Mode) -> None:
    acc = torch.tensor([[[10.0, -20.0, 4000.0]]], requires_grad=True)
    scale, out = torch.tensor([[[0.25]]]), torch.tensor([[[0.5]]])
    result = requantize([Term(acc, (scale,), sign=-1, bound=4000)], Target(IntFormat(8), out, mode))
    assert result.codes.tolist() == [[[-5.0, 10.0, -127.0]]]
    result.codes.sum().backward()
    assert acc.grad.tolist() == [[[-0.5, -0.5, 0.0]]]

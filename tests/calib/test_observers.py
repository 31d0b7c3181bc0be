"""Observers: exact, the same bits for any division of the data, never averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdeltanet.calib import MinMaxObserver, PercentileObserver, make_observer
from qdeltanet.calib.observers import KlObserver, MseObserver, Observer, largest
from qdeltanet.calib.observers.histogram import COUNTS, Histogram
from qdeltanet.core import Granularity, QDeltaNetError, grouped
from qdeltanet.recipe import load_recipe

KINDS = ("minmax", "percentile", "mse", "kl")
INT32_MAX = 2**31 - 1


def made(kind: str) -> Observer:
    return make_observer(kind, 97.0, 7)


def values(seed: int, shape: Sequence[int], octaves: float) -> Tensor:
    """Over many magnitudes, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 2 ** (octaves * torch.randn(*shape, generator=generator))
    return x * (torch.rand(*shape, generator=generator) < 0.8)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# -- the same bits for any division ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_partition_in_any_order_gives_the_same_bits(kind: str, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 6)), *data.draw(st.sampled_from([(1, 1, 1), (3, 1, 1), (2, 4, 1), (2, 1, 3)])))
    x = values(
        data.draw(st.integers(0, 99)), (*shape, data.draw(st.integers(1, 8))), data.draw(st.sampled_from([1, 25]))
    )
    whole = made(kind)
    whole.update(x)
    parts = [
        part for row in x.split(data.draw(st.integers(1, 6))) for part in row.split(data.draw(st.integers(1, 8)), -1)
    ]
    observers = [made(kind) for _ in range(data.draw(st.integers(1, 4)))]
    for part in data.draw(st.permutations(parts)):
        observers[data.draw(st.integers(0, len(observers) - 1))].update(part)
    while len(observers) > 1:  # some of them have seen nothing
        into, other = data.draw(st.permutations(range(len(observers))))[:2]
        observers[into].merge(observers[other].state())
        del observers[other]
    assert_equal(observers[0].state(), whole.state())
    assert torch.equal(observers[0].amax(), whole.amax())


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_of_a_bounded_window_depends_on_no_order(kind: str) -> None:
    scales = 6000
    x = values(1, (4, scales, 1, 1, 4), 20.0)
    whole, backwards, merged = made(kind), made(kind), made(kind)
    whole.update(x)
    for part in reversed(x.split(1)):
        backwards.update(part)
        other = made(kind)
        other.update(part)
        merged.merge(other.state())
    if kind != "minmax":
        counts = whole.state()["counts"]
        assert counts.numel() <= COUNTS
        if kind != "mse":  # whose bins are 4 times as wide, and all fit
            assert counts.shape[-1] == COUNTS // scales
        assert int(counts.sum() + whole.state()["zeros"].sum()) == x.numel()
    for other in (backwards, merged):
        assert_equal(other.state(), whole.state())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", [g for g in Granularity if g is not Granularity.FINEST])
def test_layout_in_memory_does_not_matter(kind: str, granularity: Granularity) -> None:
    groups = grouped(values(2, (3, 2, 4, 8, 5), 1.0), granularity)
    found, expected = made(kind), made(kind)
    top = found.update(groups)
    expected.update(groups.clone(memory_format=torch.contiguous_format))
    assert torch.equal(top, groups.abs().amax((0, -1)))
    assert_equal(found.state(), expected.state())


@pytest.mark.parametrize("kind", KINDS)
def test_states_survive_a_file(kind: str, tmp_path: Path) -> None:
    for number, x in enumerate((values(3, (2, 3, 1, 1, 50), 2.0), torch.zeros(2, 3, 1, 1, 5))):
        observer, again = made(kind), made(kind)
        observer.update(x)
        save_file(observer.state(), tmp_path / f"{number}.safetensors")
        again.merge(load_file(tmp_path / f"{number}.safetensors"))
        assert_equal(again.state(), observer.state())
        assert torch.equal(again.amax(), observer.amax())
        again.update(x)
        observer.update(x)
        assert_equal(again.state(), observer.state())


@pytest.mark.parametrize("kind", KINDS)
def test_who_saw_nothing_changes_nothing(kind: str) -> None:
    observer = made(kind)
    assert made(kind).state() == {}
    observer.update(torch.ones(1, 2, 1, 1, 3))
    before = observer.state()
    observer.merge(made(kind).state())
    assert_equal(observer.state(), before)


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [16, 18])
def test_counts_are_numpys(shift: int) -> None:
    x = values(4, (5, 3, 2, 1, 40), 10.0)
    x[0, 0, 0, 0, :4] = torch.tensor([1e-45, -1e-39, 3.4e38, -0.0])
    histogram = Histogram(shift)
    for part in x.split(2):
        histogram.update(part, largest(part))
    state = histogram.state()
    assert state["counts"].dtype == torch.int32
    for h in range(3):
        for r in range(2):
            patterns = np.abs(x[:, h, r].numpy()).view(np.uint32).ravel() >> shift
            expected = np.bincount(patterns, minlength=1 << (31 - shift))
            first, found = int(state["first"]), state["counts"][h, r, 0].numpy()
            assert expected[0] == state["zeros"][h, r, 0]
            assert (expected[first : first + len(found)] == found).all()
            assert expected.sum() == found.sum() + expected[0]


def test_counts_beyond_32_bits() -> None:
    parts = [
        {"counts": torch.tensor([[[[n]]]]), "zeros": torch.zeros(1, 1, 1), "first": torch.tensor(16256)}
        for n in (INT32_MAX, 5)
    ]
    for part in parts:
        part["counts"], part["zeros"] = part["counts"].int(), part["zeros"].int()
    whole, other = Histogram(), Histogram()
    for into, order in ((whole, parts), (other, parts[::-1])):
        for part in order:
            into.merge(part)
    ones = torch.ones(2, 1, 1, 1, 3)
    whole.update(ones, largest(ones))
    other.update(ones, largest(ones))
    assert whole.state()["counts"].tolist() == [[[[INT32_MAX + 11]]]]
    assert whole.state()["counts"].dtype == torch.int64
    assert_equal(other.state(), whole.state())


def test_too_many_scales_are_refused_in_one_line() -> None:
    x = torch.ones(1, 64, 256, 1, 1)
    for kind in ("percentile", "kl"):
        with pytest.raises(QDeltaNetError, match="16384 scales .* than the 8192 .* use observer.kind=minmax"):
            made(kind).update(x)
    made("mse").update(x)
    with pytest.raises(QDeltaNetError, match="32768"):
        made("mse").update(x.expand(1, 64, 256, 3, 1))


# -- proposals ---------------------------------------------------------------------------------------------------------


def test_minmax_is_the_maximum_over_batches_not_their_average():
    observer = MinMaxObserver()
    for top in (1.0, 1.0, 10.0, 1.0):
        observer.update(torch.full((2, 3, 1, 1, 5), top))
    assert observer.amax().shape == (3, 1, 1)
    assert observer.amax().tolist() == [[[10.0]]] * 3


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows_in_the_maximum(kind: str, wrong: float) -> None:
    x = torch.randn(2, 3, 4, 1, 5)
    x[1, 2, 3, 0, 4] = wrong
    top = made(kind).update(x)
    assert top.isfinite().flatten().tolist() == [True] * 11 + [False]


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_matches_the_sorted_values_within_a_bin(percentile):
    x = torch.randn(4, 2, 1, 1, 5000, generator=torch.Generator().manual_seed(0))
    observer = PercentileObserver(percentile)
    for part in x.split(1):
        observer.update(part)
    for head in range(2):
        ordered = x[:, head].abs().flatten().sort().values
        exact = ordered[math.ceil(len(ordered) * percentile / 100) - 1].item()
        assert exact <= observer.amax()[head].item() <= exact * (1 + 2**-7)


def test_a_percentile_among_zeros_is_next_to_zero():
    observer = PercentileObserver(50.0)
    observer.update(torch.tensor([0.0] * 6 + [1.0] * 4).view(1, 1, 1, 1, 10))
    assert 0 < observer.amax().item() < 2.0**-126


def power_of_two(x: np.ndarray | float) -> np.ndarray:
    """The largest that is not above x."""
    return np.exp2(np.frexp(x)[1] - 1.0)


def kl_reference(x: np.ndarray, qmax: int) -> dict[float, float]:
    """Divergence by clip, cell by cell."""
    magnitudes = np.abs(x[x != 0]).astype(np.float64)
    top = magnitudes.max()
    power = power_of_two(top)
    widths = np.maximum(power_of_two(magnitudes) / 128, power / 2048)
    lows, index, numbers = np.unique(np.floor(magnitudes / widths) * widths, return_index=True, return_counts=True)
    widths, total = widths[index], float(len(magnitudes))
    clip, found = math.floor(top / power * 128) * power / 128, {}
    while clip > top / 16:  # lower edge of the last cell within
        upper = clip + power_of_two(clip) / 128
        limit = min(upper, top)
        inside = int((lows <= clip).sum())
        p, held = numbers[:inside].astype(float), float(numbers[:inside].sum())
        middles = lows[:inside] + widths[:inside] / 2
        codes = [min(round(middle / (limit / qmax)), qmax) for middle in middles.tolist()]
        q = np.zeros(inside)
        for code in set(codes):
            own = [i for i in range(inside) if codes[i] == code]
            q[own] = numbers[own].sum() * widths[own] / widths[own].sum()
        if held == total or lows[inside - 1] == clip:  # else the last cell is empty in Q and not in P
            p[-1] += total - held
            found[float(np.float32(limit))] = float((p / total * np.log(p / total / (q / held))).sum())
        for _ in range(4):
            clip -= power_of_two(np.nextafter(clip, 0)) / 128
    return found


@pytest.mark.parametrize("qmax", [1, 7, 127])
@pytest.mark.parametrize("tail", [4.0, 30.0])
def test_kl_is_the_least_divergence_of_a_slow_reference(qmax: int, tail: float) -> None:
    x = np.random.default_rng(qmax).standard_t(tail, (2, 20000)).astype(np.float32)
    x[:, ::3] = 0
    observer = KlObserver(qmax)
    for part in torch.from_numpy(x).view(1, 2, 1, 1, -1).split(1000, -1):
        observer.update(part)
    for head in range(2):
        divergence = kl_reference(x[head], qmax)
        clip = observer.amax()[head].item()
        assert len(divergence) > 10
        assert divergence[clip] <= min(divergence.values()) + 1e-9


def test_kl_clips_a_far_outlier_at_4_bits_and_keeps_it_at_16():
    x = torch.randn(1, 1, 1, 1, 50000, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 40.0
    narrow, wide = KlObserver(7), KlObserver(32639)
    narrow.update(x)
    wide.update(x)
    assert 2.5 <= narrow.amax().item() < 8
    assert wide.amax().item() == 40.0


@pytest.mark.parametrize("qmax", [1, 7, 127])
def test_mse_is_the_least_error_of_a_slow_reference(qmax: int) -> None:
    x = values(5, (2, 3, 1, 1, 3000), 0.7)
    observer = MseObserver(qmax)
    for part in x.split(1):
        observer.update(part)
    for head in range(3):
        magnitudes = x[:, head].abs().flatten().clamp(2.0**-32)
        middles = ((magnitudes.view(torch.int32) >> 18 << 18) + (1 << 17)).view(torch.float32).double()
        top = float(x[:, head].abs().max())

        def error(amax: float, middles: Tensor = middles) -> float:
            scale = amax / qmax
            return float((middles - (middles / scale).round().clamp(max=qmax) * scale).square().sum())

        least = min(error(ratio * top) for ratio in MseObserver.RATIOS)
        assert error(observer.amax()[head].item()) <= least * (1 + 1e-5)  # ours adds in float32


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(QDeltaNetError, match="did you mean minmax"):
        make_observer("minmx", 99.0, 127)
    for kind in KINDS:
        observer = made(kind)
        with pytest.raises(QDeltaNetError, match="calibration set is empty"):
            observer.amax()
        observer.update(torch.ones(1, 2, 1, 1, 3))
        other = made(kind)
        other.update(torch.ones(1, 4, 1, 1, 3))
        with pytest.raises(QDeltaNetError, match=r"\[2, 1, 1\] scales cannot merge a state of \[4, 1, 1\]"):
            observer.merge(other.state())


def test_recipes_choose_them_by_site():
    recipe = load_recipe("int8", ["observer.kind=kl", "sites.k={observer: {kind: percentile, percentile: 99}}"])
    chosen = recipe.observers(0)
    assert chosen["q"].kind == "kl"
    assert (chosen["k"].kind, chosen["k"].percentile) == ("percentile", 99.0)


def test_groups_have_the_shape_of_the_scale():
    x = torch.randn(3, 2, 4, 8, 5)  # [N, B, H, R, C]
    shapes = {
        Granularity.PER_TENSOR: (1, 1, 1),
        Granularity.PER_HEAD: (4, 1, 1),
        Granularity.PER_TOKEN: (4, 8, 1),
        Granularity.PER_CHANNEL: (4, 1, 5),
    }
    for granularity, shape in shapes.items():
        observer = MinMaxObserver()
        observer.update(grouped(x, granularity))
        assert observer.amax().shape == shape
    assert torch.equal(observer.amax()[:, 0], x.abs().amax((0, 1, 3)))

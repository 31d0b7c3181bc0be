"""Observers: exact, mergeable by construction, never averaged."""

from __future__ import annotations

import pytest
import torch

from qdeltanet.calib import MinMaxObserver, PercentileObserver, make_observer
from qdeltanet.core import Granularity, QDeltaNetError, grouped


def test_minmax_is_the_maximum_over_batches_not_their_average():
    observer = MinMaxObserver()
    for top in (1.0, 1.0, 10.0, 1.0):
        observer.update(torch.full((2, 3, 1, 1, 5), top))
    assert observer.amax().shape == (3, 1, 1)
    assert observer.amax().tolist() == [[[10.0]]] * 3


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_matches_the_sorted_values_within_a_bin(percentile):
    x = torch.randn(4, 2, 1, 1, 5000, generator=torch.Generator().manual_seed(0))
    observer = PercentileObserver(percentile)
    for part in x.split(1):
        observer.update(part)
    for head in range(2):
        values = x[:, head].abs().flatten().sort().values
        index = max(1, -(-len(values) * percentile // 100)) - 1
        exact = values[int(index)].item()
        assert exact <= observer.amax()[head].item() <= exact * (1 + 2**-7)


def test_percentile_does_not_depend_on_batches():
    x = torch.randn(6, 2, 1, 1, 100, generator=torch.Generator().manual_seed(0))
    whole, parts = PercentileObserver(99.0), PercentileObserver(99.0)
    whole.update(x)
    for part in x.split(2):
        parts.update(part)
    assert torch.equal(whole.amax(), parts.amax())


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


def test_errors():
    with pytest.raises(QDeltaNetError, match="did you mean minmax"):
        make_observer("minmx", 99.0, 127)
    with pytest.raises(QDeltaNetError, match="calibration set is empty"):
        MinMaxObserver().amax()
    with pytest.raises(QDeltaNetError, match="percentile observer needs per_tensor or per_head"):
        PercentileObserver(99.0).update(torch.ones(1, 64, 128, 1, 2))

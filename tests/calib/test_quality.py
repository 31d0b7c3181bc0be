"""What scales cost: sums that are exact, so that any division of the batches gives the same bits."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeltanet.calib.quality import UNIT, Quality, measured
from qdeltanet.core import IntFormat, fit_scale
from qdeltanet.models import delta_net_layers, quantize_model
from qdeltanet.nn import GatedDeltaNet
from qdeltanet.recipe import load_recipe

QMAX = 127
DECIBELS = 0.001  # ours are of float32 rows, the reference of float64: the third digit may round the other way


@pytest.fixture(scope="module")
def layer(random_model) -> GatedDeltaNet:
    model = random_model()
    quantize_model(model, load_recipe("int8"))
    found: GatedDeltaNet = delta_net_layers(model)[0]
    for key in found.scales.keys:
        found.scales.as_dict()[key].fill_(0.01)
    return found


def batch(seed: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(2, 3, 2, 64, 32, generator=make),
        "v_new": torch.randn(3, 4, 64, 32, generator=make) ** 5,
        "T": torch.randn(2, 3, 4, 2, 32, 32, generator=make) * 0.1,
    }


def shown(layer: GatedDeltaNet, batches: list[dict[str, Tensor]]) -> Quality:
    quality = Quality(layer)
    for one in batches:
        for site, x in one.items():
            quality.site(site, x, compact=site == "T")
    return quality


@given(data=st.data())
def test_any_division_in_any_order_gives_the_same_sums(layer: GatedDeltaNet, data: st.DataObject) -> None:
    batches = [batch(seed) for seed in range(data.draw(st.integers(1, 5)))]
    whole = shown(layer, batches)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(batches), max_size=len(batches)))
    parts = [shown(layer, [b for b, own in zip(batches, owners, strict=True) if own == p]) for p in range(3)]
    merged = Quality(layer)
    for part in data.draw(st.permutations(parts)):
        merged.merge(json.loads(json.dumps(part.state())))
    assert merged.state() == whole.state()
    assert merged.report() == whole.report()


def test_merging_leaves_the_state_that_was_merged(layer: GatedDeltaNet) -> None:
    part = shown(layer, [batch(0)])
    state = part.state()
    before = json.dumps(state)
    merged = Quality(layer)
    for _ in range(2):
        merged.merge(state)
    assert json.dumps(state) == json.dumps(part.state()) == before


def reference(x: Tensor, scale: Tensor, qmax: int, head: int) -> dict[str, Any]:
    """The definition, in float64."""
    codes = torch.round(x / scale)
    clamped = codes.clamp(-qmax, qmax)
    other = [d for d in range(x.dim()) if d != head]
    return {
        "signal": x.double().square().sum(other),
        "noise": (x.double() - clamped.double() * scale.double()).square().sum(other),
        "saturated": (codes != clamped).sum(other),
        "amax": x.amax(other).clamp(min=0),
        "lowest": x.amin(other).clamp(max=0),
    }


def assert_measured(x: Tensor, scale: Tensor, qmax: int, compact: bool) -> None:
    before = x.clone()
    found, expected = measured(x, scale, qmax, compact), reference(x, scale, qmax, x.dim() - (4 if compact else 3))
    assert torch.equal(x, before)
    for key in ("saturated", "amax", "lowest"):
        assert getattr(found, key) == expected[key].tolist()
    for h, (signal, noise) in enumerate(zip(expected["signal"].tolist(), expected["noise"].tolist(), strict=True)):
        for units, energy in ((found.signal[h], signal), (found.noise[h], noise)):
            assert abs(10 * math.log10(math.ldexp(units, -UNIT) / energy)) < DECIBELS if energy else units == 0
    assert found.elements == x.numel() // len(found.signal)


STATIC = [(1, 1, 1), (4, 1, 1), (4, 64, 1), (4, 1, 64)]
DYNAMIC = [(2, 3, 4, 1, 1), (2, 3, 4, 1, 64)]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("kept", "compact"), [*((s, c) for s in STATIC for c in (False, True)), *((d, False) for d in DYNAMIC)]
)
def test_figures_are_those_of_the_definition(bits: int, kept: tuple[int, ...], compact: bool) -> None:
    make = torch.Generator().manual_seed(bits)
    qmax = IntFormat(bits).qmax
    x = torch.randn(2, 3, 4, *((2, 32, 32) if compact else (64, 64)), generator=make)
    scale = (1 + torch.rand(*kept, generator=make)) * 2 / qmax  # clips some
    assert_measured(x, fit_scale(scale, x.shape, compact) if len(kept) == 3 else scale, qmax, compact)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
def test_squares_beyond_float32_are_counted(size: float) -> None:
    x = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([size, 1, 1, 1]).view(
        4, 1, 1
    )
    x = x.to(torch.float32)
    assert_measured(x, torch.tensor([[[0.03]]]), QMAX, False)
    assert_measured(x, torch.tensor([1.0e-32, 0.03, 0.03, 0.03]).view(4, 1, 1), QMAX, False)


def test_a_site_of_zeros_and_an_exact_one_have_no_decibels(layer: GatedDeltaNet) -> None:
    quality = shown(layer, [{"q": torch.zeros(1, 1, 2, 64, 32), "k": torch.full((1, 1, 2, 64, 32), 0.01)}])
    for site in ("q", "k"):
        assert [h["sqnr_db"] for h in quality.report()[site]["heads"]] == [None, None]
    assert quality.report()["k"]["heads"][0]["range"] == [0.0, pytest.approx(0.01)]


def test_energies_of_any_size_add_up_exactly(layer: GatedDeltaNet) -> None:
    """In floats the small one would be lost beside the large one."""
    large, small = (torch.full((1, 1, 2, 64, 32), size) for size in (1e12, 1e-12))
    quality = shown(layer, [{"q": large}, {"q": small}])
    alone = shown(layer, [{"q": large}]).state()["q"]["signal"]
    assert [a - b for a, b in zip(quality.state()["q"]["signal"], alone, strict=True)] == shown(
        layer, [{"q": small}]
    ).state()["q"]["signal"]

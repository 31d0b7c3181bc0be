from __future__ import annotations

import math

import pytest
import torch

from qdeltanet.core import QDeltaNetError, relative_error, sqnr, sqnr_from_energy, unknown


def test_sqnr_in_decibels() -> None:
    x = torch.tensor([3.0, -4.0])
    assert sqnr(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-5)
    assert sqnr(x, x) == math.inf
    assert math.isnan(sqnr(torch.zeros(2), x))
    assert sqnr_from_energy(1000.0, 1.0) == pytest.approx(30.0)


def test_int8_of_uniform_noise_has_the_textbook_sqnr() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = 1 / 127
    assert sqnr(x, torch.round(x / scale) * scale) == pytest.approx(20 * math.log10(2 * 127), abs=0.1)


def test_relative_error_is_per_matrix() -> None:
    exact = torch.eye(3).expand(2, 3, 3)
    off = exact.clone()
    off[1, 0, 2] = 3.0
    assert relative_error(exact, off).tolist() == pytest.approx([0.0, 3.0 / math.sqrt(3)])


def test_unknown_names_come_with_the_nearest_ones() -> None:
    error = unknown("site", "k_bta", ["k_beta", "v_beta", "state"])
    assert isinstance(error, QDeltaNetError)
    assert str(error) == "unknown site 'k_bta'; did you mean k_beta or v_beta?"
    assert str(unknown("site", "zzz", ["b", "a"])) == "unknown site 'zzz'; known: a, b"

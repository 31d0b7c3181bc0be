"""The cost model's order of methods against the CPU's: every method verified, the comparison itself exact."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdeltanet.eval.bench import Settings
from qdeltanet.eval.bench.cost import OrderRow, compare_order, inverted_pairs, rank_correlation
from qdeltanet.eval.bench.cpu_profile import measure_cpu
from qdeltanet.profile import load_profile


def row(method: str, predicted: float, measured: float, noise: float = 0.1) -> OrderRow:
    spread = measured - noise, measured + noise
    return OrderRow(method, 64, "int8", predicted, measured, spread, 1.0, 1.0, True, "")


def test_ranks_and_pairs() -> None:
    rows = [row("a", 1, 1), row("b", 2, 3), row("c", 3, 2), row("d", 4, 4)]
    assert rank_correlation(rows) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert list(inverted_pairs(rows)) == [("b", "c")]
    assert list(inverted_pairs([row("a", 1, 1), row("b", 2, 3, 1), row("c", 3, 2)])) == []  # within noise
    assert list(inverted_pairs([row("a", 1.0, 2), row("b", 1.01, 1)])) == []  # a tie by the model


@pytest.mark.parametrize("bits", [8, None])
def test_every_method_is_verified(bits: int | None) -> None:
    """Times are reported, never asserted."""
    order = compare_order(replace(load_profile("cpu"), concurrency=8), 16, bits, Settings(rounds=1))
    assert [r.predicted for r in order.rows] == sorted(r.predicted for r in order.rows)
    assert all(r.verified for r in order.rows), [r.how for r in order.rows]
    assert {r.method for r in order.rows} >= {"block_merge", "neumann", "newton_schulz", "forward_substitution"}
    assert -1 <= order.rank_correlation <= 1


def test_the_profile_names_what_is_measured() -> None:
    numbers = measure_cpu(matrices=4, rounds=1)
    assert all(v > 0 for v in numbers.values())
    assert numbers.keys() <= load_profile("cpu").sources.keys()

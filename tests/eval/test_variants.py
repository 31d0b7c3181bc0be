"""The variants of the laboratory and its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeltanet.eval.bench import plots
from qdeltanet.eval.bench.stability import Request, stability
from qdeltanet.eval.bench.variants import HOLDS, JOINS, variants
from qdeltanet.profile import load_profile

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return variants(16)


def figure(rows: list[dict], name: str, fmt: str) -> float:
    [found] = [r["worst_to_floor"] for r in rows if r["variant"] == name and r["format"] == fmt]
    return float("inf") if found is None else found


def test_each_variant_is_measured_in_each_format(rows: list[dict]) -> None:
    assert len(rows) == 3 * len({r["variant"] for r in rows}) == 3 * (len(JOINS) + len(HOLDS))
    assert all(r["worst_to_floor"] is None or r["worst_to_floor"] > 0.5 for r in rows)


@pytest.mark.parametrize("fmt", ["int16", "int8", "int4"])
def test_the_default_is_within_twice_the_floor(rows: list[dict], fmt: str) -> None:
    assert figure(rows, "eager: tiles of 16, then the rest (default)", fmt) <= 2
    assert figure(rows, "radix 2 in pairs (MBH)", fmt) <= 2
    assert figure(rows, "powers: the chunk at once (MCH)", fmt) > 4


def test_what_holds_registers_matters(rows: list[dict]) -> None:
    """At INT16 a calibrated range clips; at INT8 the proven one wastes codes; the default takes the better."""
    default = "one range per head, as by default"
    assert figure(rows, default, "int16") == figure(rows, "proven range (max beta)", "int16")
    assert figure(rows, default, "int16") * 10 < figure(rows, "one range, no headroom", "int16")
    assert figure(rows, default, "int8") == figure(rows, "one range, headroom 1.25", "int8")
    assert figure(rows, default, "int8") < figure(rows, "proven range (max beta)", "int8")
    assert figure(rows, "carried, dynamic per row or column", "int4") < 0.9 * figure(rows, default, "int4")


def test_eager_is_less_deep(rows: list[dict]) -> None:
    depth = {r["variant"]: r["depth"] for r in rows}
    assert depth["eager: the chunk at once"] == 4
    assert depth["radix 2 in pairs (MBH)"] == 6


def test_pictures_are_drawn_and_the_same_twice(tmp_path: Path) -> None:
    request = Request(("block_merge", "neumann"), ("iid", "ones"), ("int8", "int4"), (16,), tokens=512)
    measured = stability(request)
    profile = load_profile("ascend-910b")
    first = plots.draw(measured, tmp_path / "a", profile)
    second = plots.draw(measured, tmp_path / "b", profile)
    assert [p.name for p in first] == ["powers.png", "methods.png", "cost.png"]
    for one, other in zip(first, second, strict=True):
        content = one.read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 5000
        assert content == other.read_bytes()


def test_cost_points_are_of_int8(tmp_path: Path) -> None:
    request = Request(("block_merge",), ("iid",), ("int8", "int4"), (16,), tokens=512)
    points = plots.cost_points(stability(request), load_profile("ascend-910b"))
    assert points
    assert all(cost > 0 and ratio > 0.5 for cost, ratio in points.values())

"""Profiles: every number has a source; what is wrong is one line that names the file and the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qdeltanet.core import QDeltaNetError
from qdeltanet.profile import ProfileFile, load_profile, parse_profile, shipped_profiles


def content(name: str = "hexagon") -> dict[str, Any]:
    result = yaml.safe_load(shipped_profiles()[name].read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result


def test_what_ships() -> None:
    assert set(shipped_profiles()) == {"ascend-910b", "cpu", "h200", "hexagon"}


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_number_has_a_source(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.tile in (16, 32)
    places = {place for place, _ in ProfileFile.model_validate(content(name)).numbers()}
    assert profile.sources.keys() == places
    assert {"tile", "product_latency", "macs_per_ns.int8", "macs_per_ns.float"} <= places
    assert all(profile.sources.values())
    # a citation, not a number that came from nowhere
    assert sum(not s.startswith("assumption") for s in profile.sources.values()) >= 5


def test_ascend_has_no_int16_product() -> None:
    profile = load_profile("ascend-910b")
    assert profile.unit_of(16, 16) == ("int8", 4)
    assert profile.unit_of(16, 8) == ("int8", 2)
    assert profile.unit_of(4, 4) == ("int4", 1)
    assert profile.unit_of(4, 8) == ("int8", 1)
    assert profile.unit_of(8, None) == ("float", 1)


BAD: list[tuple[str, Any, str]] = [
    ("tile", None, "tile is missing; add it"),
    ("macs_per_ns", None, "macs_per_ns is missing"),
    ("macs_per_ns.int8", None, "macs_per_ns.int8 is missing"),
    ("product_latency.value", None, "product_latency.value is missing"),
    ("product_latency.value", -1, "product_latency: value -1; it must be a positive number"),
    ("concurrency.value", 0, "concurrency: value 0"),
    ("vector_latency.value", "fast", "vector_latency.value: "),
    ("vector_latency.value", float("nan"), "vector_latency: value nan"),
    ("vector_latency.unit", "us", "vector_latency: unit 'us'; write the value in ns"),
    ("macs_per_ns.int8.unit", "TOPS", "macs_per_ns.int8: unit 'TOPS'"),
    ("tile.source", None, "tile: has no source"),
    ("offchip_bytes_per_ns.reason", None, "offchip_bytes_per_ns: an assumption needs a reason"),
    ("tile.value", 16.5, "tile = 16.5; it must be a whole number"),
    ("product_latancy", {"value": 1}, "unknown field 'product_latancy'; did you mean product_latency"),
    ("tile.vale", 3, "unknown field 'tile.vale'; did you mean value"),
    ("macs_per_ns.int6", {"value": 1}, "macs_per_ns.int6"),
    ("version", 2, "version 2: this qdeltanet reads profile version 1"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{p}={v}" for p, v, _ in BAD])
def test_what_is_wrong_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    data = content()
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(QDeltaNetError) as caught:
        load_profile(file)
    text = str(caught.value)
    assert text.startswith("mine.yaml: ")
    assert message in text
    assert "\n" not in text


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(QDeltaNetError, match="unknown profile 'hexagn'; did you mean hexagon"):
        load_profile("hexagn")
    for text in ("a: [", "- 1\n"):
        file = tmp_path / "bad.yaml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(QDeltaNetError, match="bad.yaml: ") as caught:
            load_profile(file)
        assert "\n" not in str(caught.value)


def test_a_source_and_an_assumption_exclude_one_another() -> None:
    data = content()
    data["tile"] = {"value": 16, "unit": "elements", "source": "a data sheet", "assumption": True, "reason": "none"}
    with pytest.raises(QDeltaNetError, match="profile: tile: an assumption needs a reason, and no source"):
        parse_profile(data)

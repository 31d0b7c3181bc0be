"""Hardware profiles: versioned YAML in which every number has its unit and its source, or says that it is assumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ._yaml import read_mapping
from .core import QDeltaNetError, unknown
from .inverse import Profile

VERSION = 1
UNITS = {
    "tile": "elements",
    "float_bytes": "bytes",
    "macs_per_ns": "MAC/ns",
    "product_latency": "ns",
    "vector_latency": "ns",
    "vector_bytes_per_ns": "bytes/ns",
    "onchip_bytes_per_ns": "bytes/ns",
    "offchip_bytes_per_ns": "bytes/ns",
    "concurrency": "matrices",
}
WHOLE = ("tile", "float_bytes")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Number(_Strict):
    """A value in its unit, with a source (data sheet, paper, command) or with `assumption: true` and its reason."""

    value: float
    unit: str
    source: str | None = None
    assumption: bool = False
    reason: str | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Number:
        if not math.isfinite(self.value) or self.value <= 0:
            raise QDeltaNetError(f"value {self.value:g}; it must be a positive number")
        if not self.assumption and not self.source:
            raise QDeltaNetError("has no source; give one, or assumption: true with a reason")
        if self.assumption and (self.source or not self.reason):
            raise QDeltaNetError("an assumption needs a reason, and no source")
        return self

    @property
    def origin(self) -> str:
        return f"assumption: {self.reason}" if self.assumption else str(self.source)


class ProfileFile(_Strict):
    """One YAML file. Fields as in `Profile`."""

    version: Literal[1]
    name: str
    description: str = ""
    tile: Number
    float_bytes: Number
    macs_per_ns: dict[Literal["int4", "int8", "int16", "float"], Number]
    product_latency: Number
    vector_latency: Number
    vector_bytes_per_ns: Number
    onchip_bytes_per_ns: Number
    offchip_bytes_per_ns: Number
    concurrency: Number

    @model_validator(mode="after")
    def _units_are_ours(self) -> ProfileFile:
        for place, number in self.numbers():
            expected = UNITS[place.partition(".")[0]]
            if number.unit != expected:
                raise QDeltaNetError(f"{place}: unit {number.unit!r}; write the value in {expected}")
        self.profile()
        return self

    def numbers(self) -> Iterator[tuple[str, Number]]:
        """(field, number), `macs_per_ns.int8` and so on for the rates."""
        for field in UNITS:
            value = getattr(self, field)
            if isinstance(value, dict):
                yield from ((f"{field}.{unit}", number) for unit, number in value.items())
            else:
                yield field, value

    def profile(self) -> Profile:
        values: dict[str, Any] = {place: number.value for place, number in self.numbers() if "." not in place}
        values |= {place: int(values[place]) for place in WHOLE if values[place].is_integer()}
        rates = {str(unit): number.value for unit, number in self.macs_per_ns.items()}
        sources = {place: number.origin for place, number in self.numbers()}
        return Profile(self.name, macs_per_ns=rates, description=self.description, sources=sources, **values)


def shipped_profiles() -> dict[str, Path]:
    """Profiles in the package, by name."""
    folder = Path(str(files("qdeltanet.recipes") / "profiles"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name, or a YAML file. Raises QDeltaNetError, one line, that names the file and field."""
    where, content = read_mapping("profile", name_or_path, shipped_profiles(), ProfileFile.model_fields)
    return parse_profile(content, where=where)


def parse_profile(content: Mapping[str, Any], where: str = "profile") -> Profile:
    """A profile from plain data. Raises QDeltaNetError, with the nearest valid name for an unknown field."""
    try:
        return ProfileFile.model_validate(content).profile()
    except ValidationError as e:
        raise QDeltaNetError(f"{where}: {_explain(e)}") from e
    except QDeltaNetError as e:
        raise QDeltaNetError(f"{where}: {e}") from e


def _explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    place = ".".join(str(p) for p in first["loc"] if p != "[key]")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, QDeltaNetError):
        return f"{place}: {cause}" if place else str(cause)
    if first["type"] == "missing":
        return f"{place} is missing; add it"
    if first["type"] == "extra_forbidden":
        known = ProfileFile.model_fields if len(first["loc"]) == 1 else Number.model_fields
        return str(unknown("field", place, known))
    if place == "version":
        return f"version {first['input']!r}: this qdeltanet reads profile version {VERSION}"
    return f"{place}: {first['msg']} (got {first['input']!r})"


__all__ = ["Number", "ProfileFile", "load_profile", "parse_profile", "shipped_profiles"]

"""A whole recipe, and the schemes that it stands for, layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from ..core import (
    Granularity,
    IntFormat,
    ProjectionScheme,
    QDeltaNetError,
    RuleScheme,
    ScaleSource,
    SiteScheme,
    unknown,
)
from ..delta_rule import SITES, LayerScheme, rule_sites
from ..inverse import Plan
from .sections import (
    OPTIONS,
    ROLES,
    InverseConfig,
    LayerConfig,
    ObserverConfig,
    ProjectionConfig,
    Rotations,
    SiteConfig,
    Strict,
)

LAYERS = 1000  # more than any model has


class Recipe(Strict):
    """A whole recipe. `layers` maps a layer index or a glob over indices to overrides."""

    version: Literal[1] = 1
    name: str = "unnamed"
    description: str = ""
    chunk_size: int = 64
    requantize: Literal["float", "fixed_point", "power_of_two"] = "float"
    accumulator_bits: Literal[32, 64] = 64
    decay: Literal["exp", "exp2"] = "exp"
    rotate: Rotations = ()
    observer: ObserverConfig = ObserverConfig()
    sites: dict[str, SiteConfig] = Field(default_factory=lambda: {"*": SiteConfig(format="int8")})
    inverse: InverseConfig = InverseConfig()
    projections: dict[str, ProjectionConfig | None] = Field(default_factory=dict)
    layers: dict[str, LayerConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _resolves(self) -> Recipe:
        """Every pattern must name something, and every layer's plan must build."""
        self.layer(0)
        for key, override in self.layers.items():
            if override.inverse:
                self._inverse(override)
            if not key or not all(c in "0123456789*?[]-" for c in key):
                raise QDeltaNetError(f"layers: {key!r} must be a layer index or a glob over indices, e.g. '3' or '1*'")
        return self

    @property
    def schemes(self) -> list[LayerScheme]:
        """Every scheme that a layer may have: without overrides, and with those that meet at some index."""
        indices: dict[tuple[str, ...], int] = {}
        for index in range(LAYERS):
            indices.setdefault(tuple(key for key in self.layers if fnmatchcase(str(index), key)), index)
        return [self.layer(index) for index in indices.values()]

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized, in any layer."""
        return all(one.rule is None and not one.projections for one in self.schemes)

    @property
    def codes_by_data(self) -> bool:
        """Whether any projection's weights are coded for the calibration data."""
        sections = (self.projections, *(o.projections for o in self.layers.values()))
        return any(c is not None and c.method == "gptq" for section in sections for c in section.values())

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that changes a result (name and description do not)."""
        content = self.model_dump(mode="json", exclude={"name", "description"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def layer(self, index: int) -> LayerScheme:
        """The scheme of decoder layer `index`. Raises QDeltaNetError for what does not resolve."""
        overrides = [o for key, o in self.layers.items() if fnmatchcase(str(index), key)]
        inverse, chunk_size, rotate = self.inverse, self.chunk_size, self.rotate
        patterns: list[tuple[str, SiteConfig]] = list(self.sites.items())
        projections = dict(self.projections)
        for o in overrides:
            inverse = self._inverse(o, inverse)
            chunk_size = o.chunk_size or chunk_size
            rotate = rotate if o.rotate is None else o.rotate
            patterns += o.sites.items()
            projections |= o.projections
        built = inverse.plan(chunk_size)
        sites = _site_schemes(built, patterns, inverse, other_plan=any(o.inverse for o in overrides))
        rule = None
        if any(s.format is not None for s in sites.values()):
            rule = RuleScheme(sites, self.requantize, self.accumulator_bits, self.decay, frozenset(rotate))
        return LayerScheme(built, rule, _projection_schemes(projections), inverse.rescale == "shared", inverse.headroom)

    def observers(self, index: int) -> dict[str, ObserverConfig]:
        """What proposes the static range of each site of decoder layer `index`."""
        overrides = [o for key, o in self.layers.items() if fnmatchcase(str(index), key)]
        names = rule_sites(self.layer(index).plan)
        chosen = dict.fromkeys(names, self.observer)
        for patterns in (self.sites, *(o.sites for o in overrides)):
            for pattern, config in patterns.items():
                if config.observer is not None:
                    chosen |= dict.fromkeys(_named(pattern, names), config.observer)
        return chosen

    def _inverse(self, override: LayerConfig, base: InverseConfig | None = None) -> InverseConfig:
        """A changed method drops the options of the one before."""
        content = (base or self.inverse).model_dump(exclude_none=True)
        if override.inverse.get("method", content["method"]) != content["method"]:
            content = {k: v for k, v in content.items() if k not in OPTIONS}
        return InverseConfig.model_validate(content | override.inverse)

    def to_yaml(self) -> str:
        """Fully resolved, every default written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True))


def _site_schemes(
    built: Plan, patterns: Iterable[tuple[str, SiteConfig]], inverse: InverseConfig, other_plan: bool
) -> dict[str, SiteScheme]:
    """Later patterns override earlier ones field by field; registers start from the `inverse` section.

    other_plan: a layer with its own plan need not have every register that the recipe names.
    """
    registers = {"format": inverse.format, "scale": inverse.scale, "granularity": inverse.granularity}
    start = {k: v for k, v in (registers | {"carry": inverse.carry}).items() if v is not None}
    names = rule_sites(built)
    merged: dict[str, dict[str, Any]] = {n: dict(start) if n not in SITES else {} for n in names}
    for pattern, config in patterns:
        hits, in_inverse = _named(pattern, names), pattern.startswith("inverse.")
        if not hits and not (in_inverse and (other_plan or set(pattern) & set("*?["))):
            raise unknown("site", pattern, names)
        for name in hits:
            merged[name] |= config.model_dump(exclude_none=True)
    for name, values in merged.items():
        if "format" not in values:
            raise QDeltaNetError(f"site {name} has no format; add it, or a pattern such as '*': {{format: int8}}")
    return {name: _scheme(values) for name, values in merged.items()}


def _named(pattern: str, names: Iterable[str]) -> list[str]:
    """Sites that a pattern names: registers of the inverse only where it starts with `inverse.`."""
    in_inverse = pattern.startswith("inverse.")
    return [n for n in names if fnmatchcase(n, pattern) and (n not in SITES) == in_inverse]


def _scheme(values: Mapping[str, Any]) -> SiteScheme:
    def parse(key: str) -> IntFormat | None:
        value = values.get(key)
        return None if value in (None, "float") else IntFormat.parse(value)

    source: ScaleSource = values.get("scale", "calibrated")
    kept = Granularity(values.get("granularity", "per_head"))
    return SiteScheme(parse("format"), source, kept, parse("carry"), parse("feedback"))


def _projection_schemes(projections: Mapping[str, ProjectionConfig | None]) -> dict[str, ProjectionScheme]:
    result = {}
    for pattern, config in projections.items():
        roles = [r for r in ROLES if fnmatchcase(r, pattern)]
        if not roles:
            raise unknown("projection", pattern, ROLES)
        if "conv" in roles and pattern == "conv":
            raise QDeltaNetError("projection conv: the convolution stays in float in this version; leave it out")
        for role in roles:
            if config is not None and role != "conv":
                result[role] = config.scheme()
            else:
                result.pop(role, None)
    return result

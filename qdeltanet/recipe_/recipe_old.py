"""Recipes: versioned YAML that says how every site, the inverse and the projections are quantized.

Reading goes file or shipped name -> overrides (`--set a.b=c`) -> `Recipe` -> `Recipe.layer(i)`, a `LayerScheme`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ._yaml import read_mapping
from .core import (
    ROTATIONS,
    Granularity,
    IntFormat,
    ProjectionScheme,
    QDeltaNetError,
    RuleScheme,
    ScaleSource,
    SiteScheme,
    unknown,
)
from .delta_rule import SITES, LayerScheme, rule_sites
from .inverse import METHODS, Plan, plan

VERSION = 1
ROLES = ("proj.qkv", "proj.z", "proj.out", "proj.a", "proj.b", "conv")
Source = Literal["calibrated", "dynamic", "bound"]
Kept = Literal["per_tensor", "per_head", "per_token", "per_channel", "finest"]
OPTIONS = (
    "radices",
    "join",
    "diagonal",
    "leaf",
    "order",
    "band",
    "residual_steps",
    "residual_sum",
    "block",
    "iterations",
    "start",
    "form",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_format(name: str | None) -> str | None:
    if name not in (None, "float"):
        IntFormat.parse(str(name))
    return name


def _check_rotations(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in ROTATIONS:
            raise unknown("rotation", name, ROTATIONS)
    return tuple(r for r in ROTATIONS if r in names)


Rotations = Annotated[tuple[str, ...], AfterValidator(_check_rotations)]


class ObserverConfig(_Strict):
    """Which observer proposes static ranges: the maximum, a percentile of |x| over everything that one scale covers, or
    the range of least mean square error in the site's format."""

    kind: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=0, le=100)


class SiteConfig(_Strict):
    """One line of `sites`: what is not given is inherited from an earlier pattern."""

    format: str | None = None
    scale: Source | None = None
    granularity: Kept | None = None
    carry: str | None = None
    observer: ObserverConfig | None = None

    _formats = field_validator("format", "carry")(_check_format)


class InverseConfig(_Strict):
    """The inverse's method with its options, and how its registers are held."""

    method: str = "block_merge"
    radices: tuple[int, ...] | None = None
    join: str | None = None
    diagonal: str | None = None
    leaf: int | None = None
    order: int | None = None
    band: int | Literal["none"] | None = None
    residual_steps: int | None = None
    residual_sum: str | None = None
    block: int | None = None
    iterations: int | None = None
    start: str | None = None
    form: str | None = None
    format: str = "int8"
    scale: Source = "calibrated"
    granularity: Kept = "per_head"
    carry: str | None = None
    rescale: Literal["per_register", "shared"] = "per_register"
    headroom: float = Field(default=1.0, ge=1, le=16)

    _formats = field_validator("format", "carry")(_check_format)

    @model_validator(mode="after")
    def _known_method(self) -> InverseConfig:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        return self

    def plan(self, chunk_size: int) -> Plan:
        """Options of another method than the chosen one are refused."""
        return plan(self.method, chunk_size, **{k: getattr(self, k) for k in OPTIONS})


class ProjectionConfig(_Strict):
    """INT weights per output channel and integer activations."""

    weight: str = "int8"
    activation: str = "int8"
    scale: Literal["dynamic", "calibrated"] = "dynamic"

    _formats = field_validator("weight", "activation")(_check_format)

    def scheme(self) -> ProjectionScheme:
        kept = Granularity.PER_TOKEN if self.scale == "dynamic" else Granularity.PER_TENSOR
        return ProjectionScheme(
            IntFormat.parse(self.weight), SiteScheme(IntFormat.parse(self.activation), self.scale, kept)
        )


class LayerConfig(_Strict):
    """Overrides for some layers: only what differs from the recipe. Keys as in the recipe itself."""

    chunk_size: int | None = None
    rotate: Rotations | None = None
    sites: dict[str, SiteConfig] = {}
    inverse: dict[str, Any] = {}
    projections: dict[str, ProjectionConfig | None] = {}


class Recipe(_Strict):
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
    sites: dict[str, SiteConfig] = {"*": SiteConfig(format="int8")}
    inverse: InverseConfig = InverseConfig()
    projections: dict[str, ProjectionConfig | None] = {}
    layers: dict[str, LayerConfig] = {}

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
    def is_float(self) -> bool:
        """Whether nothing of the rule is quantized."""
        return self.layer(0).rule is None and not self.projections

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
    return SiteScheme(parse("format"), source, Granularity(values.get("granularity", "per_head")), parse("carry"))


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


# -- reading -----------------------------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the recipes that ship."""
    from . import recipes

    folder = Path(recipes.__file__).parent
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a YAML file; overrides are `key.path=value` strings, values in YAML.

    Raises QDeltaNetError that names the file, key and nearest valid name.
    """
    where, content = read_mapping("recipe", name_or_path, shipped_recipes(), Recipe.model_fields)
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(content, where=where)


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises QDeltaNetError, with the nearest valid name for an unknown key."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as e:
        raise QDeltaNetError(f"{where}: {_explain(e)}") from e
    except QDeltaNetError as e:
        raise QDeltaNetError(f"{where}: {e}") from e


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set `inverse.residual_steps=4` in plain recipe data. Site names hold dots: `sites.inverse.L16.format=int4`."""
    path, equals, text = override.partition("=")
    parts = _split_path(path.strip().split("."))
    if not equals or not all(parts):
        raise QDeltaNetError(f"--set {override!r}: write it as key=value, e.g. inverse.residual_steps=4")
    node = content
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise QDeltaNetError(f"--set {override!r}: {part} holds a value, not keys")
    if parts[-1] == "method" and node.get("method") != text:
        for option in OPTIONS:  # options of the method before do not fit another
            node.pop(option, None)
    node[parts[-1]] = yaml.safe_load(text)


def _split_path(parts: list[str]) -> list[str]:
    for name in ("sites", "projections"):
        if name in parts and len(parts) - parts.index(name) > 3:
            i = parts.index(name) + 1
            return [*parts[:i], ".".join(parts[i:-1]), parts[-1]]
    return parts


def _explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    place = ".".join(str(p) for p in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, QDeltaNetError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return str(
            unknown(f"key in {'.'.join(map(str, first['loc'][:-1])) or 'the recipe'}", key, _keys_at(first["loc"][:-1]))
        )
    if place == "version":
        return f"version {first['input']!r}: this qdeltanet reads recipe version {VERSION}"
    return f"{place}: {first['msg']} (got {first['input']!r})"


def _keys_at(loc: Sequence[Any]) -> Iterable[str]:
    """Valid keys of the section at a validation error's place."""
    sections: dict[str, type[BaseModel]] = {
        "sites": SiteConfig,
        "inverse": InverseConfig,
        "observer": ObserverConfig,
        "projections": ProjectionConfig,
        "layers": LayerConfig,
    }
    names = [str(p) for p in loc if str(p) in sections]
    return (sections[names[-1]] if names else Recipe).model_fields


def differences(a: Recipe, b: Recipe) -> list[str]:
    """`key: value in a / value in b` for every value that differs."""
    one, two = (_flat(r.model_dump(mode="json", exclude={"name", "description"})) for r in (a, b))
    keys = sorted(one.keys() | two.keys())
    return [f"{k}: {one.get(k)} / {two.get(k)}" for k in keys if one.get(k) != two.get(k)]


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {k: v for key, part in content.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


__all__ = ["ROLES", "Recipe", "apply_override", "differences", "load_recipe", "parse_recipe", "shipped_recipes"]

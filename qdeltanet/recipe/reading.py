"""Reading recipes: files and shipped names, overrides, errors in one line, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .._yaml import read_mapping
from ..core import QDeltaNetError, unknown
from .recipe import Recipe
from .sections import OPTIONS, VERSION, InverseConfig, LayerConfig, ObserverConfig, ProjectionConfig, SiteConfig


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the recipes that ship."""
    from .. import recipes

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
    """Names of sites and roles hold dots: one key each, before the fields of theirs that follow."""
    for section, config in (("sites", SiteConfig), ("projections", ProjectionConfig)):
        if section not in parts[:-1]:
            continue
        start = parts.index(section) + 1
        fields = [i for i in range(start + 1, len(parts)) if parts[i] in config.model_fields]
        dotted = section == "projections" or parts[start] == "inverse"
        end = fields[0] if fields else len(parts) if dotted else start + 1
        return [*parts[:start], ".".join(parts[start:end]), *parts[end:]]
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
    if first["type"] == "model_type":
        return f"{place}: {first['input']!r} is a value, and keys belong there: {', '.join(_keys_at(first['loc']))}"
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
    one, two = (flat(r.model_dump(mode="json", exclude={"name", "description"})) for r in (a, b))
    keys = sorted(one.keys() | two.keys())
    return [f"{k}: {one.get(k)} / {two.get(k)}" for k in keys if one.get(k) != two.get(k)]


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data by dotted keys."""
    if not isinstance(content, dict):
        return {prefix: content}
    return {k: v for key, part in content.items() for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()}

"""A finished search on disk: the recipe, the Pareto front as JSON, and its picture."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..._pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, png
from ...core.files import sha256_file, write_bytes, write_text
from ...inverse import Profile
from ...recipe import Recipe
from .run import Found


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.search.json")


def pareto_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.pareto.json")


def picture_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.pareto.png")


def named(found: Found, name: str, profile: Profile, budget: float) -> Recipe:
    """The recipe with its name, and what it was found for."""
    point = found.point
    text = (
        f"Found by search on profile {profile.name} within {budget:.4g} nats per token: modelled cost "
        f"{point.cost:.4g} ns per token of all rules ({found.base.name}: {found.base.cost:.4g}), measured loss "
        f"{point.loss.kl:.4g} nats per token ({found.base.name}: {found.base.loss.kl:.4g})."
    )
    return found.recipe.model_copy(update={"name": name, "description": text})


def content(found: Found, profile: Profile, budget: float, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON file says, but for the recipe's hash; null stands for an infinite loss."""
    whole = {
        "version": 1,
        "budget": budget,
        "units": {"cost": "ns per token, all rules", "loss": "nats per token over float"},
        "chosen": found.point.as_dict(),
        "base": found.base.as_dict(),
        "references": [p.as_dict() for p in found.references],
        "left_out": list(found.left_out),
        "front": [p.as_dict() for p in found.front],
        "singles": found.singles,
        "profile": {"name": profile.name, "numbers": numbers(profile), "sources": dict(profile.sources)},
        "request": request,
    }
    return dict(plain(whole))


def numbers(profile: Profile) -> dict[str, Any]:
    """Everything in a profile that changes a cost."""
    values = asdict(replace(profile, sources={}))
    return {k: v for k, v in values.items() if k not in ("name", "sources")}


def is_complete(output: Path, request: Mapping[str, Any], budget: float) -> bool:
    """Whether the output is the recipe that this request and budget would give, with its files beside it."""
    try:
        there = json.loads(pareto_path(output).read_text(encoding="utf-8"))
        same = there["request"] == plain(request) and there["budget"] == budget
        return same and there["recipe_sha256"] == sha256_file(output) and picture_path(output).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(output: Path, recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Picture, JSON and, last, the recipe; each appears whole or not at all. Raises QDeltaNetError."""
    text = recipe.to_yaml()
    whole = {**result, "recipe_sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_bytes(picture_path(output), picture(result))
    write_text(pareto_path(output), json.dumps(whole, indent=1, allow_nan=False) + "\n")
    write_text(output, text)


def plain(value: Any) -> Any:
    """As JSON gives it back; it has no infinity, and null stands for one."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG of loss over cost: the recipes measured, the chosen one, base and references, the budget."""
    figure = new_figure(7, 4.5, dpi=150)
    axes = figure.add_subplot()
    _scatter(axes, result["front"], "measured", "o", BLUE, 28)
    for point, marker, colour in zip(result["references"], "^vD", (ORANGE, PURPLE, GREY), strict=False):
        _scatter(axes, [point], point["name"], marker, colour, 70)
    _scatter(axes, [result["base"]], f"{result['base']['name']} (base)", "s", "black", 60)
    _scatter(axes, [result["chosen"]], "chosen", "*", GREEN, 180)
    axes.axhline(result["budget"], color=GREY, linestyle="--", linewidth=1, label="budget")
    axes.set(xlabel="modelled cost of all rules, ns per token", ylabel="loss over float, nats per token", yscale="log")
    axes.set_title(f"{result['profile']['name']}: cost against loss")
    axes.legend()
    return png(figure)


def _scatter(axes: Any, points: Sequence[Mapping[str, Any]], label: str, marker: str, colour: str, size: int) -> None:
    shown = [(p["cost"], max(p["loss"]["kl"], 1e-9)) for p in points if p["loss"]["kl"] is not None]
    if shown:
        x, y = zip(*shown, strict=True)
        axes.scatter(x, y, s=size, marker=marker, color=colour, label=label, zorder=3)

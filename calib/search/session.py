"""One search with its files: goes on where it was cut off, and says when there is nothing left to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...core import QDeltaNetError
from ...core.files import check_file
from ...delta_rule import Dimensions, LayerScheme, rule_cost
from ...inverse import Profile
from ...models import execution_device, model_fingerprint, weights_digest
from ...recipe import Recipe, load_recipe
from ..data import Samples
from ..request import device_name, digest, versions
from .candidates import candidates
from .harness import Harness
from .journal import VERSION, Journal
from .report import content, is_complete, journal_path, named, numbers, plain, write
from .run import Progress, search
from .stages import Settings

REFERENCES = ("neumann-int8", "int8")


def search_to(
    output: Path,
    model: Any,
    base: Recipe,
    samples: Samples,
    profile: Profile,
    budget: float,
    settings: Settings,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Search and write `output` (YAML), `<stem>.pareto.json`, `<stem>.pareto.png`; `<stem>.search.json` holds every
    measurement on the way. Returns what the JSON file says, or None if all is there already.

    budget: nats per token over float. The same request goes on from its measurements; with another budget only the
    choice is made again. Raises QDeltaNetError as `search` does, if the files are of another request (unless
    `overwrite`), or cannot be written.
    """
    candidates(base.chunk_size, settings.methods, settings.formats)  # names are checked before the work starts
    _check_name(output)
    harness = Harness(model, base, samples, batch_size)
    request = _request(model, base, samples, profile, settings, batch_size)
    if is_complete(output, request, budget):
        return None
    journal = Journal(journal_path(output), request, overwrite)
    _check_free(output, overwrite)

    def price(scheme: LayerScheme, dims: Dimensions) -> float:
        return rule_cost(scheme, dims, profile).per_token.total

    references = [load_recipe(name) for name in REFERENCES if name != base.name]
    found = search(harness, base, price, budget, settings, journal=journal, references=references, progress=progress)
    result = content(found, profile, budget, request)
    write(output, named(found, output.stem, profile, budget), result)
    return result


def _request(
    model: Any, base: Recipe, samples: Samples, profile: Profile, settings: Settings, batch_size: int
) -> dict[str, Any]:
    """All that the measurements depend on; the budget is not part of it."""
    return {
        "model": {"fingerprint": model_fingerprint(model), "weights": weights_digest(model)},
        "recipe": base.fingerprint,
        "dataset": {"name": samples.name, "shape": list(samples.tokens.shape), "sha256": samples.digest},
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(execution_device(model)),
        "versions": versions() | {"journal": VERSION},
        "threads": torch.get_num_threads(),  # sums of floats depend on it
        "profile": {"name": profile.name, "sha256": digest(numbers(profile))},
        "settings": plain(asdict(settings)),
    }


def _check_name(output: Path) -> None:
    if output.is_dir():
        raise QDeltaNetError(f"output {output} is a directory; name a file, e.g. {output / 'recipe.yaml'}")
    if output.suffix not in (".yaml", ".yml"):
        raise QDeltaNetError(f"output {output}: a recipe is a YAML file; name it {output.stem}.yaml")
    check_file(output)


def _check_free(output: Path, overwrite: bool) -> None:
    """A recipe that is there may only be replaced when asked; its measurements are used again where they fit."""
    if output.exists() and not overwrite:
        raise QDeltaNetError(
            f"{output} is there already, for another budget or not of a search: pass --overwrite (measurements are "
            "kept), or name another file"
        )

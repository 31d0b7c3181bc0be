"""All that a calibration depends on to the bit, and how two such requests differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from .._version import __version__
from ..recipe import Recipe, flat
from .data import Samples

SHOWN = 40  # characters of a value in a refusal


def request_of(
    *,
    model_name: str,
    fingerprint: str,
    weights: str | None,
    dtype: torch.dtype,
    device: torch.device,
    recipe: Recipe,
    samples: Samples,
    batch_size: int,
    threads: int,
) -> dict[str, Any]:
    """Plain data that a report begins with and that the state of an interrupted calibration must equal.

    weights: digest of the model's files. threads: of torch on the CPU, on which the order of its float sums depends.
    """
    return {
        "model": {
            "name": model_name,
            "fingerprint": fingerprint,
            "weights": weights,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "recipe": {"name": recipe.name, "fingerprint": recipe.fingerprint},
        "dataset": {**samples.described(), "batch_size": batch_size},
        "environment": {"device": device_name(device), "threads": threads, "versions": versions()},
    }


def device_name(device: torch.device) -> str:
    """Kernels are chosen by it: equal names, equal bits."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    module: Any = getattr(torch, device.type, None)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def versions() -> dict[str, str]:
    """Of what computes the float model."""
    return {"qdeltanet": __version__} | {name: version(name) for name in ("torch", "transformers")}


def digest(content: Any) -> str:
    """sha256 over data as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def difference(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """`settings.keep was 12, is 3`, joined by semicolons; of long values (hashes) only that they differ. Or empty."""
    old, new = flat(there), flat(asked)
    found = []
    for key in {**old, **new}:
        was, now = (str(x.get(key)) for x in (old, new))
        if was != now:
            found.append(f"{key} differs" if max(len(was), len(now)) > SHOWN else f"{key} was {was}, is {now}")
    return "; ".join(found)

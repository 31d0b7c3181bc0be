"""Names of the models and data sets that ship with the program, and where they lie."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..core import QDeltaNetError

_HERE = Path(__file__).resolve().parent

MODELS: dict[str, str] = {name: str(_HERE / "models" / name) for name in ("tiny-recall", "tiny-hybrid")}

DATASETS: dict[str, str] = {name: str(_HERE / "data" / f"{name}-calibration.jsonl") for name in ("recall", "bytes")}

HELD_OUT_BYTES = str(_HERE / "data" / "bytes-heldout.jsonl")


def model_path(name_or_path: str) -> str:
    """The directory of an embedded model; anything else (a directory, a hub id) is returned as it is.

    Raises:
        QDeltaNetError: if an embedded model's name was probably meant; it says which.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path]
    looks_like_a_name = "/" not in name_or_path and not Path(name_or_path).exists()
    near = difflib.get_close_matches(name_or_path, MODELS, n=1, cutoff=0.5)
    if looks_like_a_name and near:
        raise QDeltaNetError(f"unknown model '{name_or_path}': did you mean '{near[0]}'?")
    return name_or_path


def dataset_path(name_or_path: str) -> str:
    """The file of an embedded calibration set (JSON lines with the field `text`); anything else as it is."""
    return DATASETS.get(name_or_path, name_or_path)

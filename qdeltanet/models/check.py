"""A checkpoint that is not what it says is refused: transformers warns, fills up with random weights and goes on."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 3
_FLOATS = {"F64", "F32", "F16", "BF16"}
_WEIGHTS = (".weight", ".bias", ".A_log", ".dt_bias")
_LAYER = re.compile(r"^(.*?\blayers)\.\d+\.")


def check_files(folder: Path) -> None:
    """Every safetensors file that a local checkpoint names is there and whole, and its weights are floats.

    Floats of 16 bits and more may be mixed: loading converts them. Weights of other types are refused unless the config
    says how they are quantized. Raises QDeltaNetError that names file and tensor.
    """
    quantized = "quantization_config" in _json(folder / "config.json")
    for file in weight_files(folder):
        if not file.is_file():
            raise QDeltaNetError(f"model {str(folder)!r}: {file.name} is missing, and {INDEX} names it; fetch it again")
        odd = [] if quantized else [f"{name} ({kind})" for name, kind in _types(file) if kind not in _FLOATS]
        if odd:
            raise QDeltaNetError(
                f"model {str(folder)!r}: {file.name} holds weights that are no floats, and config.json does not say "
                f"how they are quantized: {_listed(odd)}"
            )


def weight_files(folder: Path) -> list[Path]:
    """As transformers chooses them: one file before an index."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    names = _json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise QDeltaNetError(f"model {str(folder)!r}: {INDEX} has no weight_map; fetch it again")
    return [folder / name for name in sorted(set(names.values()))]


def _types(file: Path) -> list[tuple[str, str]]:
    """The weights of a file with their types; reads the header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith(_WEIGHTS)]  # noqa: SIM118 (not a dict)
            return [(name, opened.get_slice(name).get_dtype()) for name in names]
    except (SafetensorError, OSError) as e:
        raise QDeltaNetError(
            f"model {str(file.parent)!r}: {file.name} is damaged ({str(e).splitlines()[0]}); fetch it again"
        ) from e


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise QDeltaNetError(f"model {str(file.parent)!r}: {file.name} cannot be read ({e})") from e
    return content if isinstance(content, dict) else {}


def check_loaded(name: str, model: Any, info: dict[str, Any]) -> None:
    """What transformers says of a loading, and the weights themselves.

    info: of `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`. Refused are weights that
    are missing, have another shape, have no place in a decoder layer (a number of layers or a quantization that the
    config does not tell), or are not finite in the model's dtype. Offloaded weights are not looked at.
    Raises QDeltaNetError that names them.
    """
    where = f"model {name!r}"
    if missing := info["missing_keys"]:
        raise QDeltaNetError(f"{where}: the checkpoint lacks {_listed(missing)}; fetch it again")
    if wrong := info["mismatched_keys"]:
        shapes = [f"{key} is {list(found)}, the config wants {list(wanted)}" for key, found, wanted in wrong]
        raise QDeltaNetError(f"{where}: the checkpoint does not fit config.json: {_listed(shapes)}")
    if homeless := _homeless(model, info["unexpected_keys"]):
        raise QDeltaNetError(f"{where}: config.json has no place for {_listed(homeless)} of the checkpoint")
    config = getattr(model.config, "quantization_config", None)
    if config is not None and getattr(model, "hf_quantizer", None) is None:
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise QDeltaNetError(f"{where}: it is quantized by {method!r}, which is not installed")
    if bad := [key for key, tensor in model.named_parameters() if not _is_finite(tensor)]:
        raise QDeltaNetError(f"{where}: NaN or infinite in {model.dtype}: {_listed(bad)}; try --dtype float32")


@contextmanager
def quiet_report() -> Iterator[None]:
    """Without transformers' table of what is missing: `check_loaded` says it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def says_more(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in (text := record.getMessage()) or "CONVERSION" in text

    logger.addFilter(says_more)
    try:
        yield
    finally:
        logger.removeFilter(says_more)


def _homeless(model: Any, keys: Iterable[str]) -> list[str]:
    """Those that would stand in a list of decoder layers that the model has; other parts (vision, MTP) may be left."""
    lists = {path for path, _ in model.named_modules() if path.rpartition(".")[2] == "layers"}
    return [key for key in keys if (place := _LAYER.match(key)) and place[1] in lists]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # no copy, unlike isfinite
    return bool(low.isfinite() & high.isfinite())


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more

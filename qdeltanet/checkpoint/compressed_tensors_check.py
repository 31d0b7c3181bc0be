"""Whether a compressed-tensors directory is whole: what transformers only warns about, and vLLM meets at run time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import QDeltaNetError
from .foreign import fused_siblings
from .opened import FLOATS, Opened, Wanted, well_formed
from .packing import WORD

METHOD = "compressed-tensors"


def check_compressed_tensors(path: Path) -> None:
    """Check a directory: every projection's tensors, dtypes and shapes, groups of fused ones, the side folder.

    Raises QDeltaNetError that lists every mismatch.
    """
    with well_formed(path):
        _check(Opened(path))


def _check(opened: Opened) -> None:
    config = opened.config.get("quantization_config") or {}
    if config.get("quant_method") != METHOD:
        raise QDeltaNetError(f"{opened.path}: quant_method is {config.get('quant_method')!r}, not {METHOD!r}")
    problems, groups = list[str](), dict[str, str]()
    for group, scheme in config.get("config_groups", {}).items():
        for name in scheme["targets"]:
            groups[name] = group
            problems += opened.misfits(name, _wanted(opened, name, scheme))
    ignored = [n for n in config.get("ignore", []) if f"{n}.weight" in opened.headers]  # a tied lm_head has no tensor
    problems += [p for n in ignored for p in opened.misfits(n, {"weight": (FLOATS, None)})]
    listed = {*groups, *config.get("ignore", [])}
    named = {n.rpartition(".")[0] for n, (_, dtype) in opened.headers.items() if dtype not in FLOATS}
    problems += [f"{n} has integers, and no group targets it" for n in sorted(named - listed)]
    for siblings in fused_siblings(listed):
        problems += _fused_problems(opened, siblings, groups)
    opened.refuse(problems, METHOD)


def _wanted(opened: Opened, name: str, scheme: Mapping[str, Any]) -> Wanted:
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    if inputs is None:
        rows, columns = _packed_shape(opened, name)
        words = -(-columns * weights["num_bits"] // WORD)
        wanted: dict[str, Any] = {
            "weight_packed": (frozenset({"I32"}), (rows, words)),
            "weight_shape": (frozenset({"I64"}), (2,)),
        }
    else:
        rows, columns = opened.shape(f"{name}.weight") or (0, 0)
        wanted = {"weight": (frozenset({"I8"}), None)}
    per_scale = weights.get("group_size") or columns or 1
    wanted["weight_scale"] = (FLOATS, (rows, columns // per_scale))
    if inputs is not None and not inputs["dynamic"]:
        wanted["input_scale"] = (FLOATS, (1,))
    return wanted


def _packed_shape(opened: Opened, name: str) -> tuple[int, int]:
    if opened.shape(f"{name}.weight_shape") != (2,):
        return 0, 0
    rows, columns = opened.tensor(f"{name}.weight_shape").tolist()
    return rows, columns


def _fused_problems(opened: Opened, siblings: list[str], groups: Mapping[str, str]) -> list[str]:
    if len({groups.get(n) for n in siblings}) > 1:
        return [f"{', '.join(siblings)} run as one in vLLM and belong to different groups"]
    scales = [f"{n}.input_scale" for n in siblings if f"{n}.input_scale" in opened.headers]
    if len({float(opened.tensor(n)) for n in scales}) > 1:
        return [f"{', '.join(scales)} differ, and run as one in vLLM"]
    return []

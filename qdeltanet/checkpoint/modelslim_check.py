"""Whether a ModelSlim directory is whole: every tensor described, dtypes, shapes, and what follows from others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError
from .foreign import fused_groups
from .opened import FLOATS, Opened, Wanted, well_formed

DESCRIPTION = "quant_model_description.json"
FLOAT, STATIC, DYNAMIC = "FLOAT", "W8A8", "W8A8_DYNAMIC"
KINDS = (FLOAT, STATIC, DYNAMIC)


def deq_scale_in(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """float32 [out] as a runtime of this dtype reads it: a float16 one wants the float's bits in an int64."""
    return scale.view(torch.int32).to(torch.int64) if dtype == torch.float16 else scale


def float_of(deq_scale: Tensor) -> Tensor:
    """The inverse of `deq_scale_in`."""
    return deq_scale.to(torch.int32).view(torch.float32) if deq_scale.dtype == torch.int64 else deq_scale


def quant_bias(weight: Tensor, input_offset: Tensor, deq_scale: Tensor, bias: Tensor | None) -> Tensor:
    """round(bias / deq_scale - sum over in of weight * input_offset), int32 [out]; weight int8 [out, in].

    Raises QDeltaNetError where that leaves int32.
    """
    shift = weight.to(torch.int64).sum(1) * input_offset.to(torch.int64)
    scaled = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double() / deq_scale.double()
    found = torch.round(scaled - shift)
    if bool((found.abs() >= 1 << 31).any()):
        raise QDeltaNetError("quant_bias does not fit int32: a bias is too large for its scales; leave it in float")
    return found.to(torch.int32)


def check_modelslim(path: Path) -> None:
    """Check a directory: an entry for every tensor and every shard of a fused module, their dtypes and shapes, that
    deq_scale = input_scale * weight_scale, and the formula of quant_bias. Raises QDeltaNetError that lists every
    mismatch.
    """
    with well_formed(path):
        _check(Opened(path))


def _check(opened: Opened) -> None:
    description = {k: v for k, v in opened.json(DESCRIPTION).items() if k in opened.headers or "." in k}
    problems = [f"{k} is {v!r}, expected one of {', '.join(KINDS)}" for k, v in description.items() if v not in KINDS]
    problems += [f"{name} has no entry in {DESCRIPTION}" for name in sorted(opened.headers.keys() - description.keys())]
    tied = {"lm_head.weight"} if opened.config.get("tie_word_embeddings") else set()  # described, and no tensor
    absent = sorted(description.keys() - opened.headers.keys() - tied)
    problems += [f"{name} is described, and no file has it" for name in absent]
    kinds = {name.rpartition(".")[0]: kind for name, kind in description.items() if name.endswith(".weight")}
    for name, kind in kinds.items():
        problems += _module_problems(opened, name, kind)
    problems += _fused_problems(kinds)
    floats = {n for n, (_, dtype) in opened.headers.items() if dtype not in FLOATS}
    problems += [f"{n} holds integers, and is {FLOAT}" for n in sorted(floats) if description.get(n) == FLOAT]
    opened.refuse(problems, "ModelSlim")


def _module_problems(opened: Opened, name: str, kind: str) -> list[str]:
    if kind not in (STATIC, DYNAMIC):
        return []
    problems = opened.misfits(name, _wanted(opened, name, kind))
    if problems or kind == DYNAMIC:
        return problems
    return _formula_problems(opened, name)


def _wanted(opened: Opened, name: str, kind: str) -> Wanted:
    rows = (*opened.shape(f"{name}.weight"), 0)[0]
    wanted: dict[str, Any] = {
        "weight": (frozenset({"I8"}), None),
        "weight_scale": (FLOATS, (rows, 1)),
        "weight_offset": (FLOATS, (rows, 1)),
    }
    if kind == DYNAMIC:
        return wanted
    half = opened.config.get("dtype") == "float16"
    return wanted | {
        "input_scale": (FLOATS, (1,)),
        "input_offset": (frozenset({"I8"}), (1,)),
        "deq_scale": (frozenset({"I64" if half else "F32"}), (rows,)),
        "quant_bias": (frozenset({"I32"}), (rows,)),
    }


def _formula_problems(opened: Opened, name: str) -> list[str]:
    part = {k: opened.tensor(f"{name}.{k}") for k in ("weight", "input_scale", "input_offset", "quant_bias")}
    scale = float_of(opened.tensor(f"{name}.deq_scale"))
    expected = part["input_scale"].float() * opened.tensor(f"{name}.weight_scale").float()[:, 0]
    if not bool((scale > 0).all() and torch.isfinite(scale).all()):
        return [f"{name}.deq_scale has values that are not positive"]
    problems = []
    if not torch.allclose(scale, expected, rtol=1e-6, atol=0):  # a product, rounded once
        problems.append(f"{name}.deq_scale is not input_scale * weight_scale")
    bias = opened.tensor(f"{name}.bias") if f"{name}.bias" in opened.headers else None
    if not torch.equal(part["quant_bias"], quant_bias(part["weight"], part["input_offset"], scale, bias)):
        problems.append(f"{name}.quant_bias is not round(bias / deq_scale - sum(weight) input_offset)")
    return problems


def _fused_problems(kinds: Mapping[str, str]) -> list[str]:
    """A runtime looks up every shard of a fused module, quantized or not, and they have to agree."""
    problems = []
    for parent, shards in fused_groups(kinds):
        missing = [f"{parent}.{s}.weight" for s in shards if f"{parent}.{s}" not in kinds]
        problems += [f"{name} has no entry, and is a shard of a fused module" for name in missing]
        found = {kinds[f"{parent}.{s}"] for s in shards if f"{parent}.{s}" in kinds}
        if len(found) > 1:
            problems.append(f"{parent}: {', '.join(shards)} run as one, and are {' and '.join(sorted(found))}")
    return problems

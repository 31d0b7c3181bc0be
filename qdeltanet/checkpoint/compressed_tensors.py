"""compressed-tensors: the projections as transformers, vLLM and others read them (needs no package to write).

Written after the package's 0.20 layouts `int-quantized` and `pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import whole_directory
from ..nn import QuantLinear
from ..recipe import Recipe
from .compressed_tensors_check import METHOD, check_compressed_tensors
from .export import check_quantized
from .folder import save_rest, save_tensors
from .foreign import (
    CONFIG_KEY,
    check_expressible,
    float_linears,
    float_tensors,
    save_side_folder,
)
from .packing import pack

MEND = (
    "it has W8A8 without groups, W4A8 with dynamic activations, and INT4 or INT8 weights with activation: float; "
    "--format qdeltanet holds all of this model"
)
INT, PACKED = "int-quantized", "pack-quantized"


def export_compressed_tensors(
    model: Any, recipe: Recipe, path: Path, *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a quantized in-memory model so that stock transformers (with the package compressed-tensors) loads it.

    W8A8 and W4A8 become `int-quantized`, INT4 and INT8 weights with float activations `pack-quantized`.
    Those runtimes execute the projections alone: the rule runs in float there, and its scales travel in the folder
    `qdeltanet/`. Dynamic activations get their scale from the runtime (amax / 127.5, ours is amax / 127). Returns the
    quantization_config. Raises QDeltaNetError that lists every projection which the format cannot express, and fused
    projections that differ.
    """
    check_quantized(model)
    coded = check_expressible(METHOD, model, _fits, MEND)
    tensors = float_tensors(model)
    for name, linear in coded.items():
        tensors |= {f"{name}.{key}": x.contiguous() for key, x in _tensors(linear).items()}
    config = _config(coded, float_linears(model))
    with whole_directory(path, overwrite) as folder:
        save_tensors(tensors, folder)
        own = save_side_folder(model, recipe, folder)
        save_rest(model, folder, tokenizer, quantization_config=config, **{CONFIG_KEY: own})
        check_compressed_tensors(folder)
    return config


def _fits(linear: QuantLinear) -> bool:
    activation, bits = linear.activation, linear.scheme.weight.bits
    if activation is None:
        return bits in (4, 8)
    if activation.bits != 8:
        return False
    return linear.scheme.group is None if bits == 8 else bits == 4 and not linear.is_static


def _tensors(linear: QuantLinear) -> dict[str, Tensor]:
    """Tensors of one module. Its scales stay float32, whatever the model's dtype; a loader may round them."""
    codes, scale = linear.codes.cpu(), linear.scale.cpu().view(linear.out_features, -1)
    if linear.activation is None:
        shape = torch.tensor(codes.shape, dtype=torch.int64)
        packed = pack(codes, linear.scheme.weight.bits)
        found = {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}
    else:
        found = {"weight": codes, "weight_scale": scale}
    if linear.is_static:
        found["input_scale"] = linear.input_scale.detach().cpu()
    return found | ({} if linear.bias is None else {"bias": linear.bias.detach().cpu()})


def _config(coded: Mapping[str, QuantLinear], ignore: list[str]) -> dict[str, Any]:
    """`quantization_config`. Targets and exceptions are names, so that no loader has to guess from classes."""
    groups: list[dict[str, Any]] = []
    for name, linear in coded.items():
        scheme = _scheme(linear)
        same = next((g for g in groups if {**g, "targets": None} == {**scheme, "targets": None}), None)
        if same is None:
            groups.append({"targets": [name], **scheme})
        else:
            same["targets"].append(name)
    formats = {g["format"] for g in groups}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignore,
    }


def _scheme(linear: QuantLinear) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": linear.scheme.weight.bits, "strategy": "channel"}
    if linear.scheme.group is not None:
        weights |= {"strategy": "group", "group_size": linear.scheme.group}
    inputs: dict[str, Any] | None = None
    if linear.activation is not None:
        inputs = {"num_bits": linear.activation.bits, "strategy": "tensor" if linear.is_static else "token"}
        inputs |= {"dynamic": not linear.is_static, **_SYMMETRIC}
    return {
        "weights": {**weights, "dynamic": False, **_SYMMETRIC},
        "input_activations": inputs,
        "output_activations": None,
        "format": PACKED if inputs is None else INT,
    }


_SYMMETRIC: dict[str, Any] = {"type": "int", "symmetric": True}

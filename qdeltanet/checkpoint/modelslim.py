"""ModelSlim: the projections as vllm-ascend reads them, W8A8 (static activations) and W8A8_DYNAMIC.

Written after the readers in vllm-ascend (modelslim_config.py, w8a8_static.py, w8a8_dynamic.py); not run on an NPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError
from ..core.files import whole_directory
from ..nn import QuantLinear
from ..recipe import Recipe
from .export import check_quantized
from .folder import save_rest, save_tensors
from .foreign import CONFIG_KEY, check_expressible, float_tensors, save_side_folder
from .modelslim_check import DESCRIPTION, DYNAMIC, FLOAT, STATIC, check_modelslim, deq_scale_in, quant_bias

VERSION = "1.0.0"
MEND = (
    "it has W8A8 alone (weight: int8, activation: int8, no group); --format compressed-tensors has weights with float "
    "activations, and --format qdeltanet holds all of this model"
)


def export_modelslim(
    model: Any, recipe: Recipe, path: Path, *, tokenizer: Any = None, overwrite: bool = False
) -> dict[str, str]:
    """Write a quantized in-memory model as a directory with quant_model_description.json (`--quantization ascend`).

    That runtime executes the projections alone: the rule runs in float there, and its scales travel in the folder
    `qdeltanet/`. Offsets are 0: our formats are symmetric. Scales stay float32 (the runtime keeps input_scale, and a
    dynamic weight_scale, in the model's dtype). The directory is checked as a whole before it takes its place. Returns
    the description. Raises QDeltaNetError that lists every projection which the format cannot express, and fused
    projections that differ, and for a mixture of experts.
    """
    check_quantized(model)
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name]
    if experts:
        raise QDeltaNetError(
            f"modelslim cannot express this model: {', '.join(experts)} hold all experts in one tensor, and the "
            "runtime asks for each by its name; use --format qdeltanet or compressed-tensors"
        )
    coded = check_expressible("modelslim", model, _fits, MEND)
    tensors = float_tensors(model)
    description = dict.fromkeys(tensors, FLOAT)
    for name, linear in coded.items():
        found = {f"{name}.{key}": x.contiguous() for key, x in _tensors(linear, model.dtype).items()}
        tensors |= found
        description |= dict.fromkeys(found, STATIC if linear.is_static else DYNAMIC)
    kinds = {description[f"{name}.weight"] for name in coded}
    content = {"model_quant_type": STATIC if STATIC in kinds else DYNAMIC, "version": VERSION, **description}
    for tied in set(getattr(model, "all_tied_weights_keys", None) or {}) - content.keys():
        content[tied] = FLOAT  # the runtime asks for lm_head, which has no tensor of its own
    with whole_directory(path, overwrite) as folder:
        save_tensors(tensors, folder)
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        own = save_side_folder(model, recipe, folder)
        save_rest(model, folder, tokenizer, **{CONFIG_KEY: own})
        check_modelslim(folder)
    return content


def _fits(linear: QuantLinear) -> bool:
    activation = linear.activation
    return activation is not None and linear.scheme.weight.bits == activation.bits == 8 and linear.scheme.group is None


def _tensors(linear: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one module. dtype: of the model, which decides how a runtime wants deq_scale."""
    weight, scale = linear.codes.cpu(), linear.scale.cpu()
    bias = None if linear.bias is None else linear.bias.detach().cpu()
    found = {"weight": weight, "weight_scale": scale[:, None], "weight_offset": torch.zeros_like(scale)[:, None]}
    found |= {} if bias is None else {"bias": bias}
    if not linear.is_static:
        return found
    input_scale, offset = linear.input_scale.detach().cpu(), torch.zeros(1, dtype=torch.int8)
    deq_scale = input_scale * scale
    return found | {
        "input_scale": input_scale,
        "input_offset": offset,
        "deq_scale": deq_scale_in(dtype, deq_scale),
        "quant_bias": quant_bias(weight, offset, deq_scale, bias),
    }

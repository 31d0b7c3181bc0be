"""Round trips: a model before its export, and what reads the checkpoint afterwards, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint import export_checkpoint, export_compressed_tensors, export_modelslim, load_foreign
from ...checkpoint.onnx import export_onnx, run_in_onnxruntime
from ...models import load_model, quantized_layers, set_execution
from ...recipe import Recipe

OWN, STOCK, RUNTIME = "qdeltanet", "transformers", "ONNX Runtime"


def _own(folder: Path, exported: Any) -> Any:
    return load_model(str(folder))


def _foreign(folder: Path, exported: Any) -> Any:
    return load_foreign(folder)


def _stock(folder: Path, exported: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _runtime(folder: Path, exported: Any) -> Any:
    """The files hold the rules: the rest of the model stays where it is."""
    run_in_onnxruntime(exported, folder)
    return exported


# (format, who executes it) -> how it is written, and read in the place of the exported model.
TRIPS: dict[tuple[str, str], tuple[Callable[..., Any], Callable[[Path, Any], Any]]] = {
    ("qdeltanet", OWN): (export_checkpoint, _own),
    ("compressed-tensors", OWN): (export_compressed_tensors, _foreign),
    ("compressed-tensors", STOCK): (export_compressed_tensors, _stock),
    ("modelslim", OWN): (export_modelslim, _foreign),
    ("onnx", RUNTIME): (export_onnx, _runtime),
}


def round_trip(model: Any, recipe: Recipe, fmt: str, by: str, folder: Path, tokens: Tensor) -> dict[str, Any]:
    """One row: perplexity on tokens [B, T] before and after, largest difference of a logit, agreement of the first.

    model: quantized. Its rule executes in integers, or in float where the recipe leaves it so (as STOCK always does).
    """
    export, load = TRIPS[fmt, by]
    rules = [layer.delta_net for layer in quantized_layers(model).values() if layer.delta_net is not None]
    integer = any(rule.bound is not None for rule in rules)
    set_execution(model, "integer")
    before = _logits(model, tokens)
    export(model, recipe, folder)
    after = _logits(load(folder, model), tokens)
    return {
        "format": fmt,
        "by": by,
        "rule": "integers" if integer else "float",
        "perplexity_before": _perplexity(before, tokens),
        "perplexity_after": _perplexity(after, tokens),
        "difference": float((before - after).abs().max()),
        "agreement": float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        "equal": torch.equal(before, after),
    }


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    return math.exp(float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())))

"""`qdeltanet bench model`: the forward pass of a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Calibration
from ...core import sqnr
from ...models import load_model, set_execution
from ...recipe import Recipe
from ..embedded import model_path
from ..prepare import prepare_model
from .timing import Case

FLOAT_DECIBELS = 10.0


def model_cases(
    name: str,
    recipes: list[tuple[str, Recipe, Calibration | None]],
    *,
    batch: int = 4,
    tokens: int = 512,
    device: str = "cpu",
    backend: str = "auto",
) -> Iterator[Case]:
    """Each recipe in integers against the model as transformers runs it; the quantized model in float first."""
    float_model = load_model(model_path(name), device=device)
    vocabulary = int(float_model.config.get_text_config().vocab_size)
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=make).to(device)

    def peer() -> Tensor:
        return logits(float_model, ids)

    for recipe_name, recipe, calibration in recipes:
        model = prepare_model(name, recipe, calibration, "integer", backend, device=device)
        label = f"{name}, [{batch}, {tokens}] tokens"
        yield Case(label, recipe_name, _forward(model, ids), "transformers float32", peer, _verifier(model, ids, peer))


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def _forward(model: Any, ids: Tensor) -> Any:
    return lambda: logits(model, ids)


def _verifier(model: Any, ids: Tensor, peer: Any) -> Any:
    def verify() -> tuple[bool, str]:
        """Integer logits equal those of backend reference on the first sequence, every bit."""
        backend = next(m.backend_name for m in model.modules() if hasattr(m, "backend_name"))
        first = ids[:1]
        found = logits(model, first)
        near = sqnr(peer()[:1], found)
        if model.device.type != "cpu":  # the model's float parts round differently there
            return near > FLOAT_DECIBELS, f"{near:.0f} dB from float; the rule's own bits are selftest's"
        set_execution(model, "integer", "reference")
        expected = logits(model, first)
        set_execution(model, "integer", backend)
        equal = torch.equal(found, expected)
        return equal, f"logits {'equal' if equal else 'DIFFER from'} reference; {near:.0f} dB from float"

    return verify

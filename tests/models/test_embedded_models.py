"""The embedded models in use: generate(), the cache of a model without attention, and the rule as a drop-in."""

from __future__ import annotations

import random

import pytest
import torch

from qdeltanet.delta_rule import chunk_gated_delta_rule
from qdeltanet.eval.embedded import model_path
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.eval.train.recall import recall_batch
from qdeltanet.models import load_model, load_tokenizer, quantize_model
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import run_calibration

TOLERANCE = 2e-4  # logits of size 10 in float32, sums in another order
NO_MASK = {"full_attention": None, "linear_attention": None}


@torch.no_grad()
def test_tiny_hybrid_generates():
    tokenizer, model = load_tokenizer(model_path("tiny-hybrid")), load_model(model_path("tiny-hybrid"))
    prompt = tokenizer("Return the absolute value of ", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    quantize_model(model, load_recipe("int8"))
    assert torch.equal(model.generate(prompt, max_new_tokens=24, do_sample=False), expected)
    recipe = load_recipe("int8")
    integer = prepare_model("tiny-hybrid", recipe, run_calibration("tiny-hybrid", recipe, samples=16))
    written = integer.generate(prompt, max_new_tokens=24, do_sample=False)
    assert written.shape == expected.shape
    assert tokenizer.decode(written[0]).replace("\n", " ").isprintable()


def stepwise(model, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of tokens [B, T] fed in pieces through a cache (transformers needs the positions and masks given here)."""
    from transformers import DynamicCache

    cache, parts, start = DynamicCache(config=model.config), [], 0
    for stop in [*cuts, tokens.shape[1]]:
        positions = torch.arange(start, stop)[None].expand(len(tokens), -1)
        out = model(
            input_ids=tokens[:, start:stop],
            position_ids=positions,
            attention_mask=NO_MASK,
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("recipe", [None, "int8", "int4"])
@torch.no_grad()
def test_cache_of_tiny_recall(recipe):
    """Prefill of one chunk, two decode steps, a further multi-token step."""
    tokens, targets = recall_batch(random.Random(3), 4, 16, 128)
    if recipe is None:
        model = load_model(model_path("tiny-recall"))
        quantize_model(model, load_recipe("int8"))
        whole = model(tokens).logits
        assert (stepwise(model, tokens, [64, 65, 66]) - whole).abs().max() < TOLERANCE
        return
    chosen = load_recipe(recipe)
    calibration = run_calibration("tiny-recall", chosen, samples=32) if recipe == "int8" else None
    model = prepare_model("tiny-recall", chosen, calibration)
    assert (stepwise(model, tokens, [64]) - model(tokens).logits).abs().max() < TOLERANCE
    asked = targets >= 0
    answers = stepwise(model, tokens, [64, 65, 66]).argmax(-1)
    assert (answers == targets)[asked].float().mean() > 0.9


@torch.no_grad()
def test_the_rule_drops_into_transformers(monkeypatch):
    """transformers' own layer, calling our function in place of its own."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    tokens, _ = recall_batch(random.Random(4), 2, 16, 128)
    model = load_model(model_path("tiny-recall"))
    expected, calls = model(tokens).logits, []

    def ours(*args, **kwargs):
        calls.append(1)
        return chunk_gated_delta_rule(*args, **kwargs)

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", ours)
    assert (model(tokens).logits - expected).abs().max() < TOLERANCE
    assert len(calls) == 2

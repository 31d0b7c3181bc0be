"""Round trips that no checkpoint reader makes: the rule from ONNX files, in the place of a model's own."""

from __future__ import annotations

import pytest

from qdeltanet.eval.bench.formats import RUNTIME, round_trip
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import run_calibration, samples_for


@pytest.mark.parametrize("name", ["int8", "int16"])
def test_onnx_runtime_gives_the_perplexity_before(tmp_path, name):
    """Not to the bit: where a float sum lies next to half a step, another order of summing flips a code."""
    recipe = load_recipe(name)
    model = prepare_model("tiny-recall", recipe, run_calibration("tiny-recall", recipe, samples=8))
    tokens = samples_for("tiny-recall", None, 10, None).tokens[-2:]
    row = round_trip(model, recipe, "onnx", RUNTIME, tmp_path / "graphs", tokens)
    assert row["rule"] == "integers"
    assert row["perplexity_after"] == pytest.approx(row["perplexity_before"], rel=2e-3)
    assert row["agreement"] > 0.98

"""The lm-eval model class: shared prefixes score as lm-eval's own HFLM does, recipes differ, rows pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.embedded import MODELS
from qdeltanet.eval.evaluate import Row, evaluate
from qdeltanet.eval.lm import QDeltaNetLM
from qdeltanet.eval.prefix import share_prefixes
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.eval.statistics import Documents, paired
from qdeltanet.models import load_model, load_tokenizer
from qdeltanet.recipe import load_recipe


def test_prefixes_share_and_nothing_else_does():
    inputs = [(1, 2), (1, 2, 3), (1,), (2,), (1, 2, 3), (1, 3)]
    groups = share_prefixes(inputs)
    assert sorted(i for g in groups for i in g.members) == list(range(len(inputs)))
    for group in groups:
        assert all(group.tokens[: len(inputs[i])] == inputs[i] for i in group.members)
    assert len(groups) == 3
    assert [len(g.tokens) for g in groups] == sorted((len(g.tokens) for g in groups), reverse=True)


def requests() -> list[Instance]:
    pairs = [("def f(", "x):"), ("def f(x", "):"), ("def f(x", "): return"), ("", "import os"), ("for i in", " range")]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def test_scores_equal_lm_evals_own():
    model, tokenizer = load_model(MODELS["tiny-hybrid"]), load_tokenizer(MODELS["tiny-hybrid"])
    ours = QDeltaNetLM(model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests())
    # Its logits cache scores targets of different lengths over one input wrongly (lm-eval 0.4.13): off.
    stock = HFLM(model, tokenizer=tokenizer, batch_size=2, max_length=2048, device="cpu", logits_cache=False)
    theirs = stock.loglikelihood(requests())
    for (a, greedy_a), (b, greedy_b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)  # float sums over other batch shapes
        assert greedy_a == greedy_b


def test_windows_cuts_and_generation_equal_lm_evals_own():
    """Texts longer than the model, contexts that have to be cut, greedy generation, a batch size that is found."""
    model, tokenizer = load_model(MODELS["tiny-hybrid"]), load_tokenizer(MODELS["tiny-hybrid"])
    shared = {"tokenizer": tokenizer, "max_length": 16}
    ours, auto = (QDeltaNetLM(model, batch_size=size, max_batch_size=4, **shared) for size in (2, "auto"))
    stock = HFLM(model, batch_size=2, device="cpu", logits_cache=False, **shared)
    texts = ["def f(x): return x + 1", "import", "", "for i in range(10):\n    print(i)"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(stock.loglikelihood_rolling(rolling), abs=1e-4)
    cut = [Instance("loglikelihood", {}, ("x = 1; " * 4, text[:10] or " "), i) for i, text in enumerate(texts)]
    theirs = stock.loglikelihood(cut)
    for lm in (ours, auto):
        found = lm.loglikelihood(cut)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in theirs], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs]
    until = {"until": ["\n\n\n"], "max_gen_toks": 6}
    generated = [Instance("generate_until", {}, (text, until), i) for i, text in enumerate(texts) if text]
    expected = stock.generate_until(generated)
    assert ours.generate_until(generated) == auto.generate_until(generated) == expected
    assert len(set(expected)) > 1


def test_padding_behind_a_text_is_not_seen():
    """Dynamic scales at 4 bits see everything in a chunk: a text scores beside a longer one as alone."""
    model = prepare_model("tiny-hybrid", load_recipe("int4"))
    lm = QDeltaNetLM(model, tokenizer=load_tokenizer(MODELS["tiny-hybrid"]), batch_size=4)
    texts = ["The module", "Return the number of items of a list.", "class C:\n    def f(self):\n        ", "x" * 100]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    together = lm.loglikelihood_rolling(asked)
    alone = [lm.loglikelihood_rolling([one])[0] for one in asked]
    assert together == pytest.approx(alone, abs=0.02)  # float sums over other batch shapes may turn a code


def test_rows_are_paired_with_float():
    rows = [
        Row("float", execution="float"),
        Row("T=I", load_recipe("float", ["inverse.method=identity"])),
        Row("int4", load_recipe("int4")),
    ]
    result = evaluate("tiny-recall", rows, ["recall"], limit=512)
    exact, broken, int4 = (r["tasks"]["recall"] for r in result)
    assert [r["execution"] for r in result] == ["float", "float", "integer"]
    assert exact["acc"]["value"] > 0.95
    assert exact["acc"]["difference"] == exact["acc"]["difference_stderr"] == 0
    assert broken["acc"]["value"] < 0.6
    assert broken["acc"]["difference"] == pytest.approx(broken["acc"]["value"] - exact["acc"]["value"])
    assert int4["acc"]["difference"] > -0.05
    assert int4["nll"]["value"] > exact["nll"]["value"]


def test_perplexity_row():
    rows = [Row("float", execution="float"), Row("T=I", load_recipe("float", ["inverse.method=identity"]))]
    exact, broken = (r["tasks"]["bytes"]["nats_per_byte"] for r in evaluate("tiny-hybrid", rows, ["bytes"], limit=8))
    assert exact["perplexity"] == pytest.approx(math.exp(exact["value"]))
    assert broken["perplexity_ratio"] == pytest.approx(broken["perplexity"] / exact["perplexity"])
    assert broken["perplexity_ratio"] > 1.5


def test_paired_statistics_by_hand():
    ids = (0, 1, 2, 3)
    one = Documents("mean", ids, np.array([1.0, 1, 0, 1]), np.ones(4))
    two = Documents("mean", ids, np.array([1.0, 0, 0, 1]), np.ones(4))
    assert one.estimate == 0.75
    assert one.stderr == pytest.approx(np.std(one.value, ddof=1) / 2)
    difference, stderr = paired(two, one)
    assert difference == -0.25
    assert stderr == pytest.approx(np.std([0, -1, 0, 0], ddof=1) / 2)
    with pytest.raises(ValueError, match="same documents"):
        paired(two, Documents("mean", (0, 1, 2, 9), one.value, one.weight))


def test_preparing_refuses_what_does_not_fit():
    with pytest.raises(QDeltaNetError, match=r"int8 has static scales: pass --calibration"):
        prepare_model("tiny-recall", load_recipe("int8"))
    with pytest.raises(QDeltaNetError, match="unknown task 'recal'; did you mean recall"):
        evaluate("tiny-recall", [Row("float", execution="float")], ["recal"])

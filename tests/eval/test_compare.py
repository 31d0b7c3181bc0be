"""What a comparison says: intervals that cover, divergences that are exact, tables that hold all of it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cli import run

from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.divergence import divergences
from qdeltanet.eval.embedded import HELD_OUT_BYTES
from qdeltanet.eval.evaluate import Row, evaluate
from qdeltanet.eval.statistics import RESAMPLES, Documents, bootstrap, documents, interval, paired, pooled
from qdeltanet.eval.tables import csv_text, entries, finite, markdown_text, value_text
from qdeltanet.recipe import load_recipe


def test_bootstrap_is_the_plain_one_and_repeats():
    rng = np.random.default_rng(0)
    value, weight = rng.normal(size=40), rng.uniform(1, 3, size=40)
    again = np.random.default_rng(20_261_121)
    by_hand = []
    for _ in range(RESAMPLES):
        drawn = again.integers(40, size=40)
        by_hand.append(value[drawn].sum() / weight[drawn].sum())
    low, high = bootstrap(value, weight)
    assert (low, high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    assert bootstrap(value, weight) == (low, high)
    assert all(math.isnan(x) for x in bootstrap(value[:1], weight[:1]))


def test_interval_covers_as_often_as_it_says():
    # 95% nominal; of 200 trials 180 to 198 lie within four standard errors (0.0154 each) of that
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap(rng.normal(0.3, 1, size=100), np.ones(100))
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 199


def test_clustered_documents_have_wider_intervals():
    """16 queries of a sequence that fail together are one observation, not 16."""
    rng = np.random.default_rng(2)
    value = np.repeat(rng.integers(0, 2, size=40).astype(float), 16)
    ids, ones, base = tuple(range(640)), np.ones(640), np.zeros(640)
    cluster = tuple(i // 16 for i in range(640))
    alone = interval(Documents("mean", ids, value, ones), Documents("mean", ids, base, ones))
    together = interval(Documents("mean", ids, value, ones, cluster), Documents("mean", ids, base, ones, cluster))
    assert together[1] - together[0] == pytest.approx(4 * (alone[1] - alone[0]), rel=0.15)


def test_filters_lists_and_groups_of_lm_eval():
    def sample(i, name, exact, listed):
        values = {"exact_match": exact, "inst": listed, "word_perplexity": (-6.0, 3)}
        return {"doc_id": i, "doc": {}, "filter": name, "metrics": list(values), **values}

    samples = [
        sample(i, name, float(name == "flexible"), [True, i == 0]) for i in (1, 0) for name in ("strict", "flexible")
    ]
    found = documents(samples)
    assert found["exact_match,strict"].estimate == 0
    assert found["exact_match,flexible"].estimate == 1
    assert found["exact_match,strict"].ids == (0, 1)
    assert found["inst,strict"].estimate == 0.75
    assert found["nats_per_word,strict"].estimate == 2
    group = pooled({"a": found, "b": {"exact_match,flexible": found["exact_match,strict"]}})
    assert list(group) == ["exact_match,flexible"]
    assert group["exact_match,flexible"].estimate == 0.5
    assert paired(group["exact_match,flexible"], group["exact_match,flexible"]) == (0, 0)


def test_divergences_by_hand():
    generator = torch.Generator().manual_seed(0)
    base, own = torch.randn(2, 7, 11, generator=generator)
    base[2, 3] = -torch.inf
    found = divergences(base, own, [(1, 4), (3, 4), (5, 7)])
    p, q = base.double().softmax(-1), own.double().softmax(-1)
    kl = F.kl_div(q.log(), p, reduction="none").sum(-1)
    assert [f.tokens for f in found] == [3, 1, 2]
    assert [f.kl for f in found] == pytest.approx([float(kl[1:4].sum()), float(kl[3]), float(kl[5:].sum())])
    same = base.argmax(-1) == own.argmax(-1)
    assert [f.agree for f in found] == [int(same[1:4].sum()), int(same[3]), int(same[5:].sum())]
    assert divergences(base, base, [(0, 7)])[0] == (0.0, 7, 7)


@pytest.mark.parametrize(("model", "task"), [("tiny-recall", "recall"), ("tiny-hybrid", "bytes")])
def test_logits_are_compared_on_scored_tokens(model, task):
    rows = [Row("float", execution="float"), Row("float again", load_recipe("float")), Row("int4", load_recipe("int4"))]
    limit = 32 if task == "recall" else 2  # two sequences of 16 queries, two texts
    plain = evaluate(model, rows, [task], limit=limit, batch_size=2)
    both = evaluate(model, rows, [task], limit=limit, batch_size=2, logits=True)
    assert [r["tasks"] for r in plain] == [r["tasks"] for r in both]  # looking changes nothing
    assert [r["saturated"] for r in plain] == [r["saturated"] for r in both]
    base, same, int4 = (r["logits"] for r in both)
    assert base == {}
    assert same[task]["top1"] == 1
    assert same[task]["kl"] < 1e-8  # another implementation of the same float rule
    assert int4[task]["kl"] > 1e-8
    assert int4[task]["kl_interval"][0] <= int4[task]["kl"] <= int4[task]["kl_interval"][1]
    texts = [json.loads(line)["text"].encode() for line in Path(HELD_OUT_BYTES).read_text().splitlines()]
    assert int4[task]["tokens"] == (32 if task == "recall" else len(texts[0]) + len(texts[1]))
    assert both[2]["tokens_per_second"] > 0


def test_command_writes_json_markdown_and_csv(tmp_path):
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "markdown", "csv")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    arguments = ["evaluate", "tiny-recall", "--tasks", "recall", "--limit", "32", "-r", "int4", "--threads", "1"]
    done = run(*arguments, "--execution", "fake", "--execution", "integer", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(files["json"].read_text())
    assert [(r["name"], r["execution"]) for r in results["rows"]] == [
        ("float", "float"),
        ("int4", "fake"),
        ("int4", "integer"),
    ]
    fake, integer = results["rows"][1:]
    assert fake["logits"] == integer["logits"]  # fake quantization's forward is the integers'
    assert results["command"][:4] == arguments[:4]
    assert {"weights", "arithmetic", "recipe", "tasks", "program"} <= integer["hashes"].keys()
    lines = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert [(x["row"], x["execution"], x["metric"]) for x in lines][-1] == ("int4", "integer", "nll")
    assert float(lines[-1]["paired_low"]) == integer["tasks"]["recall"]["nll"]["difference_interval"][0]
    assert lines[0]["command"].startswith("qdeltanet evaluate tiny-recall")
    page = files["markdown"].read_text()
    assert "| int4 | integer | acc |" in page
    assert integer["hashes"]["weights"][:12] in page
    assert "`qdeltanet evaluate tiny-recall" in page
    assert markdown_text(results) == page
    assert csv_text(results) == files["csv"].read_text()


@pytest.mark.parametrize("limit", [1, 16])
def test_one_sequence_has_no_interval(limit):
    row = evaluate("tiny-recall", [Row("float", execution="float")], ["recall"], limit=limit)[0]
    acc = finite(row)["tasks"]["recall"]["acc"]
    assert (acc["stderr"] is None) == (limit == 1)
    assert acc["difference_interval"] == [None, None]


def test_checkpoints_stand_beside_recipes(tmp_path):
    calibration, checkpoint, results = (tmp_path / name for name in ("calibration", "exported", "results.json"))
    model = ["tiny-recall", "--recipe", "int4"]
    for command in (
        ["calibrate", *model, "--samples", "2", "--output", str(calibration)],
        ["export", "tiny-recall", "--calibration", str(calibration), "--output", str(checkpoint)],
        [
            "evaluate",
            *model,
            "--checkpoint",
            str(checkpoint),
            "--tasks",
            "recall",
            "--limit",
            "32",
            "--json",
            str(results),
        ],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "int4", "exported"]
    assert rows[1]["tasks"] == rows[2]["tasks"]  # every bit
    assert rows[1]["logits"] == rows[2]["logits"]


def test_mistakes():
    float_row = [Row("float", execution="float")]
    with pytest.raises(QDeltaNetError, match="tiny-recall has no chat template"):
        evaluate("tiny-recall", float_row, ["recall"], apply_chat_template=True)
    other = [*float_row, Row("other", execution="float", model="tiny-hybrid")]
    with pytest.raises(QDeltaNetError, match="row other has a vocabulary of 260 tokens, the first row one of 68"):
        evaluate("tiny-recall", other, ["recall"], limit=1, logits=True)


def test_a_checkpoint_that_is_none_is_refused():
    """It would run in float under the name of integers."""
    with pytest.raises(QDeltaNetError, match="tiny-recall is no checkpoint that qdeltanet exported"):
        evaluate("tiny-recall", [Row("mine", model="tiny-recall", execution="integer")], ["recall"], limit=1)


def test_one_document_and_what_is_not_finite_have_tables():
    """A single document has no standard error, and a diverging method no value: both are shown as they are."""
    rows = finite({"rows": evaluate("tiny-hybrid", [Row("float", execution="float")], ["bytes"], limit=1)})["rows"]
    assert [e["stderr"] for e in entries(rows)] == [None] * len(list(entries(rows)))
    assert all(float(value_text(e)) > 1 for e in entries(rows))
    assert value_text({"value": None, "stderr": None}) == "not finite"

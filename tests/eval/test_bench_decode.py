"""The benchmark of decode: what it scores, that feedback pays, its table and file, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from qdeltanet.cli import app
from qdeltanet.core import QDeltaNetError, sqnr
from qdeltanet.eval.bench.decode import RECIPES, Windows, decode_costs, in_pieces, recall_tokens, scores
from qdeltanet.eval.embedded import DATASETS, HELD_OUT_BYTES, model_path
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.eval.recall_task import PAIRS
from qdeltanet.models import load_tokenizer
from qdeltanet.workflow import RECALL_ANSWERS, recipe_of, run_calibration, samples_for

EVERY = slice(1, None)


FEEDBACK = "+sites.state.feedback=int8"
INT4 = "int8+sites.state.format=int4"


def prepared(recipe: str) -> Any:
    chosen = recipe_of(recipe)
    return prepare_model("tiny-hybrid", chosen, run_calibration("tiny-hybrid", chosen, samples=8))


def held_out(n: int, length: int) -> Tensor:
    return samples_for("tiny-hybrid", HELD_OUT_BYTES, n, length).tokens


@pytest.fixture(scope="module")
def exact() -> Any:
    return prepare_model("tiny-hybrid")


@pytest.fixture(scope="module")
def rows(exact: Any) -> dict[str, dict[str, Any]]:
    ticks: list[tuple[int, int]] = []
    windows = Windows(held_out(8, 65), EVERY, ["bits"])
    models = [("float", lambda: exact), *((name, partial(prepared, name)) for name in (INT4, INT4 + FEEDBACK))]
    found = decode_costs(windows, models, lambda done, total: ticks.append((done, total)))
    assert ticks == [(i + 1, 3 * 65) for i in range(3 * 65)]
    return {row["recipe"]: row for row in found}


def test_feedback_pays_in_bits(rows: dict[str, dict[str, Any]]) -> None:
    """An INT4 state, where the difference is far above its standard error: .54 to .12 in 96 tokens."""
    plain, fed = (rows[name]["decode"]["bits"] for name in (INT4, INT4 + FEEDBACK))
    assert plain["difference"] > 2 * fed["difference"] > 0
    assert plain["difference"] > 5 * plain["difference_stderr"]
    assert rows[INT4]["at_once"]["bits"]["difference"] < plain["difference"] / 5
    assert rows[INT4]["decode"]["clipped"] > 0


def test_an_int8_state_with_feedback_decodes_nearer_to_float(exact: Any) -> None:
    """On the logits, which tell more than bits per token do on few tokens: 28.9 and 31.2 dB seen on 160."""
    tokens = held_out(4, 128)
    with torch.no_grad():
        expected = exact(tokens).logits
    plain, fed = (
        sqnr(expected, torch.cat(list(in_pieces(prepared(name), tokens, range(1, 129))), dim=1))
        for name in ("int8", "int8" + FEEDBACK)
    )
    assert fed > plain + 0.8


def test_float_costs_nothing(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["float"]
    assert row["at_once"]["bits"]["difference"] == 0
    assert abs(row["decode"]["bits"]["difference"]) < 1e-5  # sums of one token and of 64 in another order
    assert row["decode"]["clipped"] == 0


def test_scores_are_the_models_own(exact: Any) -> None:
    text = held_out(3, 100)
    windows = Windows(text, slice(5, None, 2), ["bits", "recall", "nll"])
    found = scores(exact, windows, windows.ends[-1:], lambda: None)
    with torch.no_grad():
        logits = exact(text).logits
    for n, (row, tokens) in enumerate(zip(logits, text, strict=True)):
        nll = float(cross_entropy(row[4:-1:2], tokens[5::2]))
        assert found["nll"].value[n] == pytest.approx(nll, abs=1e-5)
        assert found["bits"].value[n] == pytest.approx(nll / 0.6931472, abs=1e-5)
        assert found["recall"].value[n] == float((row[4:-1:2].argmax(-1) == tokens[5::2]).double().mean())


def test_pieces() -> None:
    windows = Windows(torch.zeros(1, 101), EVERY, ["bits"], prefill=40)
    assert windows.ends == [32, 40, *range(41, 101)]
    with pytest.raises(QDeltaNetError, match="prefill 100 leaves nothing to decode of 100 tokens"):
        Windows(torch.zeros(1, 101), EVERY, ["bits"], prefill=100)


def test_recall_samples_are_fresh_and_their_answers_counted() -> None:
    tokenizer = load_tokenizer(model_path("tiny-recall"))
    tokens = recall_tokens(tokenizer, 3, 128)
    assert tokens.shape == (3, 128)
    for row in tokens.tolist():
        meaning = dict(zip(row[: 2 * PAIRS : 2], row[1 : 2 * PAIRS : 2], strict=True))
        assert [meaning[key] for key in row[2 * PAIRS :: 2]] == row[RECALL_ANSWERS]
    known = Path(DATASETS["recall"]).read_text(encoding="utf-8")
    assert all(tokenizer.decode(row) not in known for row in tokens)
    assert tokenizer.decode(samples_for("tiny-recall", None, 1, 128).tokens[0]) in known
    with pytest.raises(QDeltaNetError, match="16 pairs do not fit into 20 tokens"):
        recall_tokens(tokenizer, 1, 20)


def test_default_recipes_differ_in_the_state_alone() -> None:
    plain = recipe_of("int8").layer(0).rule
    for text in RECIPES:
        rule = recipe_of(text).layer(0).rule
        assert {name for name, site in rule.sites.items() if site != plain.sites[name]} <= {"state"}
    by_channel = "int8+sites.state.granularity=per_channel+sites.state.feedback=int8"
    assert recipe_of("int8-decode").fingerprint == recipe_of(by_channel).fingerprint


def test_the_command(tmp_path: Path) -> None:
    sizes = ["--windows", "2", "--tokens", "68", "--samples", "4"]
    recipes = ["-r", "int8-decode", "-r", "int8+sites.state.format=float"]
    file = tmp_path / "decode.json"
    done = CliRunner().invoke(app, ["bench", "decode", "tiny-recall", *recipes, *sizes, "--json", str(file), "-q"])
    assert done.exit_code == 0, done.output
    assert "recall above float, 2 windows of 68, prefill 64" in done.output
    assert "NLL above float" in done.output
    (measured,) = json.loads(file.read_text())["models"]
    assert [r["recipe"] for r in measured["rows"]] == ["float", "int8-decode", "int8+sites.state.format=float"]
    assert all(r["decode"]["recall"]["value"] > 0.9 for r in measured["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-recal"], "unknown model 'tiny-recal': did you mean 'tiny-recall'"),
        (["tiny-recall", "-r", "int8-decod"], "int8-decode"),
        (["tiny-recall", "--tokens", "30"], "16 pairs do not fit into 30 tokens"),
        (["tiny-recall", "--prefill", "127"], "prefill 127 leaves nothing to decode of 127 tokens: lower it"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(QDeltaNetError, match=message):
        CliRunner().invoke(app, ["bench", "decode", *arguments], catch_exceptions=False)

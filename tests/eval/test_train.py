"""The embedded models can be trained again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdeltanet.eval.train import corpus, hybrid, recall
from qdeltanet.eval.train.__main__ import main
from qdeltanet.eval.train.loop import IGNORE
from qdeltanet.eval.train.muon import orthogonalize


def test_tiny_recall_learns_saves_and_reloads(tmp_path: Path) -> None:
    lines: list[str] = []
    losses = recall.train_recall(tmp_path, steps=20, report=lines.append)
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < losses[0] - 0.15
    assert lines
    assert lines[-1].startswith("step   20/20")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 122_512
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == model.config.vocab_size


def test_tiny_hybrid_trains(tmp_path: Path) -> None:
    losses = hybrid.train_hybrid(tmp_path, steps=4, report=lambda line: None)
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]


def test_recall_batch_asks_only_for_what_it_wrote() -> None:
    tokens, targets = recall.recall_batch(random.Random(1), 5, 16, 128)
    assert tokens.shape == targets.shape == (5, 128)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        written = dict(zip(row[0:32:2], row[1:32:2], strict=True))
        assert len(written) == 16
        scored = [i for i, target in enumerate(wanted) if target != IGNORE]
        assert scored == list(range(32, 128, 2))
        assert all(wanted[i] == row[i + 1] == written[row[i]] for i in scored)


@pytest.mark.parametrize(("pairs", "length"), [(33, 128), (0, 64), (4, 63), (16, 32)])
def test_recall_batch_refuses_what_does_not_fit(pairs: int, length: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        recall.recall_batch(random.Random(1), 1, pairs, length)


def test_recall_curriculum_doubles_the_pairs_and_then_the_length() -> None:
    task = recall.RecallTask(seed=0, batch=2)
    assert task.batch(0.9)[0].shape == (2, 64)
    for _ in range(100):
        task.observe(1.0)
    assert task.pairs == 16
    assert task.batch(0.1)[0].shape == (2, 64)
    assert task.batch(0.9)[0].shape == (1, 128)


def test_held_out_documents_are_not_trained_on() -> None:
    train, held_out = corpus.split()
    assert len(held_out) > 10
    paragraphs = {p for text in train for p in text.split("\n\n") if len(p) > 80}
    assert not paragraphs & {p for text in held_out for p in text.split("\n\n")}


def test_pieces_are_short_and_lose_little() -> None:
    text = "".join(f"line {i} of a text with some ümlauts\n" for i in range(500))
    cut = corpus.pieces([text], 300)
    assert all(len(piece.encode()) <= 300 for piece in cut)
    assert text.startswith("".join(cut))
    assert len("".join(cut)) > len(text) - 75


@pytest.mark.parametrize("shape", [(8, 8), (24, 6), (6, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_command_refuses_a_full_directory_and_no_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").touch()
    assert main(["tiny-recall", "--output", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["tiny-recall", "--output", str(tmp_path / "new"), "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err

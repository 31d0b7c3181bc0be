"""The models, texts and tasks that ship."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdeltanet.eval import embedded, task_data, task_files
from qdeltanet.eval.recall_task import recall_words
from qdeltanet.eval.train.recall import recall_batch

LIMITS = {"tiny-recall": 1_000_000, "tiny-hybrid": 2_000_000}


@pytest.mark.parametrize("name", LIMITS)
def test_models_are_small_and_load_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(embedded.model_path(name))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LIMITS[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id


@torch.no_grad()
def test_tiny_recall_recalls() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.MODELS["tiny-recall"], dtype=torch.float32)
    tokens, targets = recall_batch(random.Random(77), 128, 16, 128)
    asked = targets >= 0
    assert asked.sum() >= 4096
    right = model(input_ids=tokens).logits[asked].argmax(-1) == targets[asked]
    assert right.float().mean() >= 0.96


@torch.no_grad()
def test_tiny_hybrid_knows_the_language() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.MODELS["tiny-hybrid"], dtype=torch.float32)
    texts = [text.encode()[:400] for text in _texts(embedded.HELD_OUT_BYTES)]
    tokens = torch.tensor([[256, *text] for text in texts if len(text) == 400][:20])
    loss = model(input_ids=tokens, labels=tokens).loss
    assert loss / torch.log(torch.tensor(2.0)) < 2.1  # bits per byte; it measured 1.74


def test_recall_tokenizer_has_a_token_per_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODELS["tiny-recall"])
    words = recall_words(random.Random(5))
    ids = tokenizer(" ".join(words))["input_ids"]
    assert len(ids) == len(words) == 128
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == " ".join(words)


@pytest.mark.parametrize(
    "text", ["plain", "  two  blanks\r\n\ttab\n\n", "žluťoučký 漢字 🙂\u2028\u0085", "\x00\x7f", ""]
)
def test_byte_tokenizer_is_the_bytes(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODELS["tiny-hybrid"])
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", embedded.DATASETS)
def test_calibration_sets_are_lines_of_text(name: str) -> None:
    texts = _texts(embedded.DATASETS[name])
    assert len(texts) >= 100
    assert all(texts)


def test_what_is_measured_was_not_calibrated_on() -> None:
    assert not set(_texts(embedded.DATASETS["bytes"])) & set(_texts(embedded.HELD_OUT_BYTES))
    measured = set(task_data.recall_documents(every=48)["test"]["context"])
    calibrated = {" ".join(text.split()[:33]) for text in _texts(embedded.DATASETS["recall"])}
    assert len(measured) == 640
    assert not measured & calibrated


def test_tasks_load_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = task_files.task_manager().load(list(task_data.TASKS))["tasks"]
    recall, bytes_ = tasks["recall"], tasks["bytes"]
    assert len(recall.eval_docs) == 10_240
    assert len(bytes_.eval_docs) >= 60
    assert all(len(text.encode()) <= 1000 for text in bytes_.eval_docs["text"])
    document = recall.eval_docs[0]
    recall.build_all_requests(limit=1)
    assert recall.instances[0].args == (document["context"], " " + document["target"])


def test_metrics_of_a_document() -> None:
    assert task_data.recall_results({}, [(-0.5, True)]) == {"acc": 1.0, "nll": 0.5}
    measured = task_data.byte_results({"text": "three little words"}, [-36.0])
    assert measured["nll"] == 2.0
    assert measured["bits_per_byte"] == (-36.0, 18)
    assert measured["word_perplexity"] == (-36.0, 3)


def test_model_path_names_the_nearest_model() -> None:
    assert embedded.model_path("Qwen/Qwen3.5-0.8B") == "Qwen/Qwen3.5-0.8B"
    with pytest.raises(ValueError, match="did you mean 'tiny-recall'"):
        embedded.model_path("tiny-recal")


def _texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]

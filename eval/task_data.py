"""What the lm-eval tasks in `eval/tasks` are made of: their documents and their metrics."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .embedded import HELD_OUT_BYTES
from .recall_task import LENGTH, PAIRS, recall_words

if TYPE_CHECKING:
    from datasets import Dataset

TASKS_FOLDER = str(Path(__file__).resolve().parent / "tasks")
TASKS = ("recall", "bytes")

EVALUATION_SEED = 1_000_003
SEQUENCES = 640
EVERY = 3  # of a sequence's 48 queries: neighbours share most of their context, more sequences tell more


def recall_documents(sequences: int = SEQUENCES, every: int = EVERY, **_: Any) -> dict[str, Dataset]:
    """Makes the queries of the task `recall`, the same ones on every machine.

    Args:
        sequences: sequences of 128 tokens and 16 pairs.
        every: which of the 48 queries of each become documents: every `every`-th.

    Returns:
        a split `test` of sequences x ceil(48 / every) documents with `context` (all words up to the query's key),
        `target` (the value), `sequence` and `position` (of the key).
    """
    from datasets import Dataset

    rng = random.Random(EVALUATION_SEED)
    documents = []
    for sequence in range(sequences):
        words = recall_words(rng, PAIRS, LENGTH)
        for position in range(2 * PAIRS, LENGTH, 2 * every):
            context = " ".join(words[: position + 1])
            place = {"sequence": sequence, "position": position}
            documents.append({"context": context, "target": words[position + 1], **place})
    return {"test": Dataset.from_list(documents)}


def recall_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Metrics of one query: whether the value was the likeliest token, and its negative log-likelihood in nats."""
    log_likelihood, is_greedy = results[0]
    return {"acc": float(is_greedy), "nll": -log_likelihood}


def byte_documents(**_: Any) -> dict[str, Dataset]:
    """The held-out text of the task `bytes`: a split `test` of documents with `text`, <= 1000 bytes each."""
    from datasets import Dataset

    with open(HELD_OUT_BYTES, encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def byte_results(doc: dict[str, Any], results: list[float]) -> dict[str, Any]:
    """Metrics of one document: nats per byte, and (log-likelihood, weight) for the means that lm-eval weighs."""
    (log_likelihood,) = results
    n_bytes, n_words = len(doc["text"].encode()), len(re.split(r"\s+", doc["text"]))
    return {
        "nll": -log_likelihood / n_bytes,
        "bits_per_byte": (log_likelihood, n_bytes),
        "byte_perplexity": (log_likelihood, n_bytes),
        "word_perplexity": (log_likelihood, n_words),
    }

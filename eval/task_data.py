"""What the lm-eval tasks in `eval/tasks` are made of: their documents and their metrics."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .embedded import HELD_OUT_BYTES
from .recall_task import LENGTH, N_KEYS, N_VALUES, PAIRS, recall_words

if TYPE_CHECKING:
    from datasets import Dataset

TASKS_FOLDER = str(Path(__file__).resolve().parent / "tasks")
# Tasks, and tags that stand for several.
TASKS = {
    "recall": "16 pairs in 128 tokens, 10,240 queries (tiny-recall)",
    "bytes": "perplexity per byte of held-out documentation, 100 documents (tiny-hybrid)",
    "recall_sizes": "4 pairs in 64 tokens to 16 in 512 and 32 in 128, five tasks (tiny-recall)",
    "needle": "one pair at the beginning, middle and end of 1,024 words of filler, three tasks (tiny-recall)",
    "copying": "24 pairs written twice, values of the second copy (tiny-recall)",
}

EVALUATION_SEED = 1_000_003
SEQUENCES = 640
EVERY = 3  # of a sequence's 48 queries: neighbours share most of their context, more sequences tell more


def recall_documents(
    sequences: int = SEQUENCES, every: int = EVERY, pairs: int = PAIRS, length: int = LENGTH, **_: Any
) -> dict[str, Dataset]:
    """Makes the queries of the task `recall` (and of its other sizes), the same ones on every machine.

    Args:
        sequences: how many, of `length` tokens and `pairs` pairs each.
        every: which of the length/2 - pairs queries of each become documents: every `every`-th.

    Returns:
        a split `test` of sequences x ceil(queries / every) documents with `context` (all words up to the query's key),
        `target` (the value), `sequence` and `position` (of the key).
    """
    return _recall_queries(sequences, every, pairs, length)


@cache  # every row asks for them
def _recall_queries(sequences: int, every: int, pairs: int, length: int) -> dict[str, Dataset]:
    rng = random.Random(EVALUATION_SEED)
    texts = [recall_words(rng, pairs, length) for _ in range(sequences)]
    return _queries(texts, range(2 * pairs, length, 2 * every))


def _queries(texts: list[list[str]], positions: range) -> dict[str, Dataset]:
    """A document per sequence of words and position of a key."""
    from datasets import Dataset

    return {
        "test": Dataset.from_list(
            [
                {"context": " ".join(words[: p + 1]), "target": words[p + 1], "sequence": n, "position": p}
                for n, words in enumerate(texts)
                for p in positions
            ]
        )
    }


def copying_documents(sequences: int = 96, pairs: int = 24, every: int = EVERY, **_: Any) -> dict[str, Dataset]:
    """A list of pairs, written twice: the documents ask for values of the second copy, every `every`-th of them.

    Its keys are not asked for: no model that ships was trained to continue with one.
    """
    rng = random.Random(EVALUATION_SEED)
    lists = [recall_words(rng, pairs, 2 * pairs + 2)[: 2 * pairs] for _ in range(sequences)]
    return _queries([words + words for words in lists], range(2 * pairs, 4 * pairs, 2 * every))


def needle_documents(depth: float, length: int = 1024, sequences: int = 32, **_: Any) -> dict[str, Dataset]:
    """One pair among filler words; the last word is its key, the target its value.

    Args:
        depth: where the pair stands: 0 at the beginning, 1 right before the question.
        length: words of the context, filler, pair and question.
        sequences: documents, each with a pair of its own.
    """
    from datasets import Dataset

    rng = random.Random(EVALUATION_SEED)
    before = int(depth * (length - 3))
    documents = []
    for _n in range(sequences):
        key, value = (f"{kind}{int(rng.random() * count)}" for kind, count in (("k", N_KEYS), ("v", N_VALUES)))
        words = ["_"] * before + [key, value] + ["_"] * (length - 3 - before) + [key]
        documents.append({"context": " ".join(words), "target": value})
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

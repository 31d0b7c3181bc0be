"""Multi-query associative recall: the sequences that tiny-recall learns, is calibrated and is measured on.

A sequence first writes pairs `key value`. Each of the slots that remain asks for one of those keys, drawn at random,
and is followed by its answer: one forward pass scores every query. Keys come back often, so the keys of a chunk are
strongly correlated, and that is what makes the inverse of the delta rule matter.

Everything is drawn through `random.Random.random`, whose sequence Python guarantees: a seed gives the same text on
every version and machine.
"""

from __future__ import annotations

import random

N_KEYS = 32
N_VALUES = 32
PAIRS = 16
LENGTH = 128


def recall_sequence(rng: random.Random, pairs: int = PAIRS, length: int = LENGTH) -> tuple[list[int], list[int]]:
    """Makes one sequence.

    Args:
        rng: source of randomness.
        pairs: pairs to remember, at most 32; their keys differ.
        length: tokens; even, more than twice the pairs.

    Returns:
        keys and values, length/2 numbers below 32 each; they alternate in the sequence, and those from `pairs` on are
        the queries and their answers.

    Raises:
        ValueError: if the pairs do not fit.
    """
    if not 0 < pairs <= N_KEYS or length % 2 or length <= 2 * pairs:
        raise ValueError(f"{pairs} pairs do not fit into {length} tokens (1 to {N_KEYS}; even, more than twice)")
    known = sorted(range(N_KEYS), key=[rng.random() for _ in range(N_KEYS)].__getitem__)[:pairs]
    meaning = [int(rng.random() * N_VALUES) for _ in range(pairs)]
    asked = [*range(pairs), *(int(rng.random() * pairs) for _ in range(length // 2 - pairs))]
    return [known[i] for i in asked], [meaning[i] for i in asked]


def recall_words(rng: random.Random, pairs: int = PAIRS, length: int = LENGTH) -> list[str]:
    """One sequence as `length` words: `k5 v30 k17 v2 ...`; queries stand at the even positions from 2 `pairs` on."""
    keys, values = recall_sequence(rng, pairs, length)
    return [word for key, value in zip(keys, values, strict=True) for word in (f"k{key}", f"v{value}")]

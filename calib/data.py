"""Calibration tokens: documents of a dataset, packed to fixed length without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError
from .documents import Documents

DEFAULT_SAMPLES = 128


@dataclass(frozen=True)
class Samples:
    """Sequences, and where they came from.

    tokens: int64 [samples, seq_len]. digest: sha256 over them, so that it changes with everything that reaches the
    model. seed: of the shuffle; None is file order. column: where the text stood. documents: how many were read.
    """

    name: str
    tokens: Tensor
    digest: str
    seed: int | None = None
    column: str | None = None
    documents: int | None = None

    def described(self) -> dict[str, Any]:
        """What a calibration records of its data; JSON-able. Equal descriptions mean equal tokens."""
        return {
            "name": self.name,
            "samples": self.tokens.shape[0],
            "seq_len": self.tokens.shape[1],
            "sha256": self.digest,
            "seed": self.seed,
            "column": self.column,
            "documents": self.documents,
        }


def load_samples(
    name: str,
    tokenizer: Any,
    samples: int | None,
    seq_len: int,
    text_column: str | None = None,
    *,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Samples:
    """Take `samples` sequences of `seq_len` tokens; None takes 128, or what there is.

    name: a local .jsonl, .json, .txt (one document per line), .parquet or .arrow file, a directory written by
    `Dataset.save_to_disk` or holding such files, or a hub dataset; the last three take `name[:config[:split]]`.
    A document of at least seq_len tokens is cut into whole sequences, its rest is left out; shorter ones are joined,
    with the tokenizer's end of text between. text_column: the column of the text, or of conversations (lists of
    {role, content}), which go through the tokenizer's chat template; found where it is clear. seed: shuffle the
    documents (streams: in a buffer of 10,000); None keeps their order. vocab_size: the model's.

    Raises QDeltaNetError if the dataset is missing, empty, has no text, or holds fewer sequences than asked for, and
    for a token that is beyond the model's vocabulary.
    """
    wanted = DEFAULT_SAMPLES if samples is None else samples
    if wanted < 1 or seq_len < 1:
        raise QDeltaNetError(f"samples ({wanted}) and seq-len ({seq_len}) must be at least 1")
    documents = Documents(name, tokenizer, text_column, seed)
    rows = [torch.tensor(row) for row in islice(_packed(documents, tokenizer, seq_len), wanted)]
    if not rows:
        raise QDeltaNetError(
            f"dataset {name}: too short for one sequence of {seq_len} tokens, even with all its {documents.count} "
            "documents together; lower --seq-len"
        )
    if samples is not None and len(rows) < samples:
        raise QDeltaNetError(
            f"dataset {name}: it holds {len(rows)} sequences of {seq_len} tokens, {samples} were asked for: "
            "lower --samples or --seq-len"
        )
    tokens = torch.stack(rows)
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise QDeltaNetError(
            f"the tokenizer does not match the model: it gave token {int(tokens.max())}, the model's vocabulary has "
            f"{vocab_size}"
        )
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Samples(name, tokens, digest, seed, documents.column, documents.count)


def _packed(documents: Iterable[str], tokenizer: Any, seq_len: int) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rest: list[int] = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= seq_len:
            for start in range(0, len(ids) - seq_len + 1, seq_len):
                yield ids[start : start + seq_len]
            continue
        rest += ids + end
        while len(rest) >= seq_len:
            yield rest[:seq_len]
            rest = rest[seq_len:]

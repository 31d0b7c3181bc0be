"""Calibration text: hub datasets and local files, packed to fixed length without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError

LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class Samples:
    """tokens: int64 [samples, seq_len]. digest: sha256 over them, written into the calibration."""

    name: str
    tokens: Tensor
    digest: str


def load_samples(name: str, tokenizer: Any, samples: int, seq_len: int, text_column: str | None = None) -> Samples:
    """Take `samples` sequences of `seq_len` tokens.

    name: a local .jsonl, .json, .txt or .parquet file, or a hub dataset `id[:config[:split]]`. A document of at least
    seq_len tokens is cut into whole sequences; shorter ones are joined, with the tokenizer's end of text between.

    Raises QDeltaNetError if the dataset is missing, empty, has no text, or is too short for a single sequence.
    """
    if samples < 1 or seq_len < 1:
        raise QDeltaNetError(f"samples ({samples}) and seq-len ({seq_len}) must be at least 1")
    rows: list[list[int]] = []
    for row in _sequences(_documents(name, text_column), tokenizer, seq_len):
        rows.append(row)
        if len(rows) == samples:
            break
    if not rows:
        raise QDeltaNetError(f"dataset {name}: too short for one sequence of {seq_len} tokens; lower --seq-len")
    tokens = torch.tensor(rows)
    return Samples(name, tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest())


def _sequences(documents: Iterator[str], tokenizer: Any, seq_len: int) -> Iterator[list[int]]:
    rest: list[int] = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= seq_len:
            for start in range(0, len(ids) - seq_len + 1, seq_len):
                yield ids[start : start + seq_len]
            continue
        rest += ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
        while len(rest) >= seq_len:
            yield rest[:seq_len]
            rest = rest[seq_len:]


def _documents(name: str, text_column: str | None) -> Iterator[str]:
    column = text_column
    empty = True
    for row in _rows(name):
        if column is None or column not in row:
            column = _text_column(name, row, text_column)
        if row[column]:
            empty = False
            yield str(row[column])
    if empty:
        raise QDeltaNetError(f"dataset {name}: it holds no text")


def _text_column(name: str, row: dict[str, Any], wanted: str | None) -> str:
    if wanted is not None:
        raise QDeltaNetError(f"dataset {name}: no column {wanted!r}; columns are {', '.join(row)}")
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if not strings:
        raise QDeltaNetError(f"dataset {name}: no text column; columns are {', '.join(row)}")
    return "text" if "text" in strings else strings[0]


def _rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a local file or a streamed hub dataset, with one-line errors."""
    try:
        yield from _open(name)
    except (QDeltaNetError, GeneratorExit):
        raise
    except Exception as e:  # datasets, hub and parsers each have their own
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise QDeltaNetError(f"dataset {name}: cannot be read ({first})") from e


def _open(name: str) -> Any:
    from datasets import load_dataset

    path = Path(name)
    if path.suffix in LOADERS:
        if not path.is_file():
            raise QDeltaNetError(f"dataset {name}: no such file")
        if path.stat().st_size == 0:
            raise QDeltaNetError(f"dataset {name}: the file is empty")
        return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train", streaming=True)
    if path.exists():
        raise QDeltaNetError(f"dataset {name}: local files end in {', '.join(LOADERS)}")
    dataset, config, split = (*name.split(":"), "", "")[:3]
    return load_dataset(dataset, config or None, split=split or "train", streaming=True)

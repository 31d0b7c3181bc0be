"""Writes the texts that ship in `eval/data`. For a new format of a data set only: every figure changes with them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from ..embedded import DATASETS, HELD_OUT_BYTES
from ..recall_task import recall_words
from .corpus import pieces, split

CALIBRATION_SEED = 2_000_003
DOCUMENT_BYTES = 1000
HELD_OUT_DOCUMENTS = 100
CALIBRATION_DOCUMENTS = 100
CALIBRATION_SEQUENCES = 512


def freeze() -> None:
    """Writes the held-out text and the calibration sets, each as JSON lines with the field `text`."""
    train, held_out = split()
    _write(HELD_OUT_BYTES, _spread(pieces(held_out, DOCUMENT_BYTES), HELD_OUT_DOCUMENTS))
    _write(DATASETS["bytes"], _spread(pieces(train, DOCUMENT_BYTES), CALIBRATION_DOCUMENTS))
    rng = random.Random(CALIBRATION_SEED)
    _write(DATASETS["recall"], (" ".join(recall_words(rng)) for _ in range(CALIBRATION_SEQUENCES)))


def _spread(texts: list[str], count: int) -> list[str]:
    """`count` of the texts, evenly spread."""
    return [texts[i * len(texts) // count] for i in range(count)]


def _write(path: str, texts: Iterable[str]) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze()

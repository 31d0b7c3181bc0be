"""What decode costs in a model: token by token with a cache, beside the same model at once, and float."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from ...core import QDeltaNetError
from ..prepare import saturation
from ..recall_task import PAIRS, recall_words
from ..statistics import Documents, paired

Progress = Callable[[int, int], None]
Result = dict[str, Any]
PIECE = 32  # tokens of a piece of prefill
SEED = 3_000_017  # of recall sequences that neither calibration nor the task `recall` draws

# Ways to hold the state, all else as in recipe int8.
RECIPES = (
    "int8+sites.state.format=float",
    "int8+sites.state.format=int16",
    "int8",
    "int8+sites.state.feedback=int8",
    "int8+sites.state.feedback=int4",
    "int8+sites.state.granularity=per_channel",
    "int8-decode",
    "int8+sites.state.scale=dynamic",
    "int8+sites.state.scale=dynamic+sites.state.feedback=int8",
    "int8+sites.state.format=int4",
    "int8+sites.state.format=int4+sites.state.feedback=int8",
)

# Of the counted tokens of each window, from -log p [N, n] in nats and whether each was the likeliest [N, n].
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bits": lambda nll, right: nll.mean(1) / math.log(2),
    "recall": lambda nll, right: right.double().mean(1),
    "nll": lambda nll, right: nll.mean(1),
}


@dataclass(frozen=True)
class Windows:
    """What is decoded. tokens: [N, T]. counted: which tokens are scored, never the first. metrics: names in METRICS.
    prefill: that many are run in pieces of 32 (the last may be shorter), the others one by one.

    Raises QDeltaNetError for a prefill that leaves nothing to decode.
    """

    tokens: Tensor
    counted: slice
    metrics: Sequence[str]
    prefill: int = 0

    def __post_init__(self) -> None:
        given = self.inputs.shape[1]
        if not 0 <= self.prefill < given:
            raise QDeltaNetError(f"prefill {self.prefill} leaves nothing to decode of {given} tokens: lower it")

    @property
    def inputs(self) -> Tensor:
        """[N, T - 1]: of the last token nothing is asked."""
        return self.tokens[:, :-1]

    @property
    def ends(self) -> list[int]:
        """Of the pieces.

        >>> Windows(torch.zeros(1, 68), slice(1, None), ["bits"], prefill=64).ends
        [32, 64, 65, 66, 67]
        """
        pieces = range(PIECE, self.prefill + PIECE, PIECE)
        return [*(min(e, self.prefill) for e in pieces), *range(self.prefill + 1, self.inputs.shape[1] + 1)]


def recall_tokens(tokenizer: Any, n: int, length: int, seed: int = SEED) -> Tensor:
    """Fresh sequences of the recall task, [n, length]. Raises QDeltaNetError if 16 pairs do not fit into the length."""
    rng = random.Random(seed)
    try:
        texts = [" ".join(recall_words(rng, PAIRS, length)) for _ in range(n)]
    except ValueError as e:
        raise QDeltaNetError(str(e)) from e
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])


def in_pieces(model: Any, tokens: Tensor, ends: Sequence[int]) -> Iterator[Tensor]:
    """Logits [N, t, vocabulary] of one piece of tokens [N, T] after the other, through a growing cache.

    ends: of the pieces, ascending.
    """
    cache = DynamicCache(config=model.config)
    for start, stop in pairwise([0, *ends]):
        with torch.no_grad():
            done = model(
                input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True, **_placed(model, start, stop)
            )
        yield done.logits


def _placed(model: Any, start: int, stop: int) -> dict[str, Any]:
    """transformers cannot ask the cache of a model with linear attention alone for its length: such a one is told."""
    if "full_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]):
        return {}
    masks = {"full_attention": None, "linear_attention": None}
    return {"position_ids": torch.arange(start, stop, device=model.device)[None], "attention_mask": masks}


def scores(model: Any, windows: Windows, ends: Sequence[int], tick: Callable[[], None]) -> dict[str, Documents]:
    """Every metric of the windows, each of which is a document; the model runs in pieces."""
    tokens, nll, right = windows.tokens.to(model.device), [], []
    for (start, stop), logits in zip(
        pairwise([0, *ends]), in_pieces(model, windows.inputs.to(model.device), ends), strict=True
    ):
        following = tokens[:, start + 1 : stop + 1]
        nll.append(cross_entropy(logits.transpose(1, 2).double(), following, reduction="none").cpu())
        right.append((logits.argmax(-1) == following).cpu())
        tick()
    counted = torch.zeros(tokens.shape[1], dtype=torch.bool)
    counted[windows.counted] = True
    of_counted = [torch.cat(x, dim=1)[:, counted[1:]] for x in (nll, right)]
    n = len(tokens)
    return {
        name: Documents("mean", tuple(range(n)), METRICS[name](*of_counted).numpy(), np.ones(n))
        for name in windows.metrics
    }


def decode_costs(
    windows: Windows, models: Sequence[tuple[str, Callable[[], Any]]], progress: Progress | None = None
) -> list[Result]:
    """A row per model, made when its turn comes: what it scores at once over the windows, and in decode.

    The first model, at once, is what all others are compared with, window by window. Returns plain data: recipe,
    seconds, and under `at_once` and `decode` the clipped codes and by metric value, stderr, difference,
    difference_stderr.
    """
    ways = {"at_once": [windows.inputs.shape[1]], "decode": windows.ends}
    done, total = 0, len(models) * sum(map(len, ways.values()))

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    base: dict[str, Documents] = {}
    rows: list[Result] = []
    for name, make in models:
        start, model = time.monotonic(), make()
        row: Result = {"recipe": name}
        for way, ends in ways.items():
            before = sum(saturation(model).values())
            found = scores(model, windows, ends, tick)
            base = base or found
            row[way] = {"clipped": sum(saturation(model).values()) - before}
            row[way] |= {metric: _compared(documents, base[metric]) for metric, documents in found.items()}
        rows.append({**row, "seconds": round(time.monotonic() - start, 1)})
    return rows


def _compared(found: Documents, base: Documents) -> dict[str, float]:
    difference, stderr = paired(found, base)
    return {"value": found.estimate, "stderr": found.stderr, "difference": difference, "difference_stderr": stderr}

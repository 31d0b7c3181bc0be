"""Share one forward pass among requests whose inputs are prefixes of one another, and score them from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Score = tuple[float, bool]


@dataclass
class Shared:
    """Tokens that go through the model once, and the requests that they score."""

    tokens: tuple[int, ...]
    members: list[int] = field(default_factory=list)


def share_prefixes(inputs: Sequence[Sequence[int]]) -> list[Shared]:
    """Group inputs so that every member is a prefix of its group's tokens; longest groups first.

    A causal model gives each of them the same logits as alone, so 16 queries of one sequence cost one pass, not 16. In
    sorted order whatever extends a sequence stands right behind it.
    """
    order = sorted(range(len(inputs)), key=lambda i: tuple(inputs[i]), reverse=True)
    groups: list[Shared] = []
    for i in order:
        tokens = tuple(inputs[i])
        if not groups or groups[-1].tokens[: len(tokens)] != tokens:
            groups.append(Shared(tokens))
        groups[-1].members.append(i)
    return sorted(groups, key=lambda g: -len(g.tokens))


def shared_logits(model: Any, groups: Sequence[Shared], device: torch.device) -> Tensor:
    """[len(groups), longest, vocabulary]. Shorter inputs are padded on the right and masked: a dynamic scale must not
    see what the padding tokens would have held."""
    width = max(len(g.tokens) for g in groups)
    rows = [[*g.tokens, *[0] * (width - len(g.tokens))] for g in groups]
    mask = [[1] * len(g.tokens) + [0] * (width - len(g.tokens)) for g in groups]
    tokens = torch.tensor(rows, device=device)
    padded = None if all(len(g.tokens) == width for g in groups) else torch.tensor(mask, device=device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, attention_mask=padded, use_cache=False).logits
    return logits


def span(context: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """The positions, first and behind the last, whose logits predict the target."""
    stop = len(context) + len(target) - 1
    return stop - len(target), stop


def score_of(logits: Tensor, context: Sequence[int], target: Sequence[int]) -> Score:
    """Log-likelihood of the target after the context, and whether greedy decoding gives it. logits: [T, vocabulary]."""
    log_probs = torch.log_softmax(logits[slice(*span(context, target))].float(), dim=-1)
    wanted = torch.tensor(target, device=logits.device)
    total = log_probs.gather(1, wanted[:, None]).sum()
    return float(total), bool((log_probs.argmax(-1) == wanted).all())

"""How far a model's next-token distributions are from a baseline's, token by scored token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # logits of one block: 32 MiB in float64, whatever the vocabulary


class Divergence(NamedTuple):
    """Sums over scored tokens: KL(baseline || own) in nats, tokens with the same likeliest next token, their number."""

    kl: float
    agree: int
    tokens: int

    def plus(self, other: Divergence) -> Divergence:
        return Divergence(self.kl + other.kl, self.agree + other.agree, self.tokens + other.tokens)


def divergences(baseline: Tensor, own: Tensor, spans: Sequence[tuple[int, int]]) -> list[Divergence]:
    """One per span (start, stop) of positions that predict scored tokens. Logits of one sequence, [T, vocabulary] each.

    In float64: the divergence of a good INT16 recipe is below float32's resolution of its terms.
    """
    positions = sorted({p for start, stop in spans for p in range(start, stop)})
    block = max(1, _AT_ONCE // own.shape[-1])
    parts = [
        _per_token(baseline[chosen], own[chosen])
        for chosen in (positions[i : i + block] for i in range(0, len(positions), block))
    ]
    place = {p: i for i, p in enumerate(positions)}
    kl, agree = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    found = []
    for start, stop in spans:
        first = place[start]  # positions of a span stand next to one another
        within = slice(first, first + stop - start)
        found.append(Divergence(float(kl[within].sum()), int(agree[within].sum()), stop - start))
    return found


def _per_token(baseline: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """(KL, whether the argmax agrees), each [n], of logits [n, vocabulary]; what the baseline excludes adds nothing."""
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (baseline, own))
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0), baseline.argmax(-1) == own.argmax(-1)

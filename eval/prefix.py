"""Share one forward pass among requests whose inputs are prefixes of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


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

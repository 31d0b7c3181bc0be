"""Requests of lm-eval in batches that depend on nothing but the requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core import QDeltaNetError

Request = tuple[Any, list[int], list[int]]


def fitted(request: Request, max_length: int) -> Request:
    """(key, context, target), with a context cut from the left where both together exceed the model's length.

    Raises QDeltaNetError for a target that is too long by itself.
    """
    key, context, target = request
    if len(target) > max_length:
        raise QDeltaNetError(
            f"a target of {len(target)} tokens does not fit the model's {max_length}: raise max_length in --model_args"
        )
    spare = max_length + 1 - len(target)
    return (key, context[-spare:], target) if len(context) > spare else request


def generation_batches(
    requests: Sequence[tuple[str, Mapping[str, Any]]], size: int, encode: Callable[[str], list[int]]
) -> list[list[int]]:
    """Positions of at most `size` requests (context, options) with the same options each, longest contexts first."""
    alike: dict[str, list[int]] = {}
    for i, (_, options) in enumerate(requests):
        alike.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(i)
    batches = []
    for members in alike.values():
        ordered = sorted(members, key=lambda i: (-len(encode(requests[i][0])), requests[i][0]))
        batches += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return batches

"""`plan(method, chunk_size, **options)`."""

from __future__ import annotations

import inspect
from typing import Any

from ..core import QDeltaNetError, unknown
from .methods import METHODS, identity
from .plan import Plan

CHUNK_SIZES = (16, 32, 64, 128)


def plan(method: str = "block_merge", chunk_size: int = 64, **options: Any) -> Plan:
    """Build the plan of a method. Options that are None take the method's default.

    >>> plan("block_merge", 64).depth, plan("neumann", 64, residual_steps=8).matmuls
    (7, 7)

    chunk_size 1 gives the empty plan for every method. Raises QDeltaNetError for an unknown method or option (with the
    nearest names), or a chunk size that is no power of two.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise QDeltaNetError(
            f"chunk size {chunk_size}: must be a power of two (usual: {', '.join(map(str, CHUNK_SIZES))})"
        )
    if chunk_size == 1:
        return identity(1)
    builder = METHODS[method]
    known = set(inspect.signature(builder).parameters) - {"chunk_size"}
    given = {k: v for k, v in options.items() if v is not None}
    for name in given:
        if name not in known:
            raise unknown(f"option of {method}", name, known or {"(none)"})
    return builder(chunk_size, **given)


def method_options(method: str) -> frozenset[str]:
    """Names of a method's options."""
    return frozenset(inspect.signature(METHODS[method]).parameters) - {"chunk_size"}

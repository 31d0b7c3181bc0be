"""T = I: the empty plan."""

from __future__ import annotations

from ..plan import Plan


def identity(chunk_size: int) -> Plan:
    """No steps: T = I. Exact for a chunk of one token (the decode step); for longer chunks an inverse that is broken
    on purpose, the control that shows whether a measure feels the inverse at all."""
    return Plan("identity", chunk_size, ())

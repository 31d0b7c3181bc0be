"""How many CPU threads share a sum of floats: its last bits depend on their number, so work that is to be repeated
pins it, whatever a launcher set in OMP_NUM_THREADS (`accelerate launch` and torchrun set 1 for several processes)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def threads(n: int | None) -> Iterator[int]:
    """torch's CPU threads within the block, and as before behind it; None: all usable cores. Yields their number."""
    before, chosen = torch.get_num_threads(), usable_cores() if n is None else n
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)

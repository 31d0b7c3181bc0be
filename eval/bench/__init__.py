"""Benchmarks: every case verified before it is timed, ours and the peer alternating in one run."""

from .timing import Case, Row, Settings, keep_memory, run_cases

__all__ = ["Case", "Row", "Settings", "keep_memory", "run_cases"]

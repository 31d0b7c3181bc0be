"""Conformance: the same codes on every backend, shown on a user's own machine."""

from .cases import Case, suite
from .run import Report, run_suite

__all__ = ["Case", "Report", "run_suite", "suite"]

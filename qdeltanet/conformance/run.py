"""Run the suite on a backend and count what differs from reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core import Backend
from .cases import Case, Outcome

KEPT_FAILURES = 20


@dataclass
class Report:
    """What a run of the suite found; mismatches are elements that differ from reference.

    sections: per section cases, elements and mismatches. failures: the first cases that differ, each with what differs.
    """

    backend: str
    device: str
    cases: int = 0
    elements: int = 0
    mismatches: int = 0
    seconds: float = 0.0
    sections: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, case: Case, elements: int, differing: dict[str, int]) -> None:
        section = self.sections.setdefault(case.section, {"cases": 0, "elements": 0, "mismatches": 0})
        wrong = sum(differing.values())
        for target, n in (("cases", 1), ("elements", elements), ("mismatches", wrong)):
            section[target] += n
            setattr(self, target, getattr(self, target) + n)
        if wrong and len(self.failures) < KEPT_FAILURES:
            what = ", ".join(f"{name}: {n}" for name, n in list(differing.items())[:5])
            self.failures.append(f"{case.section}, {case.name}: {what}")


def run_suite(
    backend: Backend,
    reference: Backend,
    cases: Sequence[Case],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Every case on `reference` on the CPU and on `backend` on `device`; a case that raises counts as one mismatch."""
    report = Report(backend.name, device)
    start = time.monotonic()
    for i, case in enumerate(cases):
        expected = case.run(reference, torch.device("cpu"))
        try:
            found = case.run(backend, torch.device(device))
            differing = compare(expected, found)
        except Exception as e:  # whatever a backend on a user's machine does
            differing = {f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}": 1}
        report.add(case, sum(x.numel() for x in expected.values()), differing)
        if progress is not None:
            progress(i + 1, len(cases))
    report.seconds = round(time.monotonic() - start, 1)
    return report


def compare(expected: Outcome, found: Outcome) -> dict[str, int]:
    """Differing elements by name; a tensor that one side lacks, or of another shape, counts whole."""
    differing = {}
    for name in expected.keys() | found.keys():
        n = _differing(expected.get(name), found.get(name))
        if n:
            differing[name] = n
    return differing


def _differing(a: Tensor | None, b: Tensor | None) -> int:
    if a is None or b is None or a.shape != b.shape:
        return max(x.numel() for x in (a, b) if x is not None)
    return int((a != b).sum())

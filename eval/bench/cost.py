"""`qdeltanet bench cost`: the order in which the cost model puts the methods, against the CPU's.

Our CPU runner works on whole batches of matrices, step by step, so a step's overhead in Python and torch is shared by
the batch: in a profile's terms the overhead is a latency and the batch its concurrency. It has no vector
unit that takes single rows: every product is a batched matrix product, and is priced as one here (`as_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...core import (
    IntFormat,
    ObservingArithmetic,
    Operand,
    SiteScheme,
    relative_error,
)
from ...inverse import Plan, Profile, plan, plan_cost, run_plan
from ...inverse.methods.block_merge import radices_of
from ...inverse.speedups import alike
from .delta_rule import Size, inputs_of
from .inverse import TOLERANCE, equals_reference, integer_inverse, ut_matrices
from .timing import Case, Progress, Settings, keep_memory, run_cases, threads

Run = Callable[[], Any]
HEADS = 4
REFERENCE = "block_merge"  # what every method is timed beside
TIE = 1.05  # costs nearer to one another than this are no statement about an order
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("block_merge", "block_merge", {}),
    ("powers of radix 4", "block_merge", {"radices": "fours", "join": "powers"}),
    ("bunch_hopcroft", "bunch_hopcroft", {"diagonal": "implicit"}),
    ("cayley_hamilton", "cayley_hamilton", {"diagonal": "implicit"}),
    ("mixed", "mixed", {"diagonal": "implicit"}),
    ("neumann", "neumann", {}),
    ("neumann linear", "neumann", {"residual_sum": "linear"}),
    ("truncated_neumann", "truncated_neumann", {}),
    ("newton_schulz", "newton_schulz", {}),
    ("newton_schulz from I", "newton_schulz", {"start": "identity"}),
    ("column_sweep", "column_sweep", {}),
    ("forward_substitution", "forward_substitution", {}),
)


@dataclass(frozen=True)
class OrderRow:
    """One method. predicted, measured: time relative to block_merge's; spread: of the measured, 10th and 90th
    percentile; predicted_us: the model's, per matrix; measured_us likewise."""

    method: str
    chunk_size: int
    format: str
    predicted: float
    measured: float
    spread: tuple[float, float]
    predicted_us: float
    measured_us: float
    verified: bool
    how: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Order:
    """Rows in the order of the model; Spearman's rank correlation with the measured order; pairs that the model has the
    wrong way round although their spreads do not overlap, ties left out: (cheaper by the model, as measured)."""

    rows: tuple[OrderRow, ...]
    rank_correlation: float
    inverted: tuple[tuple[str, str], ...]


def compare_order(
    profile: Profile,
    chunk_size: int = 64,
    bits: int | None = 8,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Order:
    """Time every method on one thread, in INT`bits` (None: float32, step by step), beside the profile's order.

    The batch is the profile's concurrency. Each method's result is verified before it is timed. The process keeps the
    memory it frees from here on, so that no page faults are timed.
    """
    keep_memory()
    scheme = SiteScheme(None if bits is None else IntFormat(bits))
    name = "float32" if bits is None else f"int{bits}"
    batch = max(1, round(profile.concurrency / HEADS))
    A = ut_matrices(inputs_of(Size(1, batch * chunk_size, HEADS, HEADS, 64, chunk_size), "cpu"), chunk_size)
    plans = method_plans(chunk_size)
    with threads(1):
        timed = run_cases(list(_cases(A, plans, bits)), settings or Settings(), progress)
    costs = {m: plan_cost(as_run(p), alike(p, scheme), profile).total for m, p in plans.items()}
    matrices = A.shape[0] * A.shape[1]
    rows = []
    for row in timed:
        low, high = (x / row.peer_ms for x in row.ours_spread)
        method, cost = row.ours, costs[row.ours]
        relative = cost / costs[REFERENCE], row.ours_ms / row.peer_ms, (low, high)
        each = cost / 1e3, row.ours_ms * 1e3 / matrices
        rows.append(OrderRow(method, chunk_size, name, *relative, *each, row.verified, row.how))
    rows.sort(key=lambda r: r.predicted)
    return Order(tuple(rows), rank_correlation(rows), tuple(inverted_pairs(rows)))


def method_plans(chunk_size: int) -> dict[str, Plan]:
    """The methods that are compared, by label."""
    radices = radices_of(chunk_size, 4)
    result = {}
    for label, method, options in METHODS:
        own = {k: radices if v == "fours" else v for k, v in options.items()}
        result[label] = plan(method, chunk_size, **own)
    return result


def as_run(p: Plan) -> Plan:
    """The plan as the CPU runs it: every product a matrix product."""
    return replace(p, steps=tuple(replace(s, unit="matrix") for s in p.steps))


def rank_correlation(rows: Sequence[OrderRow]) -> float:
    """Spearman's rho of predicted and measured; equal values share their mean rank."""
    ranks = [_ranks([getattr(r, name) for r in rows]) for name in ("predicted", "measured")]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Sequence[float]) -> Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    below = (x[:, None] > x[None, :]).sum(1)
    return below + ((x[:, None] == x[None, :]).sum(1) - 1) / 2


def inverted_pairs(rows: Sequence[OrderRow]) -> Iterator[tuple[str, str]]:
    """Pairs that the model sets apart by more than TIE, against a measurement that is beyond noise."""
    for a in rows:
        for b in rows:
            if TIE * a.predicted < b.predicted and a.spread[0] > b.spread[1]:
                yield a.method, b.method


def _cases(A: Tensor, plans: dict[str, Plan], bits: int | None) -> Iterator[Case]:
    runs = {label: _runner(A, p, bits) for label, p in plans.items()}
    for label, (run, verify) in runs.items():
        yield Case(label, label, run, REFERENCE, runs[REFERENCE][0], verify)


def _runner(A: Tensor, p: Plan, bits: int | None) -> tuple[Run, Callable[[], tuple[bool, str]]]:
    """Step by step in both arithmetics (the float reader of joins is another program), and how it is verified:
    integers to the bit against reference, floats against the same plan in float64."""
    if bits is not None:
        arithmetic, operand = integer_inverse(A, p, "cpu", "cpu", bits)
        return lambda: run_plan(p, operand, arithmetic), equals_reference(p, operand, arithmetic)
    floats = ObservingArithmetic(lambda site, x, compact: None)

    def run(x: Tensor = A) -> Operand:
        T = run_plan(p, Operand("A", x), floats)
        assert T is not None
        return T

    def verify() -> tuple[bool, str]:
        error = float(relative_error(run(A.double()).codes, run().codes.double()).max())
        return error <= TOLERANCE, f"worst matrix {error:.1e} from float64"

    return run, verify

"""Which option each group of layers takes: least cost with the sum of losses within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...core import QDeltaNetError


@dataclass(frozen=True)
class Option:
    """One way to run a group of layers. narrowed: sites in the narrow format. cost: ns per token of the group's layers.
    loss: expected increase over the base recipe's, nats per token."""

    inverse: str
    narrowed: tuple[str, ...]
    cost: float
    loss: float


def pareto(options: Iterable[Option]) -> list[Option]:
    """Options that none beats in both cost and loss, cheapest first; one of each pair of equals."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss, o.narrowed, o.inverse)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def choose(options: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option of each list: least total cost with a total loss of at most `budget`; None where there is none.

    A multiple-choice knapsack, solved exactly by HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [o for group in options for o in group]
    cost, loss = np.array([o.cost for o in flat]), np.array([o.loss for o in flat])
    group = np.repeat(np.arange(len(options)), [len(g) for g in options])
    one = LinearConstraint((group == np.arange(len(options))[:, None]).astype(float), 1, 1)
    # HiGHS takes constraints with a tolerance of 1e-6: losses in units of their spread keep it far below a loss.
    unit = max(float(np.ptp(loss)), 1e-12)
    limit = LinearConstraint(loss[None] / unit, -np.inf, budget / unit)
    done = milp(
        cost / max(float(cost.max()), 1e-12),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[one, limit],
        options={"mip_rel_gap": 0.0},
    )
    if done.status == 2:
        return None
    if done.x is None:
        raise QDeltaNetError(f"the choice could not be solved: {done.message}")
    return [flat[i] for i in np.flatnonzero(done.x > 0.5)]


def spread(n: int, keep: int) -> list[int]:
    """`keep` of n positions, both ends among them."""
    if n <= keep:
        return list(range(n))
    return sorted({round(i * (n - 1) / max(keep - 1, 1)) for i in range(keep)})


def least_loss(options: Sequence[Sequence[Option]]) -> list[Option]:
    """The option of least loss of each list."""
    return [min(group, key=lambda o: (o.loss, o.cost)) for group in options]

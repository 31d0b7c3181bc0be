"""The search: measure choices one by one, choose together, verify what was chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...core import QDeltaNetError
from ...recipe import Recipe
from .candidates import BASE, NARROW, NARROWED, Group, make_groups
from .choose import Option, choose, least_loss
from .harness import Harness, Loss
from .journal import Journal
from .prices import Price
from .stages import Settings, Stages

Progress = Callable[[int, int], None]
LADDER = 12  # budgets at which the front is traced
SOLUTIONS = 24  # of the bisection that finds the best one within the budget
VERIFICATIONS = 10  # whole recipes that it measures at most


@dataclass(frozen=True)
class Point:
    """One whole recipe. cost: modelled ns per token of all rules. loss: as measured; predicted: its kl as the sum of
    single ones. choices: by key of `layers`, the inverse and the sites in the narrow format."""

    name: str
    cost: float
    predicted: float | None
    loss: Loss
    choices: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """recipe: the cheapest measured one within the budget, `point` its figures. front: every recipe that was measured,
    cheapest first. base, references: for comparison; left_out: references whose projections are not the base's, which
    cannot be measured here. singles: what each choice alone costs and loses, by group."""

    recipe: Recipe
    point: Point
    front: Sequence[Point]
    base: Point
    references: Sequence[Point]
    left_out: Sequence[str]
    singles: Mapping[str, Any]


def search(
    harness: Harness,
    base: Recipe,
    price: Price,
    budget: float,
    settings: Settings,
    *,
    journal: Journal | None = None,
    references: Sequence[Recipe] = (),
    progress: Progress | None = None,
) -> Found:
    """The cheapest recipe whose measured loss stays within `budget`, by layer (`Settings.uniform`: one for all).

    price: modelled ns per token of one layer's rule. budget: nats per token over float (KL). references: other recipes
    to report beside it, where their projections are the base's. progress(done, total) counts measurements; total grows
    as they are planned.

    Raises QDeltaNetError for a budget that is not positive or that no recipe meets (it says the least that one does),
    a base recipe that leaves the rule in float or whose loss is not finite, and what candidates and data raise.
    """
    if not budget > 0 or math.isinf(budget):
        raise QDeltaNetError(f"budget {budget:g}: must be a positive number of nats per token, or a percentage")
    if any(base.layer(i).rule is None for i in harness.layers):
        raise QDeltaNetError(f"recipe {base.name} leaves the rule in float: start from one that quantizes it")
    journal = journal or Journal(None, {})
    journal.write()  # nothing is left of a search that was refused, and a path that cannot be written is known now
    groups = make_groups(sorted(harness.layers), settings.uniform)
    counter = _Counter(progress, len(groups), settings.keep)
    stages = Stages(harness, base, price, settings, journal, counter)
    found = _Search(stages, groups).run(budget, references)
    counter.finish()
    return found


class _Counter:
    """Which measurements are there, of how many that are to be expected."""

    def __init__(self, progress: Progress | None, groups: int, keep: int) -> None:
        self.progress, self.there = progress, set[str]()
        self.total = groups * (1 + keep + len(NARROWED)) + LADDER + VERIFICATIONS

    def __call__(self, name: str) -> None:
        self.there.add(name)
        self.total = max(self.total, len(self.there))
        if self.progress is not None:
            self.progress(len(self.there), self.total)

    def finish(self) -> None:
        if self.progress is not None:
            self.progress(len(self.there), len(self.there))


class _Search:
    """One budget: the front, and the best point of it."""

    def __init__(self, stages: Stages, groups: Sequence[Group]) -> None:
        self.stages, self.groups = stages, groups
        self.points: dict[str, tuple[Recipe, Point]] = {}  # by fingerprint of the recipe

    def run(self, budget: float, references: Sequence[Recipe]) -> Found:
        self.options = [self.stages.options(group) for group in self.groups]
        self.least = sum(o.loss for o in least_loss(self.options))
        base = self._verified([Option(BASE, (), 0.0, 0.0) for _ in self.groups])
        self._bisect(budget, self._ladder())
        recipe, best = self._best(budget)
        comparable = [r for r in references if self.stages.harness.comparable(r)]
        others = [self._measured(r, r.name, None, {}) for r in comparable]
        left_out = [r.name for r in references if r not in comparable]
        front = sorted((p for _, p in self.points.values()), key=lambda p: (p.cost, p.name))
        singles = {g.name: self.stages.singles(g) for g in self.groups}
        return Found(recipe, best, front, base, others, left_out, singles)

    # -- whole recipes -------------------------------------------------------------------------------------------------

    def _verified(self, chosen: Sequence[Option]) -> Point:
        """The point of a choice, measured unless it has been."""
        recipe, choices = self._recipe(chosen)
        if recipe.fingerprint not in self.points:
            is_base = recipe.fingerprint == self.stages.base.fingerprint
            name = self.stages.base.name if is_base else f"found {len(self.points)}"
            predicted = self.stages.base_loss.kl + sum(o.loss for o in chosen)
            self.points[recipe.fingerprint] = recipe, self._measured(recipe, name, predicted, choices)
        return self.points[recipe.fingerprint][1]

    def _recipe(self, chosen: Sequence[Option]) -> tuple[Recipe, dict[str, Any]]:
        choices = {g.name: o for g, o in zip(self.groups, chosen, strict=True)}
        known = {g.name: {c.name: c for c in self.stages.kept(g)} for g in self.groups}
        recipe = self.stages.recipe({name: (known[name][o.inverse], o.narrowed) for name, o in choices.items()})
        shown = {name: {"inverse": o.inverse, NARROW.format: list(o.narrowed)} for name, o in choices.items()}
        return recipe, shown

    def _measured(self, recipe: Recipe, name: str, predicted: float | None, choices: Mapping[str, Any]) -> Point:
        """Calibrated as ever, and measured as a whole."""

        def measured() -> list[float | None]:
            self.stages.harness.calibrated(recipe)
            return self.stages.harness.loss().as_list()

        loss = Loss.of(self.stages.measure(f"whole {recipe.fingerprint}", measured))
        return Point(name, self.stages.cost(recipe), predicted, loss, choices)

    # -- the walk along the front --------------------------------------------------------------------------------------

    def _ladder(self) -> list[tuple[float, Point]]:
        """Allowances from the least that is possible to what the cheapest choice takes, denser towards the least."""
        most = sum(group[0].loss for group in self.options)
        allowances = [self.least] + [self.least + (most - self.least) * 2.0**-k for k in reversed(range(LADDER))]
        return [(a, self._within(a)) for a in allowances]

    def _within(self, allowance: float) -> Point:
        """The cheapest choice whose single losses add up to at most an allowance."""
        return self._verified(choose(self.options, allowance) or least_loss(self.options))

    def _bisect(self, budget: float, ladder: Sequence[tuple[float, Point]]) -> None:
        """Losses do not quite add up: seek the largest allowance whose recipe, as a whole, stays within the budget."""
        low = max((a for a, p in ladder if p.loss.kl <= budget), default=None)
        high = min((a for a, p in ladder if low is not None and a > low), default=None)
        if low is None or high is None:
            return
        before = len(self.points)
        for _ in range(SOLUTIONS):
            if len(self.points) - before >= VERIFICATIONS:
                return
            middle = (low + high) / 2
            low, high = (middle, high) if self._within(middle).loss.kl <= budget else (low, middle)

    def _best(self, budget: float) -> tuple[Recipe, Point]:
        """The cheapest within the budget, of equals the better. Raises QDeltaNetError where there is none."""
        within = [(r, p) for r, p in self.points.values() if p.loss.kl <= budget]
        if not within:
            least = min(p.loss.kl for _, p in self.points.values())
            raise QDeltaNetError(
                f"budget {budget:.4g} nats per token: the least that was found is {least:.4g} "
                f"({100 * math.expm1(least):.2g}%); raise --budget or start from a finer recipe"
            )
        return min(within, key=lambda found: (found[1].cost, found[1].loss.kl, found[1].name))

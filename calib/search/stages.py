"""The first two stages: which candidates a layer could take, and what each choice alone costs and loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ...core import BindingError, QDeltaNetError
from ...recipe import Recipe
from ..inspect import capture
from .candidates import BASE, NARROWED, Candidate, Group, candidates, overridden, override
from .choose import Option, pareto, spread
from .harness import Harness, Loss
from .journal import Journal
from .matrices import Systems
from .prices import Price, Prices

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """error: candidates above this rms relative error of T are left out. keep: candidates per group whose loss is
    measured. matrices: captured per head. seed: of which matrices."""

    methods: tuple[str, ...]
    formats: tuple[str, ...]
    error: float = 0.2
    keep: int = 12
    matrices: int = 32
    uniform: bool = False
    seed: int = 0


class Stages:
    """Everything that is measured once and for all budgets.

    price: what one layer's rule costs. journal: keeps every measurement. tick: called with the name of each.
    """

    def __init__(
        self, harness: Harness, base: Recipe, price: Price, settings: Settings, journal: Journal, tick: Tick
    ) -> None:
        self.harness, self.base, self.settings = harness, base, settings
        self.journal, self.tick = journal, tick
        self.prices = Prices(price, harness.dims)
        self._grids: dict[int, list[Candidate]] = {}

    # -- what is made once, where it is needed at all ------------------------------------------------------------------

    @cached_property
    def systems(self) -> dict[int, Systems]:
        self.harness.calibrated(self.base)
        model, samples, batch_size = self.harness.model, self.harness.calibrating, self.harness.batch_size
        keep, seed = self.settings.matrices, self.settings.seed
        found = capture(model, samples, keep=keep, batch_size=batch_size, seed=seed)
        return {index: Systems.of(c.A, c.limit) for index, c in found.items()}

    @cached_property
    def base_scales(self) -> dict[str, Tensor]:
        return self.harness.calibrated(self.base)

    @cached_property
    def narrow_scales(self) -> dict[str, Tensor]:
        """Scales of every site in the narrow format."""
        return self.harness.calibrated(self.recipe({"*": (Candidate(BASE), NARROWED)}))

    def recipe(self, choices: Mapping[str, tuple[Candidate, Collection[str]]], **fields: str) -> Recipe:
        """The base recipe with a candidate and narrowed sites for each group by name."""
        return overridden(self.base, {name: override(*choice) for name, choice in choices.items()}, **fields)

    def measure(self, name: str, make: Callable[[], Any]) -> Any:
        """What is recorded under a name, or is made now."""
        found = self.journal.measure(name, make)
        self.tick(name)
        return found

    def cost(self, recipe: Recipe, group: Group | None = None) -> float:
        """ns per token of the rules of a group's layers, or of all."""
        return self.prices.total(recipe, self.harness.layers if group is None else group.layers)

    # -- stage 1: no model runs ----------------------------------------------------------------------------------------

    def kept(self, group: Group) -> list[Candidate]:
        """The base's inverse, and candidates that none beats in both cost and error of T; cheapest first."""
        names = self.measure(f"screen {group.name}", lambda: self._screen(group))
        return [c for c in self._grid(group) if c.name in names]

    def _grid(self, group: Group) -> list[Candidate]:
        """Candidates for a group's chunk size; groups of several sizes keep the base's inverse."""
        sizes = {self.base.layer(i).plan.chunk_size for i in group.layers}
        size = sizes.pop()
        if sizes:
            return [Candidate(BASE)]
        if size not in self._grids:
            self._grids[size] = candidates(size, self.settings.methods, self.settings.formats)
        return self._grids[size]

    def _screen(self, group: Group) -> dict[str, list[float]]:
        """name -> (cost, error) of the candidates that are kept."""
        rated: dict[str, list[float]] = {}
        for candidate in self._grid(group):
            recipe = self.recipe({group.name: (candidate, ())})
            try:
                error = max(self.systems[i].error(recipe.layer(i)) for i in group.layers)
            except BindingError:  # e.g. a plan that power_of_two scales cannot run
                continue
            if error <= self.settings.error or candidate.name == BASE:
                rated[candidate.name] = [self.cost(recipe, group), error]
        front = pareto(Option(name, (), cost, error) for name, (cost, error) in rated.items())
        chosen = [front[i].inverse for i in spread(len(front), self.settings.keep)]
        return {name: rated[name] for name in dict.fromkeys([BASE, *chosen])}

    # -- stage 2: each choice alone ------------------------------------------------------------------------------------

    @cached_property
    def base_loss(self) -> Loss:
        """Raises QDeltaNetError where it is not finite: nothing could be told apart beside it."""
        found = self._loss("base", self.base, lambda: self.base_scales)
        if not math.isfinite(found.kl):
            raise QDeltaNetError(
                f"base recipe {self.base.name}: its loss is not finite on these samples; start from a finer one"
            )
        return found

    def alone(self, group: Group, candidate: Candidate, narrowed: Sequence[str] = ()) -> float:
        """Increase of kl over the base recipe's when one group takes one choice."""
        if candidate.name == BASE and not narrowed:
            return 0.0
        recipe = self.recipe({group.name: (candidate, narrowed)})
        name = f"{group.name}: {' '.join([candidate.name, *narrowed])}"
        loss = self._loss(name, recipe, lambda: self._scales(recipe, group, candidate, narrowed))
        return loss.kl - self.base_loss.kl

    def _loss(self, name: str, recipe: Recipe, scales: Callable[[], dict[str, Tensor]]) -> Loss:
        def measured() -> list[float | None]:
            self.harness.assume(recipe, scales())
            return self.harness.loss().as_list()

        return Loss.of(self.measure(f"loss {name}", measured))

    def _scales(
        self, recipe: Recipe, group: Group, candidate: Candidate, narrowed: Collection[str]
    ) -> dict[str, Tensor]:
        """The base's scales with what a choice changes in them."""
        scales = dict(self.base_scales)
        for i in group.layers:
            if candidate.name != BASE:
                _, own = self.systems[i].scales(recipe.layer(i))
                scales |= {f"layers.{i}.{key}": scale for key, scale in own.items()}
            for site in narrowed:
                prefix = f"layers.{i}.{site}"
                keys = [k for k in self.narrow_scales if k == prefix or k.startswith(f"{prefix}/")]
                scales |= {k: self.narrow_scales[k] for k in keys}
        return scales

    # -- the options of a group ----------------------------------------------------------------------------------------

    def narrowable(self, group: Group) -> list[str]:
        """Sites whose narrow format makes the rule cheaper when all the others are narrow as well."""
        everything = self.cost(self.recipe({group.name: (Candidate(BASE), NARROWED)}), group)
        found = []
        for site in NARROWED:
            others = [s for s in NARROWED if s != site]
            if everything < self.cost(self.recipe({group.name: (Candidate(BASE), others)}), group):
                found.append(site)
        return found

    def options(self, group: Group) -> list[Option]:
        """Every candidate with every set of narrow sites that no other beats; losses are taken to add up."""
        kept, sites = self.kept(group), self.narrowable(group)
        by_inverse = {c.name: self.alone(group, c) for c in kept}
        by_site = {s: self.alone(group, Candidate(BASE), (s,)) for s in sites}
        found = []
        for candidate in kept:
            wide, narrow = (self.recipe({group.name: (candidate, s)}) for s in ((), sites))
            own = self.cost(wide, group)
            for narrowed, saved in self.prices.savings(wide, narrow, group.layers, sites).items():
                loss = by_inverse[candidate.name] + sum(by_site[s] for s in narrowed)
                if loss < float("inf"):
                    found.append(Option(candidate.name, narrowed, own - saved, loss))
        return pareto(found)

    def singles(self, group: Group) -> dict[str, Any]:
        """What was measured of each choice alone: cost of the inverses with their error of T, and losses."""
        screened = self.measure(f"screen {group.name}", lambda: self._screen(group))
        return {
            "inverses": {
                c.name: {"cost": screened[c.name][0], "error": screened[c.name][1], "loss": self.alone(group, c)}
                for c in self.kept(group)
            },
            "sites": {s: {"loss": self.alone(group, Candidate(BASE), (s,))} for s in self.narrowable(group)},
        }

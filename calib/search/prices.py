"""What recipes cost on a machine, each distinct layer scheme priced once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from ...delta_rule import SITES, Dimensions, LayerScheme
from ...recipe import Recipe

Price = Callable[[LayerScheme, Dimensions], float]  # modelled ns per token of one layer's rule
Savings = dict[tuple[str, ...], float]


class Prices:
    """price: of one layer's rule. dims: of each layer."""

    def __init__(self, price: Price, dims: Mapping[int, Dimensions]) -> None:
        self.price, self.dims = price, dims
        self._known: dict[Hashable, float] = {}
        self._savings: dict[Hashable, Savings] = {}

    def total(self, recipe: Recipe, layers: Collection[int]) -> float:
        """ns per token of the layers' rules."""
        return sum(self._of(recipe.layer(i), self.dims[i]) for i in layers)

    def _of(self, scheme: LayerScheme, dims: Dimensions) -> float:
        key = (scheme.plan, _sites(scheme), _rotate(scheme), dims)
        if key not in self._known:
            self._known[key] = self.price(scheme, dims)
        return self._known[key]

    def savings(self, wide: Recipe, narrow: Recipe, layers: Collection[int], sites: Sequence[str]) -> Savings:
        """What each subset of `sites` saves in all layers when it takes the narrow recipe's schemes."""
        total: Savings = {}
        for i in layers:
            for chosen, saved in self._saved(wide.layer(i), narrow.layer(i), self.dims[i], sites).items():
                total[chosen] = total.get(chosen, 0.0) + saved
        return total

    def _saved(self, wide: LayerScheme, narrow: LayerScheme, dims: Dimensions, sites: Sequence[str]) -> Savings:
        """A product has two operands, so what a set of sites saves is the sum over its members and its pairs.

        The inverse's own steps have no share in it: plans of a chunk size with the same A and T save the same.
        """
        outside = tuple((s, x) for scheme in (wide, narrow) for s, x in _sites(scheme) if s in SITES)
        key = (wide.plan.chunk_size, bool(wide.plan.steps), outside, _rotate(wide), tuple(sites), dims)
        if key not in self._savings:
            before = self._of(wide, dims)
            alone = {s: before - self._of(_mixed(wide, narrow, (s,)), dims) for s in sites}
            joint = {
                pair: before - self._of(_mixed(wide, narrow, pair), dims) - alone[pair[0]] - alone[pair[1]]
                for pair in combinations(sites, 2)
            }
            self._savings[key] = {
                chosen: sum(alone[s] for s in chosen) + sum(joint[p] for p in combinations(chosen, 2))
                for n in range(len(sites) + 1)
                for chosen in combinations(sites, n)
            }
        return self._savings[key]


def _sites(scheme: LayerScheme) -> tuple[tuple[str, object], ...]:
    return tuple(scheme.rule.sites.items()) if scheme.rule is not None else ()


def _rotate(scheme: LayerScheme) -> frozenset[str] | None:
    return scheme.rule.rotate if scheme.rule is not None else None


def _mixed(wide: LayerScheme, narrow: LayerScheme, chosen: Collection[str]) -> LayerScheme:
    """The wide scheme with some sites of the narrow one."""
    assert wide.rule is not None
    assert narrow.rule is not None
    sites = {**wide.rule.sites, **{s: narrow.rule.sites[s] for s in chosen}}
    return replace(wide, rule=replace(wide.rule, sites=sites))

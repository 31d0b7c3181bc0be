"""What a search chooses from: inverses (method, options, format, scales) and narrower formats of single sites.

Everything is written as overrides of a base recipe, so that what is priced, measured and written is one thing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ...core import IntFormat, unknown
from ...delta_rule import SITES
from ...delta_rule.laboratory import InverseScheme
from ...inverse import INPUT, METHODS, OUTPUT, Plan, plan
from ...inverse.methods.block_merge import JOINS
from ...recipe import LayerConfig, Recipe, SiteConfig

BASE = "base"
SEARCHED = ("block_merge", "neumann", "truncated_neumann", "identity")
FORMATS = ("int8", "int4")
NARROW = SiteConfig(format="int4", granularity="finest")
NARROWED = tuple(s for s in SITES if s not in (INPUT, OUTPUT))  # A and T belong to the inverse


@dataclass(frozen=True)
class Candidate:
    """One inverse. inverse, sites: what a layer's override says of it; both empty for the base recipe's own."""

    name: str
    inverse: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sites: Mapping[str, SiteConfig] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Group:
    """Decoder layers that take the same choice: one layer, or with `uniform` all of them."""

    name: str
    layers: tuple[int, ...]


def make_groups(layers: Collection[int], uniform: bool) -> list[Group]:
    """name is the key under a recipe's `layers`."""
    return [Group("*", tuple(layers))] if uniform else [Group(str(i), (i,)) for i in layers]


def candidates(chunk_size: int, methods: Sequence[str] = SEARCHED, formats: Sequence[str] = FORMATS) -> list[Candidate]:
    """The base's inverse, then every different plan of the methods' grids in every format.

    Raises QDeltaNetError for an unknown method or a format that is no integer one.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    found = [Candidate(BASE)]
    for built, name in product(_plans(methods, chunk_size), formats):
        found += _held(built, IntFormat.parse(name))
    return found


def _plans(methods: Sequence[str], chunk_size: int) -> list[Plan]:
    """One plan for each sequence of steps: many points of the grids are the same program."""
    different: dict[Any, Plan] = {}
    for method in methods:
        for options in points(method, chunk_size):
            built = plan(method, chunk_size, **options)
            different.setdefault(built.steps, built)
    return list(different.values())


def points(method: str, chunk_size: int) -> Iterator[dict[str, Any]]:
    """Options of a method that are worth a try at a chunk size; its defaults where nothing is to choose."""
    if method == "block_merge":
        for shape, join in product(compositions(chunk_size.bit_length() - 1), JOINS):
            yield {"radices": tuple(2**n for n in shape), "join": join}
    elif method == "neumann":
        for order, steps in product((2, 3, 4), (1, 2, 3, 4, 5, 8, 9, 16)):
            yield from ({"order": order, "band": band, "residual_steps": steps} for band in (order, "none"))
    elif method == "truncated_neumann":
        yield from ({"order": order} for order in (2, 3, 4, 6, 8))
    else:
        yield {}


def compositions(n: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write n as a sum of positive numbers."""
    if n == 0:
        yield ()
    for first in range(1, n + 1):
        yield from ((first, *rest) for rest in compositions(n - first))


def _held(built: Plan, fmt: IntFormat) -> list[Candidate]:
    """A plan with the scales that suit it; at 4 bits also with an axis per operand and wide registers."""
    chosen = InverseScheme.of(fmt, built)
    scale = chosen.default.scale if built.steps else "bound"  # T = I shows an observer nothing
    section = {"method": built.method, **built.options}
    section |= {"format": fmt.name, "scale": scale, "granularity": "per_head", "carry": None}
    section |= {"rescale": "shared" if chosen.shared else "per_register", "headroom": chosen.headroom}
    site = SiteConfig(format=fmt.name, scale=scale, granularity="per_head")
    name = f"{title(built)} {fmt.name}"
    found = [Candidate(name, section, {INPUT: site, OUTPUT: site})]
    if fmt.bits <= 4 and built.steps:
        section = section | {"granularity": "finest", "carry": "int16", "rescale": "per_register"}
        A, T = site.model_copy(update={"granularity": "finest", "carry": "int16"}), NARROW
        found.append(Candidate(f"{name} finest", section, {INPUT: A, OUTPUT: T}))
    return found


def title(built: Plan) -> str:
    """`block_merge 16,4 eager`, `neumann 3 3 8 doubled 64`: the method and its options in order."""
    values = (",".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for v in built.options.values())
    return " ".join([built.method, *values])


def override(candidate: Candidate, narrowed: Collection[str] = ()) -> LayerConfig:
    """A layer's override: the candidate's inverse, and the named sites in the narrow format."""
    sites = {**candidate.sites, **{s: NARROW for s in NARROWED if s in narrowed}}
    return LayerConfig(inverse=dict(candidate.inverse), sites=sites)


def overridden(base: Recipe, choices: Mapping[str, LayerConfig], **fields: Any) -> Recipe:
    """The base recipe with overrides by key of `layers`, which win over its own; `fields` such as name replaced.

    Raises QDeltaNetError for what does not resolve.
    """
    layers = dict(base.layers)
    for key, new in choices.items():
        if new.inverse or new.sites:
            old = layers.pop(key, LayerConfig())  # the last of the overrides of a layer wins
            inverse = {**new.inverse} if "method" in new.inverse else {**old.inverse, **new.inverse}
            layers[key] = old.model_copy(update={"inverse": inverse, "sites": {**old.sites, **new.sites}})
    content = {"layers": {key: layer.model_dump() for key, layer in layers.items()}}
    return Recipe.model_validate(base.model_dump() | content | fields)

"""What the whole rule costs on a machine: its products, their requantizations, the inverse, and what moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import SiteScheme
from ..inverse import Cost, Profile, plan_cost
from ..inverse.hardware import (
    ADDEND,
    FLOAT_ADDEND,
    FLOAT_STORE,
    product,
    store,
    store_latency,
    total_of,
    use,
    use_latency,
)
from ..inverse.tiles import product_tiles, tiled
from .binding import PRODUCTS, Dimensions, LayerScheme
from .sites import SITES, rule_sites

TRIANGULAR = frozenset({"A", "T", "attn"})  # below the diagonal, as tiles with it
FLOAT32 = 4  # the front end's own width, everywhere
# Vector operations for one element
COEFFICIENT = 2  # widen, multiply by the decay's code
NORMALISE = 3  # square, sum, scale
DECAY = 8  # difference, exp (a polynomial or a table), times beta
# Products that wait for one another within a chunk; those of u, attn and o run beside them.
CHAIN = ("A", "w", "v_new", "state")


@dataclass(frozen=True)
class RuleCost:
    """ns of one chunk of one value head by part: `front`, `rotations`, `inverse`, one per product, `offchip`.

    chunk: their sum. per_token: of the whole layer on one core, so that chunk sizes compare.
    """

    parts: Mapping[str, Cost]
    chunk_size: int
    value_heads: int

    @property
    def chunk(self) -> Cost:
        return total_of(self.parts.values())

    @property
    def per_token(self) -> Cost:
        return self.chunk.scaled(self.value_heads / self.chunk_size)


def rule_cost(layer: LayerScheme, dims: Dimensions, profile: Profile) -> RuleCost:
    """Cost of the chunkwise rule as `layer` runs it; projections and the convolution are not in it.

    Sites left in float multiply at the float rate. The products of q and k are made once per key head and shared by its
    value heads. The inverse's A and T, and the state, stay on the chip. Raises QDeltaNetError for a register without a
    scheme.
    """
    sites = layer.rule.sites if layer.rule is not None else dict.fromkeys(rule_sites(layer.plan), SiteScheme(None))
    rule = _Rule(sites, layer, dims, profile)
    parts = {"front": rule.front(), "rotations": rule.rotations()}
    if layer.plan.steps:
        parts["inverse"] = plan_cost(layer.plan, sites, profile)
    for name, left, right, axis in PRODUCTS:
        if layer.plan.steps or name not in ("A", "u", "w"):
            parts[name] = parts.get(name, Cost()) + rule.product(name, left, right, axis)
    parts |= {name: parts.get(name, Cost()) + rule.stored(name) for name in ("A", "attn", "w", "v_new", "o", "state")}
    parts["offchip"] = rule.offchip()
    return RuleCost(parts, layer.plan.chunk_size, dims.value_heads)


class _Rule:
    """The prices of a rule's parts, per chunk and value head."""

    def __init__(self, sites: Mapping[str, SiteScheme], layer: LayerScheme, dims: Dimensions, profile: Profile) -> None:
        self.sites = sites
        self.profile = profile
        self.inverts = bool(layer.plan.steps)
        self.rotate = layer.rule.rotate if layer.rule is not None else frozenset()
        self.size = {"C": layer.plan.chunk_size, "K": dims.key_dim, "V": dims.value_dim}
        self.per_key_head = dims.key_heads / dims.value_heads

    def product(self, name: str, left: str, right: str, axis: str) -> Cost:
        """One entry of PRODUCTS, with the codes that a carried operand needs for it."""
        rows, columns = _other(left, axis), _other(right, axis)
        out = self._tiles(name if name in TRIANGULAR else "", rows, columns)
        tiles = product_tiles(self._tiles(left, rows, axis), self._tiles("", axis, columns), out)
        area = self.profile.tile**2
        products, *touched = (area * n for n in tiles)
        schemes = self.sites[left], self.sites[right]
        elements = (touched[0], touched[1], touched[2])
        cost = product(self.profile, *schemes, products * self.profile.tile, elements)
        cost += use(self.profile, schemes[0], elements[0]) + use(self.profile, schemes[1], elements[1])
        if name in ("A", "attn"):
            return cost.scaled(self.per_key_head)
        if name not in CHAIN:
            return cost
        wait = self.profile.product_latency + max(use_latency(self.profile, s) for s in schemes)
        return cost + Cost(latency=wait / self.profile.concurrency)

    def stored(self, name: str) -> Cost:
        """The sum of terms that enters a site; `o` is read as floats."""
        if name == "A" and not self.inverts:
            return Cost()
        if name == "o":
            operations = self._elements("v_new") * (FLOAT_STORE + FLOAT_ADDEND)
            return Cost(vector=self.profile.vector_ns(operations, FLOAT32))
        addends = {"w": ["k_beta"], "v_new": ["v_beta"], "state": ["state"]}.get(name, [])
        scheme, elements = self.sites[name], self._elements(name)
        cost = store(self.profile, scheme, elements, [(self.sites[a], self._elements(a)) for a in addends])
        operations = 0.0
        if name in ("A", "attn", "state"):
            operations += COEFFICIENT * elements
        if name == "v_new" and self.inverts:
            operations += ADDEND * elements  # the accumulator of u
        wait = store_latency(self.profile, scheme) / self.profile.concurrency if name in CHAIN else 0.0
        return cost + Cost(vector=self.profile.vector_ns(operations), latency=wait)

    def front(self) -> Cost:
        """Normalisation, decays, and the codes of what comes in; floats in between stay in the vector unit."""
        cost = Cost(latency=self.profile.vector_latency / self.profile.concurrency)
        for site in ("q", "k", "v_beta", "k_beta", "q_decay", "k_decay"):
            elements = self._elements(site)
            made = NORMALISE if site in ("q", "k") else 1  # times beta, or a decay
            vector = self.profile.vector_ns(made * elements, FLOAT32)
            share = self.per_key_head if SITES[site].heads == "key" else 1.0
            cost += (store(self.profile, self.sites[site], elements) + Cost(vector=vector)).scaled(share)
        decays = DECAY * self._elements("attn")
        return cost + Cost(vector=self.profile.vector_ns(decays, FLOAT32))

    def rotations(self) -> Cost:
        """Fast Hadamard transforms: log2 d additions and a scale per element, of q and k, and of v and back on o."""
        operations = 0.0
        for name, site, share in (("qk", "k", self.per_key_head), ("v", "v_beta", 1.0)):
            if name in self.rotate:
                width = self.size["K" if name == "qk" else "V"]
                operations += 2 * share * self._elements(site) * (math.log2(width) + 1)
        return Cost(vector=self.profile.vector_ns(operations, FLOAT32))

    def offchip(self) -> Cost:
        """q and k (shared), v, g and beta come in and o goes out, in the machine's float format."""
        tokens = self.size["C"]
        elements = tokens * (2 * self.per_key_head * self.size["K"] + 2 * self.size["V"] + 2)
        return Cost(memory=elements * self.profile.float_bytes / self.profile.offchip_bytes_per_ns)

    def _elements(self, site: str) -> float:
        """Of the tiles of a site's tensor that can be non-zero."""
        return float(self._tiles(site, *_axes(site)).sum()) * self.profile.tile**2

    def _tiles(self, site: str, rows: str, columns: str) -> Tensor:
        full = torch.ones(self.size[rows], self.size[columns], dtype=torch.bool)
        return tiled(full.tril() if site in TRIANGULAR else full, self.profile.tile)


def _axes(site: str) -> tuple[str, str]:
    rows, columns = SITES[site].shape.strip("[]").split(", ")
    return rows, columns


def _other(site: str, contracted: str) -> str:
    """The axis that a product leaves; both are C where it contracts one of two."""
    rows, columns = _axes(site)
    return rows if columns == contracted else columns

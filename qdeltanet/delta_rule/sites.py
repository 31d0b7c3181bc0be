"""The site table: every named tensor of the rule at which a quantizer stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import Granularity, Side
from ..inverse import INPUT, Plan, site_of

Axis = Literal["token", "channel"]


@dataclass(frozen=True)
class Site:
    """One row of the table.

    shape: of the stored tensor, C tokens, K key and V value channels. consumers: what reads it. kept: the axis of the
    stored tensor that no consumer contracts, i.e. what `finest` keeps (None where it depends on the plan). heads:
    whether scales stand per key head or per value head.
    """

    name: str
    formula: str
    shape: str
    consumers: tuple[str, ...]
    kept: Axis | None
    heads: Literal["key", "value"] = "value"


SITES: dict[str, Site] = {
    s.name: s
    for s in (
        Site("q", "normalised q K^-0.5", "[C, K]", ("attn",), "token", "key"),
        Site("k", "normalised k", "[C, K]", ("A", "attn"), "token", "key"),
        Site("A", "-tril(diag(beta) (k k^T) * D, -1)", "[C, C]", ("inverse",), None),
        Site("T", "(I - A)^-1 - I", "[C, C]", ("u", "w"), "token"),
        Site("v_beta", "beta v", "[C, V]", ("u",), "channel"),
        Site("k_beta", "beta exp(c) k", "[C, K]", ("w",), "channel"),
        Site("w", "T (beta exp(c) k)", "[C, K]", ("v_new",), "token"),
        Site("attn", "tril((q k^T) * D)", "[C, C]", ("o",), "token"),
        Site("q_decay", "exp(c) q", "[C, K]", ("o",), "token"),
        Site("k_decay", "exp(c_C - c) k", "[C, K]", ("state",), "channel"),
        Site("v_new", "u - w S", "[C, V]", ("o", "state"), "channel"),
        Site("state", "S, carried from chunk to chunk", "[K, V]", ("v_new", "o", "state"), "channel"),
    )
}

# Sites that may be carried in a wider format, with requantization at each use.
CARRIED = ("A", "state")

# Sites that may keep what rounding lost: those that are their own addend.
FED_BACK = ("state",)


def rule_sites(plan: Plan) -> list[str]:
    """Names of all sites of a rule that runs `plan`: the table, then the plan's registers as `inverse.<register>`."""
    return [*SITES, *(site_of(r) for r in plan.registers)]


def is_register(site: str) -> bool:
    return site.startswith("inverse.")


def kept_axis(site: str, plan: Plan) -> Axis | None:
    """The one axis of the stored tensor that no product contracts; None where consumers disagree."""
    if site in SITES and site != INPUT:
        return SITES[site].kept
    uses = plan.uses(site.removeprefix("inverse.")) & {"left", "right"}
    if uses == {"left"}:
        return "token"
    return "channel" if uses <= {"right"} else None


def used_sides(site: str, plan: Plan) -> list[Side]:
    """On which sides of products a carried site is read."""
    if site == "state":
        return ["right"]
    uses = plan.uses(site.removeprefix("inverse."))
    sides: tuple[Side, ...] = ("left", "right")
    return [side for side in sides if side in uses]


def granularity_of(axis: Axis) -> Granularity:
    return Granularity.PER_TOKEN if axis == "token" else Granularity.PER_CHANNEL

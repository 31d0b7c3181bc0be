"""What a case runs on: random and adversarial inputs, schemes of every kind, scales observed on the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import (
    Granularity,
    IntFormat,
    Mode,
    ObservingArithmetic,
    Operand,
    RuleScheme,
    ScaleSource,
    SiteScheme,
    grouped,
    power_of_two_ceil,
)
from ..delta_rule import ScaleSpec, bind, make_scales, rule_sites, run_rule, scale_specs
from ..delta_rule.sites import CARRIED, FED_BACK, is_register
from ..inverse import Plan, plan, site_of

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
INT16 = IntFormat(16)
FORMATS = (4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Kind:
    """One way to hold scales and to requantize, for all sites. carry: registers, A and state in INT16 between uses.

    feedback: the state keeps INT8 residuals, and is not carried.
    """

    scale: ScaleSource = "calibrated"
    granularity: Granularity = Granularity.PER_HEAD
    carry: bool = False
    requantize: Mode = "float"
    feedback: bool = False


KINDS = {
    "per_head": Kind(),
    "per_tensor": Kind(granularity=Granularity.PER_TENSOR),
    "per_head dynamic": Kind("dynamic"),
    "per_tensor dynamic": Kind("dynamic", Granularity.PER_TENSOR),
    "finest": Kind("calibrated", Granularity.FINEST, carry=True),
    "finest dynamic": Kind("dynamic", Granularity.FINEST, carry=True),
}
INTEGER_KINDS = {
    "fixed_point": Kind(requantize="fixed_point"),
    "fixed_point per_tensor": Kind(granularity=Granularity.PER_TENSOR, requantize="fixed_point"),
    "fixed_point finest": Kind("calibrated", Granularity.FINEST, carry=True, requantize="fixed_point"),
    "power_of_two": Kind(requantize="power_of_two"),
    "power_of_two finest": Kind("calibrated", Granularity.FINEST, carry=True, requantize="power_of_two"),
}
ALL_KINDS = KINDS | INTEGER_KINDS
FEEDBACK_KINDS = {
    f"{name}, feedback": replace(ALL_KINDS[name], feedback=True)
    for name in ("per_head", "per_head dynamic", "finest", "finest dynamic", "fixed_point", "power_of_two")
}
PLANS = {
    "eager": plan("block_merge", 32),
    "radix 2": plan("block_merge", 32, radices=[2] * 5),
    "radix 4, 8": plan("block_merge", 32, radices=[4, 8], join="powers"),
    "cayley": plan("block_merge", 16, radices=[16], join="powers"),
    "neumann": plan("neumann", 32),
    "neumann 9": plan("neumann", 16, order=4, band=2, residual_steps=9),
    "substitution": plan("forward_substitution", 16),
}
METHOD_PLANS = {
    "explicit": plan("block_merge", 16, radices=[4, 4], join="powers", diagonal="explicit"),
    "bunch_hopcroft": plan("bunch_hopcroft", 16),
    "cayley_hamilton": plan("cayley_hamilton", 16),
    "mixed": plan("mixed", 16, leaf=4),
    "neumann linear": plan("neumann", 16, band="none", residual_steps=4, residual_sum="linear", block=8),
    "truncated": plan("truncated_neumann", 16, order=6),
    "newton": plan("newton_schulz", 16),
    "newton from I": plan("newton_schulz", 16, start="identity"),
    "column_sweep": plan("column_sweep", 16),
}
LARGE_PLANS = {
    "eager, C = 16": plan("block_merge", 16),
    "eager, C = 64": plan("block_merge", 64),
    "eager at once, C = 64": plan("block_merge", 64, radices=[64]),
    "radix 4, C = 64": plan("block_merge", 64, radices=[4, 4, 4], join="powers"),
    "neumann, C = 64": plan("neumann", 64),
    "radix 2, C = 128": plan("block_merge", 128, radices=[2] * 7),
}


# -- inputs of the whole rule ------------------------------------------------------------------------------------------


def rule_inputs(
    batch: int = 2,
    tokens: int = 96,
    key_heads: int = 1,
    heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 8,
    *,
    seed: int = 0,
    decay: float = 0.1,
) -> Inputs:
    """query, key [B, T, HK, K], value [B, T, H, V], g, beta [B, T, H]; keys not normalised yet."""
    make = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, tokens, key_heads, key_dim, generator=make),
        torch.randn(batch, tokens, key_heads, key_dim, generator=make),
        torch.randn(batch, tokens, heads, value_dim, generator=make),
        -decay * torch.rand(batch, tokens, heads, generator=make),
        torch.rand(batch, tokens, heads, generator=make),
    )


def adversarial_inputs(tokens: int = 64) -> dict[str, Inputs]:
    """Keys taken as they are (not normalised): codes at their limits, A = -ones, nothing at all."""
    q, k, v, g, beta = ones = (
        torch.ones(1, tokens, 1, 16),
        torch.ones(1, tokens, 1, 16),
        torch.ones(1, tokens, 2, 8),
        torch.zeros(1, tokens, 2),
        torch.ones(1, tokens, 2),
    )
    signs = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[None, :, None, None]
    one_hot = torch.zeros_like(v)
    one_hot[:, tokens // 2, 0, 3] = 1e6
    return {
        "all max": ones,  # k k^T = K: T outgrows float32, which only static scales let pass (they clip)
        "minus ones": (q / 4, k / 4, v, g, beta),  # k k^T = 1: A = -ones
        "alternating": (q * signs, k / 4 * signs, v * signs, g, beta),
        "beta 2": (q, k / 4, v, g, 2 * beta),
        "zero": tuple(torch.zeros_like(x) for x in ones),  # type: ignore[dict-item]
        "one hot": (q, k / 4, one_hot, g - 1e-3, beta),
        "hard decay": (q / 4, k / 4, v * signs, g - 166.0, beta),
        "tiny": (q, k / 4, v * 1e-38, g, beta),
    }


# -- schemes and scales ------------------------------------------------------------------------------------------------


def rule_scheme(p: Plan, bits: int, kind: Kind, **overrides: SiteScheme) -> RuleScheme:
    """A scheme with `bits` at every site, not bound yet. overrides: by site, dots written as two underscores."""

    def of(site: str) -> SiteScheme:
        fed_back = kind.feedback and site in FED_BACK
        carried = kind.carry and not fed_back and (is_register(site) or site in CARRIED)
        held = INT16 if carried else None
        return SiteScheme(IntFormat(bits), kind.scale, kind.granularity, held, IntFormat(8) if fed_back else None)

    sites = {site: of(site) for site in rule_sites(p)}
    sites |= {name.replace("__", "."): scheme for name, scheme in overrides.items()}
    return RuleScheme(sites, requantize=kind.requantize)


def mixed_scheme(p: Plan, kind: Kind) -> RuleScheme:
    """Every format in turn, site by site, so that most products multiply two formats. Not bound yet."""
    schemes = [rule_scheme(p, bits, kind).sites for bits in FORMATS]
    sites = {site: schemes[i % len(schemes)][site] for i, site in enumerate(rule_sites(p))}
    return RuleScheme(sites, requantize=kind.requantize)


def collector(specs: Sequence[ScaleSpec]) -> tuple[dict[tuple[str, Granularity], Tensor], Callable[..., None]]:
    """Maxima by (site, granularity), and the observer that fills them."""
    amax: dict[tuple[str, Granularity], Tensor] = {}

    def observe(site: str, x: Tensor, compact: bool) -> None:
        for granularity in {s.granularity for s in specs if s.site == site}:
            top = grouped(x.detach().abs(), granularity, compact).amax((0, -1))
            key = (site, granularity)
            amax[key] = torch.maximum(amax[key], top) if key in amax else top

    return amax, observe


def observed_scales(inputs: Inputs, p: Plan, scheme: RuleScheme) -> dict[str, Tensor]:
    """Static scales of a bound scheme, from the maxima on the inputs (keys normalised)."""
    specs = scale_specs(scheme, p)
    amax, observe = collector(specs)
    if any(not s.bound for s in specs):
        run(inputs, p, ObservingArithmetic(observe))
    return make_scales(specs, amax, power_of_two=scheme.requantize == "power_of_two")


def bound_rule(inputs: Inputs, p: Plan, bits: int, kind: Kind) -> tuple[RuleScheme, dict[str, Tensor]]:
    """A bound scheme and its static scales, calibrated on the inputs."""
    scheme = bind(rule_scheme(p, bits, kind), p, inputs[0].shape[-1])
    return scheme, observed_scales(inputs, p, scheme)


def run(
    inputs: Inputs,
    p: Plan,
    arithmetic: Any,
    state: Operand | None = None,
    normalise: bool = True,
    chunk_block: int | None = None,
) -> tuple[Tensor, Operand]:
    """`run_rule` over the plan's chunk size."""
    return run_rule(
        *inputs,
        state,
        arithmetic=arithmetic,
        plan=p,
        normalise=normalise,
        chunk_size=p.chunk_size,
        chunk_block=chunk_block,
    )


# -- the inverse alone -------------------------------------------------------------------------------------------------

PATTERNS = ("random", "all max", "minus ones", "alternating", "zero", "one hot", "sub-diagonal")


def lower_codes(pattern: str, size: int, fmt: IntFormat, heads: int = 2) -> Tensor:
    """Codes of A, strictly lower, float32 [1, heads, C, C]."""
    make = torch.Generator().manual_seed(size)
    q, shape = fmt.qmax, (1, heads, size, size)
    i = torch.arange(size)
    A = {
        "random": torch.randint(-q, q + 1, shape, generator=make).float(),
        "all max": torch.full(shape, float(q)),
        "minus ones": torch.full(shape, float(-q)),
        "alternating": torch.where((i[:, None] + i[None, :]) % 2 == 0, float(q), float(-q)).expand(shape),
        "zero": torch.zeros(shape),
        "one hot": torch.zeros(shape).index_fill(-2, torch.tensor([size - 1]), float(q)),
        "sub-diagonal": torch.diag(torch.full((size - 1,), float(-q)), -1).expand(shape),
    }[pattern]
    return A.tril(-1)


def inverse_scheme(p: Plan, bits: int, kind: Kind, size: int) -> tuple[RuleScheme, dict[str, Tensor]]:
    """A scheme for a plan alone, with static scales that fit no pattern in particular (unequal per head and axis)."""
    fmt = IntFormat(bits)
    make = torch.Generator().manual_seed(bits)
    sites, scales = {}, {}
    for site in ["A", "T", *(site_of(r) for r in p.registers)]:
        carried = INT16 if kind.carry and site != "T" else None
        granularity = kind.granularity
        if granularity is Granularity.FINEST and carried is None:
            granularity = Granularity.PER_TOKEN
        sites[site] = SiteScheme(fmt, kind.scale, granularity, carried)
        held = carried or fmt
        shapes = {
            site: {Granularity.PER_TENSOR: (1, 1, 1), Granularity.PER_TOKEN: (2, size, 1)}.get(granularity, (2, 1, 1)),
            f"{site}/left": (2, size, 1),
            f"{site}/right": (2, 1, size),
        }
        for key, shape in shapes.items():
            qmax = held.qmax if key == site else fmt.qmax
            scales[key] = (0.5 + torch.rand(shape, generator=make)) / qmax
    if kind.requantize == "power_of_two":
        scales = {k: power_of_two_ceil(s) for k, s in scales.items()}
    return RuleScheme(sites, requantize=kind.requantize), scales

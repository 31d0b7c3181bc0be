"""What the tests of several packages share: inputs, schemes, scales, and an arithmetic that remembers its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qdeltanet.backends import get_backend
from qdeltanet.core import (
    Granularity,
    IntegerArithmetic,
    IntFormat,
    Mode,
    ObservingArithmetic,
    Operand,
    RuleScheme,
    ScaleSource,
    SiteScheme,
    Term,
    grouped,
)
from qdeltanet.delta_rule import bind, chunk_gated_delta_rule, make_scales, rule_sites, run_rule, scale_specs
from qdeltanet.delta_rule.binding import ScaleSpec
from qdeltanet.delta_rule.sites import CARRIED, is_register
from qdeltanet.inverse import Plan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
INT16 = IntFormat(16)


@dataclass(frozen=True)
class Kind:
    """One way to hold scales and to requantize, for all sites."""

    scale: ScaleSource = "calibrated"
    granularity: Granularity = Granularity.PER_HEAD
    carry: bool = False
    requantize: Mode = "float"


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


def rule_scheme(plan: Plan, bits: int, kind: Kind, **overrides: SiteScheme) -> RuleScheme:
    """A scheme with `bits` at every site, not bound yet. overrides: by site, dots written as two underscores."""

    def of(site: str) -> SiteScheme:
        carried = kind.carry and (is_register(site) or site in CARRIED)
        return SiteScheme(IntFormat(bits), kind.scale, kind.granularity, INT16 if carried else None)

    sites = {site: of(site) for site in rule_sites(plan)}
    sites |= {name.replace("__", "."): scheme for name, scheme in overrides.items()}
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


def bound_rule(inputs: Inputs, plan: Plan, bits: int, kind: Kind) -> tuple[RuleScheme, dict[str, Tensor]]:
    """A bound scheme and its static scales, calibrated on the inputs."""
    scheme = bind(rule_scheme(plan, bits, kind), plan, inputs[0].shape[-1])
    specs = scale_specs(scheme, plan)
    amax, observe = collector(specs)
    if specs:
        run(inputs, plan, ObservingArithmetic(observe))
    return scheme, make_scales(specs, amax, power_of_two=kind.requantize == "power_of_two")


def run(
    inputs: Inputs, plan: Plan, arithmetic: Any, state: Operand | None = None, normalise: bool = True
) -> tuple[Tensor, Operand]:
    """`run_rule` with keys normalised."""
    return run_rule(*inputs, state, arithmetic=arithmetic, plan=plan, normalise=normalise, chunk_size=plan.chunk_size)


def float_rule(inputs: Inputs, chunk_size: int = 64) -> Tensor:
    """The unquantized output with normalised keys."""
    return chunk_gated_delta_rule(*inputs, chunk_size=chunk_size, use_qk_l2norm_in_kernel=True)[0]


class Recording(IntegerArithmetic):
    """Remembers what was stored at every site, in order."""

    def __init__(self, scheme: RuleScheme, scales: Mapping[str, Tensor], backend: str, **options: Any) -> None:
        super().__init__(scheme, scales, get_backend(backend), **options)
        self.seen: list[tuple[str, Tensor, Tensor | None]] = []

    def _remember(self, operand: Operand) -> Operand:
        scale = None if operand.scale is None else operand.scale.detach()
        self.seen.append((operand.site, operand.codes.detach(), scale))
        return operand

    def quantize(self, site: str, x: Tensor) -> Operand:
        return self._remember(super().quantize(site, x))

    def store(self, site: str, terms: Sequence[Term], **options: Any) -> Operand:
        return self._remember(super().store(site, terms, **options))


def differing(a: Recording, b: Recording) -> dict[str, int]:
    """Elements (codes and scales) by site that differ between two runs of one dataflow."""
    assert [s for s, _, _ in a.seen] == [s for s, _, _ in b.seen]
    found: dict[str, int] = {}
    for (site, codes, scale), (_, other, other_scale) in zip(a.seen, b.seen, strict=True):
        n = int((codes.double() != other.double()).sum())
        if scale is not None and other_scale is not None:
            n += int((scale != other_scale).sum())
        if n:
            found[site] = found.get(site, 0) + n
    return found


def unit_keys(family: str, tokens: int, width: int, make: torch.Generator) -> Tensor:
    """Normalised keys [tokens, width] of a family that is easy or hard on the inverse; float64."""
    keys = torch.randn(tokens, width, generator=make, dtype=torch.float64)
    if family == "correlated":
        keys = F.silu(0.5 * keys + torch.randn(1, width, generator=make, dtype=torch.float64))
    elif family == "repeated":
        keys = keys[torch.randint(0, 4, (tokens,), generator=make)]
    elif family == "orthogonal":
        keys = torch.eye(width, dtype=torch.float64)[torch.arange(tokens) % width]
    elif family == "equal":
        keys = keys[:1].expand(tokens, -1)
    elif family == "opposite":
        keys = keys[:1] * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[:, None].double()
    return F.normalize(keys, dim=-1)


KEY_FAMILIES = ("gauss", "correlated", "repeated", "orthogonal", "equal", "opposite")


def ut_system(keys: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """A = -tril(diag(beta) (k k^T) * D, -1), written out from the definition; keys [..., C, K], beta, g [..., C]."""
    c = g.cumsum(-1)
    decay = (c[..., :, None] - c[..., None, :]).tril().exp()
    return -(beta[..., :, None] * (keys @ keys.mT) * decay).tril(-1)


def random_A(chunk_size: int, *, family: str = "gauss", heads: int = 3, seed: int = 0, width: int = 32) -> Tensor:
    """float64 [heads, C, C] from unit keys, beta in [0, 1) and slow decay."""
    make = torch.Generator().manual_seed(seed)
    keys = torch.stack([unit_keys(family, chunk_size, width, make) for _ in range(heads)])
    beta = torch.rand(heads, chunk_size, generator=make, dtype=torch.float64)
    g = -0.05 * torch.rand(heads, chunk_size, generator=make, dtype=torch.float64)
    return ut_system(keys, beta, g)

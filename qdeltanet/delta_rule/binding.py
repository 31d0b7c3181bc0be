"""Binding: a rule's scheme is checked against its plan and sizes before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core import (
    COEFFICIENT_MAX,
    TINY,
    BindingError,
    Granularity,
    IntFormat,
    Mode,
    ProjectionScheme,
    RuleScheme,
    SiteScheme,
    check_bound,
    check_product,
    coefficient_bits,
    is_rotatable,
    power_of_two_ceil,
    product_bound,
    use_granularity,
    use_key,
)
from ..inverse import INPUT, OUTPUT, Plan, check_factors, site_of
from .sites import CARRIED, FED_BACK, SITES, granularity_of, is_register, kept_axis, rule_sites, used_sides

FEEDBACK_BITS = 24

# Products of the rule: (name, left site, right site, contracted axis).
PRODUCTS = (
    ("A", "k", "k", "K"),
    ("attn", "q", "k", "K"),
    ("u", "T", "v_beta", "C"),
    ("w", "T", "k_beta", "C"),
    ("v_new", "w", "state", "K"),
    ("o", "q_decay", "state", "K"),
    ("o", "attn", "v_new", "C"),
    ("state", "k_decay", "v_new", "C"),
)


@dataclass(frozen=True)
class ScaleSpec:
    """One static scale that a scheme needs: which observations make it, and for which codes."""

    key: str
    site: str
    granularity: Granularity
    format: IntFormat
    bound: bool = False


def bind(scheme: RuleScheme, plan: Plan, key_dim: int, value_dim: int | None = None) -> RuleScheme:
    """Resolve `finest` and prove every bound. Returns the scheme to run with.

    key_dim: K, the axis that q, k, w and state products contract. value_dim: V, which only a rotation asks about.
    Raises BindingError that names the site or step.
    """
    _check_rotation(scheme.rotate, key_dim, value_dim)
    sites = {site: _resolve(site, _scheme_of(scheme, site), plan, scheme.requantize) for site in rule_sites(plan)}
    check_factors(plan, scheme.requantize)
    bound = replace(scheme, sites=sites)
    size = {"K": key_dim, "C": plan.chunk_size}
    for name, left, right, axis in PRODUCTS:
        _check_product(name, sites[left], sites[right], size[axis], scheme.accumulator_bits)
        if name in ("A", "attn"):
            _check_coefficient(name, sites[left], sites[right], size[axis])
    for step in plan.steps:
        if step.right is not None:
            schemes = [sites[_site(plan, r)] for r in (step.left, step.right)]
            _check_product(f"inverse.{step.out}", schemes[0], schemes[1], plan.chunk_size, scheme.accumulator_bits)
    return bound


def _check_rotation(rotate: frozenset[str], key_dim: int, value_dim: int | None) -> None:
    for name, width in (("qk", key_dim), ("v", value_dim)):
        if name in rotate and width is not None and not is_rotatable(width):
            raise BindingError(f"rotate: {name}: a head dimension of {width} is no power of two; leave {name} out")


def _site(plan: Plan, register: str) -> str:
    """Site of a register; a copy is its source."""
    return site_of(plan.source(register))


def _scheme_of(scheme: RuleScheme, site: str) -> SiteScheme:
    if site not in scheme.sites:
        raise BindingError(f"site {site} has no scheme in this recipe")
    return scheme.sites[site]


def _resolve(site: str, s: SiteScheme, plan: Plan, requantize: Mode) -> SiteScheme:
    if s.feedback is not None:
        _check_feedback(site, s)
    if s.format is None:
        return s
    if s.scale == "dynamic" and requantize != "float":
        raise BindingError(
            f"site {site}: requantize: {requantize} needs static scales; a dynamic scale needs requantize: float"
        )
    if s.carry is not None:
        if not (is_register(site) or site in CARRIED):
            raise BindingError(f"site {site}: only {', '.join(CARRIED)} and registers of the inverse can be carried")
        if s.carry.bits < s.format.bits:
            raise BindingError(f"site {site}: carry {s.carry.name} is narrower than its format {s.format.name}")
    if s.scale == "bound" and not (site in ("A", "T") or is_register(site)):
        raise BindingError(f"site {site}: no range is proven for it; use scale: calibrated or dynamic")
    if s.scale == "bound" and site.removeprefix("inverse.") not in plan.bounded:
        raise BindingError(
            f"site {site}: {plan.method} has no proven range for this register; use scale: calibrated or dynamic, "
            "or block_merge with join: eager, or with radix 2 throughout"
        )
    return replace(s, granularity=_granularity(site, s, plan))


def _check_feedback(site: str, s: SiteScheme) -> None:
    assert s.feedback is not None
    if site not in FED_BACK:
        raise BindingError(f"site {site}: only {', '.join(FED_BACK)} has error feedback")
    if s.format is None or s.carry is not None:
        other = "a float state loses nothing" if s.format is None else "carry keeps what feedback would"
        raise BindingError(f"site {site}: {other}; leave feedback out")
    if s.format.bits + s.feedback.bits > FEEDBACK_BITS:
        raise BindingError(
            f"site {site}: {s.format.name} with feedback {s.feedback.name} is more than the {FEEDBACK_BITS} bits that "
            "a float32 sum resolves; use fewer"
        )


def _granularity(site: str, s: SiteScheme, plan: Plan) -> Granularity:
    """`finest` by the axis that consumers leave; an explicit axis is refused where a product contracts it."""
    axis = kept_axis(site, plan)
    if s.carry is not None:
        if s.granularity in (Granularity.PER_TOKEN, Granularity.PER_CHANNEL):
            raise BindingError(
                f"site {site}: a carried site takes per_tensor, per_head or finest, not {s.granularity.value}"
            )
        return s.granularity
    if s.granularity is Granularity.FINEST:
        if axis is None:
            raise BindingError(
                f"site {site}: its products contract both axes, so finest needs a carried format (carry: int16)"
            )
        return granularity_of(axis)
    kept = {Granularity.PER_TOKEN: "token", Granularity.PER_CHANNEL: "channel"}.get(s.granularity)
    if kept is not None and kept != axis:
        raise BindingError(
            f"site {site}: {s.granularity.value} keeps an axis that a product contracts"
            + (f"; {granularity_of(axis).value} is possible" if axis else "; use per_head")
        )
    return s.granularity


def _check_product(step: str, left: SiteScheme, right: SiteScheme, contracted: int, accumulator_bits: int) -> None:
    if left.format is None or right.format is None:
        return
    check_product(step, contracted, left.format, right.format, accumulator_bits)


def _check_coefficient(step: str, left: SiteScheme, right: SiteScheme, contracted: int) -> None:
    """The accumulator times its coefficient codes has to stay exact, whatever accumulator the product had."""
    if left.format is None or right.format is None:
        return
    bound = product_bound(contracted, left.format, right.format)
    bits = coefficient_bits(bound, max(left.format.bits, right.format.bits))
    check_bound(f"{step} (times its decay)", bound * COEFFICIENT_MAX * 2**bits, 64)


def scale_specs(scheme: RuleScheme, plan: Plan) -> list[ScaleSpec]:
    """Every static scale that a bound scheme needs, by key."""
    specs = []
    for site in rule_sites(plan):
        s = scheme.sites[site]
        if s.format is None or s.scale == "dynamic" or s.held is None:
            continue
        bound = s.scale == "bound"
        specs.append(ScaleSpec(site, site, s.held_granularity, s.held, bound))
        if s.carry is not None:
            for side in used_sides(site, plan):
                specs.append(ScaleSpec(use_key(site, side), site, use_granularity(s, side), s.format, bound))
    return specs


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a layer. beta_max: 1, or 2 for families with negative eigenvalues."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    beta_max: float = 1.0


def scale_shape(spec: ScaleSpec, dims: Dimensions, chunk_size: int) -> tuple[int, int, int]:
    """Shape of a static scale, [H or 1, R or 1, C or 1]."""
    if spec.bound or spec.granularity is Granularity.PER_TENSOR:
        return 1, 1, 1
    table = SITES.get(spec.site)
    heads = dims.key_heads if table is not None and table.heads == "key" else dims.value_heads
    if spec.granularity is Granularity.PER_HEAD:
        return heads, 1, 1
    sizes = {"C": chunk_size, "K": dims.key_dim, "V": dims.value_dim}
    rows, columns = (table.shape if table is not None else "[C, C]").strip("[]").split(", ")
    return (heads, sizes[rows], 1) if spec.granularity is Granularity.PER_TOKEN else (heads, 1, sizes[columns])


def make_scales(
    specs: list[ScaleSpec],
    amax: Mapping[tuple[str, Granularity], Tensor],
    *,
    shared: bool = False,
    power_of_two: bool = False,
    beta_max: float = 1.0,
    headroom: float = 1.0,
    proven: Collection[str] = (),
) -> dict[str, Tensor]:
    """Static scales max(amax, 2^-100) / qmax, float32 [H or 1, R or 1, C or 1], by key.

    amax: observed maxima by (site, granularity). shared: one range for A, T and all registers of the inverse. beta_max:
    the proven range of bound sites. headroom: factor on the observed ranges of A, T and registers, for what calibration
    has not seen; a range of the `proven` registers is not taken beyond beta_max (a shared one if all are proven).
    """
    ranges = {}
    for spec in specs:
        ranges[spec.key] = torch.full((1, 1, 1), beta_max) if spec.bound else amax[spec.site, spec.granularity]
    inverse = {s.key: s.site for s in specs if not s.bound and (is_register(s.site) or s.site in (INPUT, OUTPUT))}
    if shared:
        ranges |= _shared(list(inverse), ranges)
    if headroom > 1:
        limit = {key: beta_max for key, site in inverse.items() if site.removeprefix("inverse.") in proven}
        limit = {} if shared and limit.keys() != inverse.keys() else limit
        ranges |= {key: _widened(ranges[key], headroom, limit.get(key, float("inf"))) for key in inverse}
    scales = {}
    for spec in specs:
        scale = _alive(ranges[spec.key].to(torch.float32)).clamp(min=TINY) / spec.format.qmax
        scales[spec.key] = power_of_two_ceil(scale) if power_of_two else scale
    return scales


def _alive(amax: Tensor) -> Tensor:
    """A row or column that was zero throughout (row 0 of T always is) takes the largest range of its head.

    Its own range would be next to nothing: the next value there saturates, and in fixed point, where a matrix has one
    shift, its multiplier would leave no bits to the others.
    """
    return torch.where(amax > 0, amax, amax.amax((-1, -2), keepdim=True))


def _widened(amax: Tensor, headroom: float, limit: float) -> Tensor:
    """headroom times the range, but not beyond a proven limit (which float32 may have met by a rounding more)."""
    return torch.minimum(headroom * amax, amax.clamp(min=limit))


def _shared(keys: list[str], ranges: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One range per head over all the given keys."""
    heads = max((ranges[key].shape[0] for key in keys), default=1)
    tops = [ranges[key].amax((-1, -2), keepdim=True).expand(heads, 1, 1) for key in keys]
    return {key: torch.stack(tops).amax(0) for key in keys}


@dataclass(frozen=True)
class LayerScheme:
    """What one Gated DeltaNet layer runs: the inverse's plan, the sites' schemes, the projections.

    rule: None leaves the rule in floating point. shared_rescale: one scale for A, T and all registers of the inverse.
    headroom: of their calibrated ranges (`make_scales`).
    """

    plan: Plan
    rule: RuleScheme | None
    projections: Mapping[str, ProjectionScheme] = field(default_factory=dict)
    shared_rescale: bool = False
    headroom: float = 1.0

    def bound(self, key_dim: int, value_dim: int | None = None) -> RuleScheme:
        """The rule's scheme bound to this plan and head dimensions. Raises BindingError."""
        if self.rule is None:
            raise BindingError("this recipe leaves the rule in float: execute it as float")
        return bind(self.rule, self.plan, key_dim, value_dim)

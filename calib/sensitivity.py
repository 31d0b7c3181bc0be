"""Sensitivity: what each site costs when it alone is quantized and everything else stays in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import QDeltaNetError, RuleScheme, SiteScheme, sqnr_from_energy
from ..delta_rule import SITES
from ..delta_rule.sites import is_register
from ..models import delta_net_layers, execution_device, quantize_model, set_execution
from ..nn import GatedDeltaNet
from ..recipe import Recipe

Progress = Callable[[int, int], None]
REGISTERS = "inverse.*"
EVERYTHING = "*"
FLOAT = SiteScheme(None)
IGNORED = -100  # cross_entropy's own
MOST_NATS = 700.0  # whose exponential float64 holds


@dataclass(frozen=True)
class Sensitivity:
    """One row. site: a site, `inverse.*` for all registers at once, or `*` for the whole recipe.

    nll: nats per token, next to float_nll; ratio: of perplexities, exp(nll - float_nll), infinite beyond float64.
    sqnr_db: of the logits against float's, infinite where they are equal.
    """

    site: str
    nll: float
    float_nll: float
    ratio: float
    sqnr_db: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def sensitivity(
    model: Any,
    recipe: Recipe,
    tokens: Tensor,
    *,
    counted: Tensor | None = None,
    sites: Sequence[str] | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Each site alone as `recipe` quantizes it, in fake execution; then all of them. Most costly first, `*` at the end.

    model: a float model, which is quantized in place, or one that has been quantized by this recipe; static scales must
    be there (calibrate first). tokens: int64 [N, T]. counted: bool [N, T], the tokens whose likelihood is asked for
    (default all; a task with answers among noise wants the answers alone). sites: which rows (default all).
    progress(done, total) counts rows. Projections that the recipe quantizes stay in float. Raises QDeltaNetError for
    tokens too short for a next token, a mask that does not fit or counts nothing, a recipe that quantizes nothing, or a
    site that it does not have.
    """
    if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise QDeltaNetError(f"tokens {list(tokens.shape)}: must be [N, T] with N >= 1 and T >= 2")
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    if counted.shape != tokens.shape or not bool(counted[:, 1:].any()):
        raise QDeltaNetError(f"counted {list(counted.shape)}: must be bool {list(tokens.shape)} and count some token")
    layers = delta_net_layers(model) or quantize_model(model, recipe)
    bound = {i: layer.bound for i, layer in layers.items() if layer.bound is not None}
    if not bound:
        raise QDeltaNetError(f"recipe {recipe.name} leaves the rule in float: there is nothing to measure")
    names = [*(sites or [*SITES, REGISTERS]), EVERYTHING]
    batches = tokens.split(batch_size)
    labels = tokens.masked_fill(~counted, IGNORED).split(batch_size)
    set_execution(model, "float")
    expected = [_logits(model, batch) for batch in batches]
    base = _nll(expected, labels)
    rows = []
    try:
        for done, name in enumerate(names, 1):
            rows.append(_measured(model, layers, bound, name, batches, labels, expected, base))
            if progress is not None:
                progress(done, len(names))
    finally:
        for index, scheme in bound.items():
            layers[index].bound = scheme
        set_execution(model, "float")
    return sorted(rows[:-1], key=lambda r: -r.nll) + rows[-1:]


def _measured(
    model: Any,
    layers: Mapping[int, GatedDeltaNet],
    bound: Mapping[int, RuleScheme],
    name: str,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    expected: Sequence[Tensor],
    base: float,
) -> Sensitivity:
    for index, scheme in bound.items():
        layers[index].bound = only(scheme, name)
        layers[index].set_execution("fake")
        for projection in layers[index].projections():
            projection.execution = "float"
    found = [_logits(model, batch) for batch in batches]
    nll = _nll(found, labels)
    signal = sum(float(e.double().square().sum()) for e in expected)
    noise = sum(float((e.double() - f.double()).square().sum()) for e, f in zip(expected, found, strict=True))
    db = sqnr_from_energy(signal, noise)
    ratio = math.exp(nll - base) if nll - base < MOST_NATS else math.inf
    return Sensitivity(name, nll, base, ratio, round(db, 3) if math.isfinite(db) else db)


def only(scheme: RuleScheme, name: str) -> RuleScheme:
    """The scheme with one site (or `inverse.*`, or `*`) as it is and the others in float; rotations stay.

    Raises QDeltaNetError if the scheme has no such site.
    """
    chosen = [s for s in scheme.sites if name in (s, EVERYTHING) or (name == REGISTERS and is_register(s))]
    if not chosen and name != REGISTERS:  # a plan may do without registers
        raise QDeltaNetError(f"site {name}: the recipe has no such site; it has {', '.join(scheme.sites)}")
    return replace(scheme, sites={s: x if s in chosen else FLOAT for s, x in scheme.sites.items()})


@torch.no_grad()
def _logits(model: Any, batch: Tensor) -> Tensor:
    """float32 [B, T, vocabulary]."""
    logits: Tensor = model(input_ids=batch.to(execution_device(model)), use_cache=False).logits
    return logits.float()


def _nll(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """Mean over the next tokens that count, in nats."""
    total = sum(
        float(F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten().to(x.device), reduction="sum"))
        for x, y in zip(logits, labels, strict=True)
    )
    return total / sum(int((y[:, 1:] != IGNORED).sum()) for y in labels)

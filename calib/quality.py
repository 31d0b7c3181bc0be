"""What each site's scale costs on the calibration data: range, SQNR and saturation per head, in sums that are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import Granularity, SiteScheme, dynamic_scale, fit_scale, grouped, sqnr_from_energy
from ..nn import GatedDeltaNet

UNIT = 400  # energies are summed as integer multiples of 2^-400, far below the square of any float32


@dataclass
class Sums:
    """Of one site. elements: per head. By head: signal and noise, sums of squares in units of 2^-UNIT; saturated
    elements; amax and lowest, the largest and least value, and 0 where none lies beyond."""

    elements: int
    signal: list[int]
    noise: list[int]
    saturated: list[int]
    amax: list[float]
    lowest: list[float]

    def add(self, other: Sums) -> None:
        self.elements += other.elements
        self.signal = [a + b for a, b in zip(self.signal, other.signal, strict=True)]
        self.noise = [a + b for a, b in zip(self.noise, other.noise, strict=True)]
        self.saturated = [a + b for a, b in zip(self.saturated, other.saturated, strict=True)]
        self.amax = [max(a, b) for a, b in zip(self.amax, other.amax, strict=True)]
        self.lowest = [min(a, b) for a, b in zip(self.lowest, other.lowest, strict=True)]


class Quality:
    """Compares every site with its own quantization (in the format it is held in), in float, head by head.

    What one call to `site` adds is rounded once and then an integer, so that sums do not depend on their order: merged
    parts are to the bit what one object would have that saw all of it.
    """

    def __init__(self, layer: GatedDeltaNet) -> None:
        self.layer = layer
        self.scales = layer.scales.as_dict()
        self.sums: dict[str, Sums] = {}

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        """Called with everything that enters a site."""
        scheme = None if self.layer.bound is None else self.layer.bound.sites.get(site)
        if scheme is not None and scheme.held is not None:
            self._add(site, measured(x, self._scale(site, scheme, x, compact), scheme.held.qmax, compact))

    def projection(self, name: str, x: Tensor) -> None:
        """Projections are reported by evaluation."""

    def _scale(self, site: str, scheme: SiteScheme, x: Tensor, compact: bool) -> Tensor:
        assert scheme.held is not None
        if scheme.scale != "dynamic":
            return fit_scale(self.scales[site], x.shape, compact)
        kept = scheme.held_granularity
        return dynamic_scale(x, scheme.held.qmax, Granularity.PER_HEAD if kept is Granularity.FINEST else kept, compact)

    def _add(self, site: str, new: Sums) -> None:
        if site in self.sums:
            self.sums[site].add(new)
        else:
            self.sums[site] = new

    def state(self) -> dict[str, Any]:
        """site -> the fields of Sums: integers of any size and floats, as JSON holds them."""
        return {site: asdict(sums) for site, sums in self.sums.items()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a `state()` of the same layer's."""
        for site, fields in state.items():
            self._add(site, Sums(**fields))

    def report(self) -> dict[str, Any]:
        """site -> format, scale source and, per head, range [min, max], scale (static per-head ones), SQNR in dB,
        saturated and observed elements."""
        bound = self.layer.bound
        return {} if bound is None else {site: self._row(site, bound.sites[site]) for site in self.sums}

    def _row(self, site: str, scheme: SiteScheme) -> dict[str, Any]:
        sums = self.sums[site]
        assert scheme.held is not None
        row: dict[str, Any] = {
            "format": scheme.held.name,
            "scale": scheme.scale,
            "granularity": scheme.held_granularity.value,
            "elements_per_head": sums.elements,
            "heads": [],
        }
        static = self.scales.get(site)
        for h in range(len(sums.signal)):
            one = None if static is None else static[min(h, len(static) - 1)].flatten().tolist()
            row["heads"].append(
                {
                    "range": [sums.lowest[h], sums.amax[h]],
                    "scale": one[0] if one is not None and len(one) == 1 else one,
                    "sqnr_db": _decibels(sums.signal[h], sums.noise[h]),
                    "saturated": sums.saturated[h],
                }
            )
        return row


def measured(x: Tensor, scale: Tensor, qmax: int, compact: bool) -> Sums:
    """What quantizing x [..., H, R, C] (compact: [..., H, n, b, b]) with a scale that broadcasts against it costs."""
    heads = grouped(x, Granularity.PER_HEAD, compact)  # [observations, H, 1, 1, group]
    top, low = heads.amax(-1).amax(0).flatten(), heads.amin(-1).amin(0).flatten()
    ratio = x.to(torch.float32) / scale
    codes, saturated = _codes(ratio, qmax, compact)
    # In steps of the scale float32 will do: it loses 2^-24 of a value, 0.2% of a step for INT16's largest codes.
    noise, signal = (_energies(part, scale, compact) for part in (codes.sub_(ratio), ratio))
    if not all(0 < e < math.inf for e in signal + noise):  # exact or zero, or else squares left float32's range
        codes = _codes(x.to(torch.float32) / scale, qmax, compact)[0]
        steps = torch.ones(1, 1, device=x.device)
        noise = _energies(x.double() - codes.double() * scale, steps, compact)
        signal = _energies(x.to(torch.float64, copy=True), steps, compact)
    return Sums(
        elements=x.numel() // len(top),
        signal=[_units(e) for e in signal],
        noise=[_units(e) for e in noise],
        saturated=saturated or [0] * len(top),
        amax=top.clamp(min=0).tolist(),
        lowest=low.clamp(max=0).tolist(),
    )


def _codes(ratio: Tensor, qmax: int, compact: bool) -> tuple[Tensor, list[int]]:
    """Codes of x / scale, and how many of each head had to be clamped; no list where none had."""
    codes = torch.round(ratio)
    if not bool(torch.maximum(codes.amax(), -codes.amin()) > qmax):
        return codes, []
    clamped = codes.clamp(-qmax, qmax)
    return clamped, _by_head((clamped != codes).sum(-1), compact).tolist()


def _energies(x: Tensor, scale: Tensor, compact: bool) -> list[float]:
    """Sum of (x * scale)^2 by head: rows in x's dtype, then in float64. x is overwritten."""
    axis = -1 if scale.shape[-1] == 1 else -2
    sums = x.square_().sum(axis, keepdim=True).double() * scale.double().square()
    found: list[float] = _by_head(sums.sum(-1), compact).tolist()
    return found


def _by_head(x: Tensor, compact: bool) -> Tensor:
    """Sum of [..., H, R] (compact: [..., H, n, b]) over everything but the head."""
    head = x.dim() - (3 if compact else 2)
    return x.sum([d for d in range(x.dim()) if d != head])


def _units(energy: float) -> int:
    """Rounded once to a multiple of 2^-UNIT."""
    return round(math.ldexp(energy, UNIT))


def _decibels(signal: int, noise: int) -> float | None:
    """SQNR to three digits. None for what is not finite: a site that is all zero, or exact."""
    x = sqnr_from_energy(math.ldexp(signal, -UNIT), math.ldexp(noise, -UNIT))
    return round(x, 3) if math.isfinite(x) else None

"""What each site's scale costs on the calibration data: range, SQNR and saturation per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Granularity, SiteScheme, dynamic_scale, fit_scale, sqnr_from_energy
from ..nn import GatedDeltaNet


class Quality:
    """Compares every site with its own quantization (in the format it is held in), in float, head by head."""

    def __init__(self, layer: GatedDeltaNet) -> None:
        self.layer = layer
        self.scales = layer.scales.as_dict()
        self.sums: dict[str, dict[str, Tensor]] = {}

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        scheme = None if self.layer.bound is None else self.layer.bound.sites.get(site)
        if scheme is None or scheme.held is None:
            return
        scale = self._scale(site, scheme, x, compact)
        ratio = torch.round(x / scale)
        codes = ratio.clamp(-scheme.held.qmax, scheme.held.qmax)
        head = x.dim() - (4 if compact else 3)
        other = [d for d in range(x.dim()) if d != head]
        new = {
            "signal": x.double().square().sum(other),
            "noise": (x.double() - codes.double() * scale).square().sum(other),
            "saturated": (codes != ratio).sum(other),
            "elements": torch.tensor(x.numel() // x.shape[head]),
        }
        old = self.sums.setdefault(site, {"amax": torch.zeros(x.shape[head]), "lowest": torch.zeros(x.shape[head])})
        old["amax"] = torch.maximum(old["amax"], x.amax(other))
        old["lowest"] = torch.minimum(old["lowest"], x.amin(other))
        for key, value in new.items():
            old[key] = old[key] + value if key in old else value

    def projection(self, name: str, x: Tensor) -> None:
        """Projections are reported by evaluation."""

    def _scale(self, site: str, scheme: SiteScheme, x: Tensor, compact: bool) -> Tensor:
        assert scheme.held is not None
        if scheme.scale != "dynamic":
            return fit_scale(self.scales[site], x.shape, compact)
        kept = scheme.held_granularity
        return dynamic_scale(x, scheme.held.qmax, Granularity.PER_HEAD if kept is Granularity.FINEST else kept, compact)

    def report(self) -> dict[str, Any]:
        """site -> format, scale source and, per head, range [min, max], scale (static per-head ones), SQNR in dB,
        saturated and observed elements."""
        bound = self.layer.bound
        return {} if bound is None else {site: self._row(site, bound.sites[site]) for site in self.sums}

    def _row(self, site: str, scheme: SiteScheme) -> dict[str, Any]:
        sums = self.sums[site]
        assert scheme.held is not None
        heads = len(sums["signal"])
        row: dict[str, Any] = {
            "format": scheme.held.name,
            "scale": scheme.scale,
            "granularity": scheme.held_granularity.value,
            "elements_per_head": int(sums["elements"]),
            "heads": [],
        }
        static = self.scales.get(site)
        for h in range(heads):
            one = None if static is None else static[min(h, len(static) - 1)].flatten().tolist()
            row["heads"].append(
                {
                    "range": [float(sums["lowest"][h]), float(sums["amax"][h])],
                    "scale": one[0] if one is not None and len(one) == 1 else one,
                    "sqnr_db": _finite(sqnr_from_energy(float(sums["signal"][h]), float(sums["noise"][h]))),
                    "saturated": int(sums["saturated"][h]),
                }
            )
        return row


def _finite(x: float) -> float | None:
    """JSON has no nan or inf: None stands for a site that is all zero, or exact."""
    return round(x, 3) if abs(x) != float("inf") and x == x else None

"""What is quantized in a model, decoder layer by decoder layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..backends import AUTO
from ..core import BindingError
from ..nn import Execution, GatedDeltaNet, QuantLinear

_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass
class QuantizedLayer:
    """One decoder layer: its Gated DeltaNet, where it has one, and every quantized projection.

    projections: those of the Gated DeltaNet by their own names, others by their path in the decoder layer
    (`mlp.gate_proj`). Tensors of a calibration are called `layers.<index>.<site key or projection>...`.
    """

    index: int
    delta_net: GatedDeltaNet | None = None
    projections: dict[str, QuantLinear] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return f"layers.{self.index}."

    @property
    def saturated(self) -> Counter[str]:
        """Clipped elements per site since the execution was chosen; those of all projections as `projections`."""
        rule = Counter() if self.delta_net is None else self.delta_net.saturated
        return rule + Counter({"projections": sum(p.saturated for p in self.projections.values())})

    def observe(self, site: Callable[[str, Tensor, bool], None], projection: Callable[[str, Tensor], None]) -> None:
        """Call these with what enters a site, or a projection by its name, in the execution `observe`."""
        if self.delta_net is not None:
            self.delta_net.observe = site
        for name, linear in self.projections.items():
            linear.observe = _named(projection, name)

    def stop_observing(self) -> None:
        if self.delta_net is not None:
            self.delta_net.observe = None
        for linear in self.projections.values():
            linear.observe = None


def _named(observe: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    return lambda x: observe(name, x)


def quantized_layers(model: nn.Module) -> dict[int, QuantizedLayer]:
    """Every decoder layer in which something is quantized, by index; empty before `quantize_model`."""
    found: dict[int, QuantizedLayer] = {}
    owned: set[int] = set()
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            layer = found.setdefault(module.layer_idx, QuantizedLayer(module.layer_idx))
            layer.delta_net = module
            layer.projections |= {n: m for n, m in module.named_children() if isinstance(m, QuantLinear)}
            owned |= {id(m) for m in module.projections()}
    for path, module in model.named_modules():
        place = _IN_LAYER.search(path)
        if place is not None and isinstance(module, QuantLinear) and id(module) not in owned:
            index = int(place[1])
            found.setdefault(index, QuantizedLayer(index)).projections[place[2]] = module
    return dict(sorted(found.items()))


def delta_net_layers(model: nn.Module) -> dict[int, GatedDeltaNet]:
    """The replaced Gated DeltaNets of a model by decoder layer index."""
    return {m.layer_idx: m for m in model.modules() if isinstance(m, GatedDeltaNet)}


def set_execution(model: nn.Module, execution: Execution, backend: str = AUTO) -> None:
    """Execution of everything that is quantized. Raises BindingError for fake or integer execution of nothing."""
    layers = quantized_layers(model).values()
    rules = any(x.delta_net is not None and x.delta_net.bound is not None for x in layers)
    if execution in ("fake", "integer") and not rules and not any(x.projections for x in layers):
        raise BindingError("this recipe quantizes nothing: execute it as float")
    for layer in layers:
        if layer.delta_net is not None:
            layer.delta_net.set_execution(execution, backend)
        for projection in layer.projections.values():
            projection.set_execution(execution, backend)

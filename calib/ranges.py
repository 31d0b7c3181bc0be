"""The observers of one decoder layer, and the static scales that they propose."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core import TINY, Granularity, NonFiniteError, grouped
from ..delta_rule import make_scales
from ..models import QuantizedLayer
from ..nn import GatedDeltaNet
from ..recipe import Recipe
from .observers import Key, MinMaxObserver, Observer, largest, make_observer


class LayerRanges:
    """Observers of one decoder layer: one per (site, granularity) with a static scale, one per static projection."""

    def __init__(self, layer: QuantizedLayer, recipe: Recipe) -> None:
        self.layer, self.recipe = layer, recipe
        self.observers: dict[Key, Observer] = {}
        self._by_site: dict[str, list[Key]] = {}
        if layer.delta_net is not None:
            self._watch(layer.delta_net)
        self.inputs = {name: MinMaxObserver() for name, p in layer.projections.items() if p.is_static}

    def _watch(self, delta_net: GatedDeltaNet) -> None:
        """Where a carried site and its operand keep the same axes they share a range: the wider format's."""
        chosen = self.recipe.observers(self.layer.index)
        for spec in sorted(delta_net.specs, key=lambda s: -s.format.bits):
            key = (spec.site, spec.granularity)
            if not spec.bound and key not in self.observers:
                config = chosen[spec.site]
                self.observers[key] = make_observer(config.kind, config.percentile, spec.format.qmax)
                self._by_site.setdefault(spec.site, []).append(key)

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        """Called with everything that enters a site. Raises NonFiniteError for NaN or infinity."""
        keys = self._by_site.get(site, ())
        tops = [self.observers[key].update(grouped(x, key[1], compact)) for key in keys]
        top = tops[0] if tops else largest(grouped(x, Granularity.PER_TENSOR, compact))
        if not bool(top.isfinite().all()):
            raise NonFiniteError(site)

    def projection(self, name: str, x: Tensor) -> None:
        """Called with the inputs of a projection. Raises NonFiniteError for NaN or infinity in a static one's."""
        if name not in self.inputs:
            return
        top = self.inputs[name].update(x.float().reshape(1, 1, 1, 1, -1))
        if not bool(top.isfinite().all()):
            raise NonFiniteError(name, f"layer {self.layer.index}, ")

    def state(self) -> dict[str, Tensor]:
        """Of every observer, by `<its name>/<name of the tensor>`."""
        return {f"{name}/{key}": x for name, observer in self._named().items() for key, x in observer.state().items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what other observers of this layer saw."""
        for name, observer in self._named().items():
            own = name + "/"
            observer.merge({key.removeprefix(own): x for key, x in state.items() if key.startswith(own)})

    def _named(self) -> dict[str, Observer]:
        sites = {f"{site}:{granularity.value}": o for (site, granularity), o in self.observers.items()}
        return sites | {f"{name}:input": observer for name, observer in self.inputs.items()}

    def scales(self) -> dict[str, Tensor]:
        """Static scales by `layers.<i>.<site key>`, and `layers.<i>.<projection>.input_scale`."""
        result = {} if self.layer.delta_net is None else self._rule_scales(self.layer.delta_net)
        for name, observer in self.inputs.items():
            fmt = self.layer.projections[name].scheme.activation.format
            assert fmt is not None
            result[f"{name}.input_scale"] = observer.amax().reshape(1).clamp(min=TINY) / fmt.qmax
        return {self.layer.prefix + key: scale.cpu() for key, scale in result.items()}

    def _rule_scales(self, delta_net: GatedDeltaNet) -> dict[str, Tensor]:
        amax = {key: observer.amax() for key, observer in self.observers.items()}
        scheme = delta_net.scheme
        return make_scales(
            delta_net.specs,
            amax,
            shared=scheme.shared_rescale,
            power_of_two=self.recipe.requantize == "power_of_two",
            beta_max=delta_net.dims.beta_max,
            headroom=scheme.headroom,
            proven=scheme.plan.bounded,
        )

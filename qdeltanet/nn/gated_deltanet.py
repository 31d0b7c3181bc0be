"""Gated DeltaNet with its whole delta rule quantized: replaces the layer of a Hugging Face model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import AUTO
from ..core import (
    Arithmetic,
    FloatArithmetic,
    IntegerArithmetic,
    NonFiniteError,
    ObservingArithmetic,
    Operand,
    QDeltaNetError,
)
from ..delta_rule import Dimensions, LayerScheme, ScaleSpec, run_rule, scale_shape, scale_specs
from ..inverse import plan as make_plan
from .execution import Execution, backend_for
from .linear import QuantLinear
from .scales import Scales
from .state import pack_state, unpack_state
from .wiring import Memory, Wiring, module_schemes

Observe = Callable[[str, Tensor, bool], None]
# q, k, v, g, beta and the state -> output and state, as `run_rule`
ForeignRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Operand | None], tuple[Tensor, Operand]]
PACKED = ("cu_seq_lens_q", "cu_seqlens")


class GatedDeltaNet(nn.Module):
    """A family's layer around `run_rule`.

    parts: the float layer's own sub-modules and parameters by their names; `wiring` knows how they are put together,
    role_names which of them a recipe's roles name. execution: `float`, `fake` or `integer`; `observe` is float with an
    observer at every site, and the scheme's decay and rotations. The state is cached as codes of its site with their
    scale, in the rotated basis where the scheme rotates (`float` never does).
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module | nn.Parameter],
        dims: Dimensions,
        scheme: LayerScheme,
        layer_idx: int,
        role_names: Mapping[str, tuple[str, ...]],
        wiring: Wiring | None = None,
    ) -> None:
        super().__init__()
        self.dims, self.scheme, self.layer_idx = dims, scheme, layer_idx
        self.wiring = wiring or Wiring()
        for name, part in parts.items():
            setattr(self, name, part)
        for name, projection in module_schemes(scheme.projections, role_names, parts).items():
            linear = getattr(self, name)
            setattr(self, name, QuantLinear(linear.in_features, linear.out_features, projection, linear))
        self.bound = None if scheme.rule is None else scheme.bound(dims.key_dim, dims.value_dim)
        self.specs: list[ScaleSpec] = [] if self.bound is None else scale_specs(self.bound, scheme.plan)
        self.scales = Scales({spec.key: scale_shape(spec, dims, scheme.plan.chunk_size) for spec in self.specs})
        self.decode_plan = make_plan("identity", 1)
        self.execution: Execution = "float"
        self.backend_name = AUTO
        self.observe: Observe | None = None
        self.foreign: ForeignRule | None = None  # runs the rule elsewhere, from an exported file
        self._arithmetic: Arithmetic | None = None
        self._arithmetic_device: torch.device | None = None

    # -- execution ---------------------------------------------------------------------------------------------------

    def set_execution(self, execution: Execution, backend: str = AUTO) -> None:
        """Choose how the layer and its quantized projections execute; what the scheme leaves in float stays there."""
        self.execution, self.backend_name, self._arithmetic, self.foreign = execution, backend, None, None
        for projection in self.projections():
            projection.set_execution(execution, backend)

    def projections(self) -> list[QuantLinear]:
        return [m for m in self.children() if isinstance(m, QuantLinear)]

    @property
    def saturated(self) -> Counter[str]:
        """Clipped elements per site of the rule since set_execution."""
        return self._arithmetic.saturated if isinstance(self._arithmetic, IntegerArithmetic) else Counter()

    def _arithmetic_on(self, device: torch.device) -> Arithmetic:
        if self._arithmetic is None or self._arithmetic_device != device:  # the model may have been moved
            self._arithmetic, self._arithmetic_device = self._make_arithmetic(device), device
        return self._arithmetic

    def _make_arithmetic(self, device: torch.device) -> Arithmetic:
        if self.execution == "observe" and self.observe is not None:
            rule = self.scheme.rule
            return ObservingArithmetic(self.observe, *(() if rule is None else (rule.decay, rule.rotate)))
        if self.execution in ("float", "observe") or self.bound is None:
            return FloatArithmetic()
        backend = backend_for(self.execution, self.backend_name, device)
        return IntegerArithmetic(self.bound, self.scales.as_dict(), backend, allow_float=self.execution == "fake")

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """hidden_states [B, T, D] -> [B, T, D]; cache and padding mask [B, T] as transformers passes them."""
        if any(kwargs.get(name) is not None for name in PACKED):
            raise QDeltaNetError(f"packed sequences ({', '.join(PACKED)}) are not supported; pad them")
        mask = None if attention_mask is None else attention_mask[:, -hidden_states.shape[1] :, None]
        if mask is not None:
            hidden_states = (hidden_states * mask).to(hidden_states.dtype)
        memory = self.wiring.memory(self, cache_params, kwargs)
        try:
            return self.wiring.result(self._forward(hidden_states, memory, mask), kwargs)
        except NonFiniteError as e:
            raise NonFiniteError(e.site, f"layer {self.layer_idx}, ") from e

    def _forward(self, hidden_states: Tensor, memory: Memory | None, mask: Tensor | None) -> Tensor:
        state = self._remembered_state(memory)
        inputs = self.wiring.inputs(self, hidden_states, partial(self._convolve, memory=memory))
        q, k, v, g, beta, gate = inputs if mask is None else inputs.without_padding(mask)
        decode = hidden_states.shape[1] == 1 and state is not None
        plan = self.decode_plan if decode else self.scheme.plan
        if self.foreign is not None:
            output, state = self.foreign(q, k, v, g, beta, state)
        else:
            output, state = run_rule(
                q, k, v, g, beta, state,
                arithmetic=self._arithmetic_on(q.device), plan=plan, normalise=True, chunk_size=plan.chunk_size,
            )  # fmt: skip
        if memory is not None:
            memory.store(pack_state(state))
        return self.wiring.output(self, output.to(hidden_states.dtype), gate)

    def _convolve(self, mixed: Tensor, memory: Memory | None) -> Tensor:
        """Causal depthwise convolutions and SiLU over [B, T, channels], continuing from the remembered inputs.

        They are called as modules, never by their weights: hooks that load offloaded weights hang on the call.
        """
        x = mixed.transpose(1, 2)
        if memory is not None:
            x = memory.extend(x)
        length = x.shape[-1]
        convolutions = [getattr(self, name) for name in self.wiring.convolutions]
        parts = x.split([c.in_channels for c in convolutions], dim=1)
        outputs = [convolution(part)[..., :length] for convolution, part in zip(convolutions, parts, strict=True)]
        x = F.silu(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))
        return x[..., -mixed.shape[1] :].transpose(1, 2)

    def _remembered_state(self, memory: Memory | None) -> Operand | None:
        """Read before the convolution's inputs are extended: transformers marks the layer as used there."""
        packed = None if memory is None else memory.state()
        if packed is None:
            return None
        if packed.shape[-2] == self.dims.key_dim or self.bound is None:
            return Operand("state", packed)
        return unpack_state(packed, self.bound.sites["state"])

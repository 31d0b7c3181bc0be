"""Gated DeltaNet with its whole delta rule quantized: replaces the layer of a Hugging Face model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import AUTO
from ..core import (
    Arithmetic,
    BindingError,
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

Observe = Callable[[str, Tensor, bool], None]


class GatedDeltaNet(nn.Module):
    """The layer of Qwen3.5 around `run_rule`.

    parts: the float layer's own sub-modules and parameters by their names (in_proj_qkv, in_proj_z, in_proj_b,
    in_proj_a, conv1d, A_log, dt_bias, norm, out_proj). execution: `float`, `fake` or `integer`; `observe` is float with
    an observer at every site, and the scheme's decay and rotations. The state is cached as codes of its site with their
    scale, in the rotated basis where the scheme rotates (`float` never does).
    """

    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module
    out_proj: nn.Module
    conv1d: nn.Module
    norm: nn.Module
    A_log: Tensor
    dt_bias: Tensor

    def __init__(
        self,
        parts: Mapping[str, nn.Module | nn.Parameter],
        dims: Dimensions,
        scheme: LayerScheme,
        layer_idx: int,
        role_names: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.dims, self.scheme, self.layer_idx = dims, scheme, layer_idx
        for name, part in parts.items():
            setattr(self, name, part)
        for role, projection in scheme.projections.items():
            name = role_names[role]
            linear = getattr(self, name)
            setattr(self, name, QuantLinear(linear.in_features, linear.out_features, projection, linear))
        self.bound = None if scheme.rule is None else scheme.bound(dims.key_dim, dims.value_dim)
        self.specs: list[ScaleSpec] = [] if self.bound is None else scale_specs(self.bound, scheme.plan)
        self.scales = Scales({spec.key: scale_shape(spec, dims, scheme.plan.chunk_size) for spec in self.specs})
        self.decode_plan = make_plan("identity", 1)
        self.execution: Execution = "float"
        self.backend_name = AUTO
        self.observe: Observe | None = None
        self._arithmetic: Arithmetic | None = None
        self._arithmetic_device: torch.device | None = None

    # -- execution ---------------------------------------------------------------------------------------------------

    def set_execution(self, execution: Execution, backend: str = AUTO) -> None:
        """Choose how the layer and its quantized projections execute. Raises BindingError where it cannot."""
        if execution in ("fake", "integer") and self.bound is None and not self.projections():
            raise BindingError("this recipe quantizes nothing: execute it as float")
        self.execution, self.backend_name, self._arithmetic = execution, backend, None
        for projection in self.projections():
            projection.set_execution(execution, backend)

    def projections(self) -> list[QuantLinear]:
        return [m for m in self.children() if isinstance(m, QuantLinear)]

    @property
    def saturated(self) -> Counter[str]:
        """Clipped elements per site of the rule since set_execution."""
        return self._arithmetic.saturated if isinstance(self._arithmetic, IntegerArithmetic) else Counter()

    @property
    def arithmetic(self) -> Arithmetic:
        if self._arithmetic is None or self._arithmetic_device != self.A_log.device:  # the model may have been moved
            self._arithmetic, self._arithmetic_device = self._make_arithmetic(), self.A_log.device
        return self._arithmetic

    def _make_arithmetic(self) -> Arithmetic:
        if self.execution == "observe" and self.observe is not None:
            rule = self.scheme.rule
            return ObservingArithmetic(self.observe, *(() if rule is None else (rule.decay, rule.rotate)))
        if self.execution in ("float", "observe") or self.bound is None:
            return FloatArithmetic()
        backend = backend_for(self.execution, self.backend_name, self.A_log.device)
        return IntegerArithmetic(self.bound, self.scales.as_dict(), backend, allow_float=self.execution == "fake")

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; cache and padding mask [B, T] as transformers passes them."""
        try:
            return self._forward(hidden_states, cache_params, attention_mask, **kwargs)
        except NonFiniteError as e:
            raise NonFiniteError(e.site, f"layer {self.layer_idx}, ") from e

    def _forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise QDeltaNetError("packed sequences (cu_seq_lens_q) are not supported; pad them")
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        tokens = hidden_states.shape[1]
        state = self._cached_state(cache_params)
        q, k, v = self._heads(self._convolved(self.in_proj_qkv(hidden_states), cache_params, tokens))
        beta = self.in_proj_b(hidden_states).sigmoid() * self.dims.beta_max
        a = self.in_proj_a(hidden_states).float()
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias)
        decode = tokens == 1 and state is not None
        plan = self.decode_plan if decode else self.scheme.plan
        output, state = run_rule(
            q, k, v, g, beta, state,
            arithmetic=self.arithmetic, plan=plan, normalise=True, chunk_size=plan.chunk_size,
        )  # fmt: skip
        if cache_params is not None:
            cache_params.update_recurrent_state(pack_state(state), self.layer_idx)
        z = self.in_proj_z(hidden_states).reshape(-1, self.dims.value_dim)
        output = output.to(hidden_states.dtype).reshape(-1, self.dims.value_dim)
        output = self.norm(output, z).reshape(*hidden_states.shape[:2], -1)
        result: Tensor = self.out_proj(output)
        return result

    def _convolved(self, mixed: Tensor, cache_params: Any, tokens: int) -> Tensor:
        """Causal depthwise convolution and SiLU over [B, T, channels], continuing from the cached inputs."""
        x = mixed.transpose(1, 2)
        if cache_params is not None:
            x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.dims.conv_kernel)
        length = x.shape[-1]
        x = F.silu(self.conv1d(x)[..., :length])
        return x[..., -tokens:].transpose(1, 2)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, channels] -> q, k [B, T, HK, K] and v [B, T, H, V]."""
        d = self.dims
        keys = d.key_heads * d.key_dim
        q, k, v = mixed.split([keys, keys, d.value_heads * d.value_dim], dim=-1)
        batch, tokens = mixed.shape[:2]
        q, k = (x.reshape(batch, tokens, d.key_heads, d.key_dim) for x in (q, k))
        return q, k, v.reshape(batch, tokens, d.value_heads, d.value_dim)

    def _cached_state(self, cache_params: Any) -> Operand | None:
        """Read before the convolution's cache is updated: transformers marks the layer as used there."""
        packed = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
        if packed is None:
            return None
        if packed.shape[-2] == self.dims.key_dim or self.bound is None:
            return Operand("state", packed)
        return unpack_state(packed, self.bound.sites["state"])

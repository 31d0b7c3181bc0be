"""What differs between families: how hidden states become the inputs of the rule, and its output hidden states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from ..core import BindingError, ProjectionScheme
from ..delta_rule import Dimensions

Convolve = Callable[[Tensor], Tensor]


class RuleInputs(NamedTuple):
    """q, k [B, T, HK, K] before normalisation, v [B, T, H, V], g and beta [B, T, H]; gate [B, T, H V] of the output, or
    None where the family has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    gate: Tensor | None

    def without_padding(self, mask: Tensor) -> RuleInputs:
        """Nothing where the mask [B, T, 1] is 0: padding behind a text has seen its last tokens through the convolution
        and writes with beta = 1/2, which dynamic scales of the text's last chunk would see."""
        rows = mask[..., None]
        q, k, v = ((x * rows).to(x.dtype) for x in (self.q, self.k, self.v))
        g, beta = ((x * mask).to(x.dtype) for x in (self.g, self.beta))
        return RuleInputs(q, k, v, g, beta, self.gate)


class Projected(NamedTuple):
    """Hidden states after the input projections: mixed [B, T, 2 HK K + H V] (q, k and v side by side, before the
    convolution), z [B, T, H V], b and a [B, T, H]."""

    mixed: Tensor
    z: Tensor | None
    b: Tensor
    a: Tensor | None


class Memory(Protocol):
    """What a layer keeps from call to call, in whatever cache its family has."""

    def state(self) -> Tensor | None:
        """The packed state of the call before; asked for before `extend`."""
        ...

    def extend(self, x: Tensor) -> Tensor:
        """Inputs of the convolution: x [B, channels, T] behind those remembered, [B, channels, P + T]."""
        ...

    def store(self, state: Tensor) -> None: ...


class CacheMemory:
    """A layer's part of a transformers cache."""

    def __init__(self, cache: Any, layer_idx: int, conv_kernel: int) -> None:
        self.cache, self.layer_idx, self.conv_kernel = cache, layer_idx, conv_kernel

    def state(self) -> Tensor | None:
        packed: Tensor | None = self.cache.get_recurrent_state(self.layer_idx)
        return packed

    def extend(self, x: Tensor) -> Tensor:
        inputs: Tensor = self.cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel)
        return inputs

    def store(self, state: Tensor) -> None:
        self.cache.update_recurrent_state(state, self.layer_idx)


class Wiring:
    """Qwen3.5's; other families override what differs. It holds nothing: sub-modules and parameters are the layer's.

    convolutions: attribute names of the causal depthwise convolutions, in the order of their channels in `mixed`.
    """

    convolutions: tuple[str, ...] = ("conv1d",)
    norm = "norm"
    out = "out_proj"

    def memory(self, layer: Any, cache: Any, options: Mapping[str, Any]) -> Memory | None:
        """The layer's part of a cache. options: what else the decoder layer passes by name."""
        return None if cache is None else CacheMemory(cache, layer.layer_idx, layer.dims.conv_kernel)

    def inputs(self, layer: Any, hidden: Tensor, convolve: Convolve) -> RuleInputs:
        """hidden [B, T, D]; convolve: the layer's convolutions and SiLU over `mixed`, continuing from its memory."""
        mixed, z, b, a = self.project(layer, hidden)
        q, k, v = split_heads(convolve(mixed), layer.dims)
        return RuleInputs(q, k, v, self.decay(layer, a, b), b.sigmoid() * layer.dims.beta_max, z)

    def project(self, layer: Any, hidden: Tensor) -> Projected:
        return Projected(
            layer.in_proj_qkv(hidden), layer.in_proj_z(hidden), layer.in_proj_b(hidden), layer.in_proj_a(hidden)
        )

    def decay(self, layer: Any, a: Tensor | None, b: Tensor) -> Tensor:
        """g = -exp(A_log) softplus(a + dt_bias), [B, T, H] float32."""
        assert a is not None
        return -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)

    def output(self, layer: Any, o: Tensor, gate: Tensor | None) -> Tensor:
        """o [B, T, H, V] -> [B, T, D]: norm, gated where there is a gate, and output projection."""
        rows = [x.reshape(-1, layer.dims.value_dim) for x in (o, gate) if x is not None]
        normed: Tensor = getattr(layer, self.norm)(*rows)
        result: Tensor = getattr(layer, self.out)(normed.reshape(*o.shape[:2], -1))
        return result

    def result(self, output: Tensor, options: Mapping[str, Any]) -> Any:
        """What the decoder layer expects back."""
        return output


def split_heads(mixed: Tensor, dims: Dimensions) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 2 HK K + H V] -> q, k [B, T, HK, K] and v [B, T, H, V]."""
    keys = dims.key_heads * dims.key_dim
    q, k, v = mixed.split([keys, keys, dims.value_heads * dims.value_dim], dim=-1)
    batch, tokens = mixed.shape[:2]
    q, k = (x.reshape(batch, tokens, dims.key_heads, dims.key_dim) for x in (q, k))
    return q, k, v.reshape(batch, tokens, dims.value_heads, dims.value_dim)


def module_schemes(
    projections: Mapping[str, ProjectionScheme], role_names: Mapping[str, tuple[str, ...]], present: Collection[str]
) -> dict[str, ProjectionScheme]:
    """Scheme of every quantized module by its name; modules that a layer lacks are left out.

    role_names: the modules of each role. A module that holds several roles takes one scheme: raises BindingError where
    those roles ask for different ones.
    """
    schemes: dict[str, ProjectionScheme] = {}
    for name in dict.fromkeys(name for names in role_names.values() for name in names if name in present):
        roles = [role for role, names in role_names.items() if name in names]
        scheme = projections.get(roles[0])
        if any(projections.get(role) != scheme for role in roles[1:]):
            raise BindingError(
                f"projections {' and '.join(roles)} are one module here ({name}): give them one scheme, or none of them"
            )
        if scheme is not None:
            schemes[name] = scheme
    return schemes

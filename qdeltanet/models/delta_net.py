"""Plain DeltaNet, without decay: the layer `DeltaNet` of flash-linear-attention (model_type `delta_net`).

Written after its public source. fla's kernels need a GPU, so the tests run a torch module of the same class, attribute
names, conventions and formula. By hand, fla 0.6.0's own model was compared in Triton's interpreter, up to 60 tokens
(which it runs token by token): logits, cache, left padding and generate() agree to 1e-6. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..delta_rule import Dimensions
from ..nn import Memory, Projected, Wiring
from .family import Adapter


class FlaMemory:
    """A layer's entry of fla's cache: {recurrent_state, conv_state, ...}. The inputs of all convolutions are kept in
    one tensor, unlike fla's three: only this layer reads them."""

    def __init__(self, cache: Any, layer_idx: int, conv_kernel: int) -> None:
        self.cache, self.layer_idx, self.conv_kernel = cache, layer_idx, conv_kernel
        self.past = cache[layer_idx] if len(cache) > layer_idx else None

    def state(self) -> Tensor | None:
        return None if self.past is None else self.past["recurrent_state"]

    def extend(self, x: Tensor) -> Tensor:
        self.tokens = x.shape[-1]
        if self.past is not None:
            x = torch.cat([self.past["conv_state"][0], x], dim=-1)
        self.inputs = x[..., -self.conv_kernel :]
        return x

    def store(self, state: Tensor) -> None:
        self.cache.update(
            recurrent_state=state, conv_state=(self.inputs,), layer_idx=self.layer_idx, offset=self.tokens
        )


class DeltaNetWiring(Wiring):
    convolutions = ("q_conv1d", "k_conv1d", "v_conv1d")
    norm, out = "o_norm", "o_proj"

    def memory(self, layer: Any, cache: Any, options: Mapping[str, Any]) -> Memory | None:
        cache = options.get("past_key_values")
        return None if cache is None else FlaMemory(cache, layer.layer_idx, layer.dims.conv_kernel)

    def project(self, layer: Any, hidden: Tensor) -> Projected:
        mixed = torch.cat([layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)], dim=-1)
        gate = layer.g_proj(hidden) if hasattr(layer, "g_proj") else None
        return Projected(mixed, gate, layer.b_proj(hidden), None)

    def decay(self, layer: Any, a: Tensor | None, b: Tensor) -> Tensor:
        """No decay: g is 0 exactly, so every decay is a coefficient of exactly 1."""
        return torch.zeros_like(b, dtype=torch.float32)

    def result(self, output: Tensor, options: Mapping[str, Any]) -> Any:
        """Output, attention weights (none) and the cache."""
        return output, None, options.get("past_key_values")


class DeltaNetAdapter(Adapter):
    def dimensions(self, module: Any) -> Dimensions:
        return Dimensions(
            module.num_heads, module.num_heads, module.head_k_dim, module.head_v_dim, module.conv_size,
            beta_max=2.0 if module.allow_neg_eigval else 1.0,
        )  # fmt: skip

    def parts(self, module: Any) -> dict[str, nn.Module | nn.Parameter]:
        parts = super().parts(module)
        return parts | {name: _plain(getattr(module, name)) for name in DeltaNetWiring.convolutions}


def _plain(short: nn.Conv1d) -> nn.Conv1d:
    """fla's ShortConvolution runs kernels and returns a pair: the same weight in a causal convolution of torch's."""
    width, kernel = short.in_channels, short.kernel_size[0]
    plain = nn.Conv1d(width, width, kernel, groups=width, padding=kernel - 1, bias=False, device="meta")
    plain.weight = short.weight
    return plain


DELTA_NET = DeltaNetAdapter(
    model_types=("delta_net",),
    layer_classes=("DeltaNet",),
    role_names={
        "proj.qkv": ("q_proj", "k_proj", "v_proj"),
        "proj.z": ("g_proj",),
        "proj.out": ("o_proj",),
        "proj.b": ("b_proj",),
    },
    part_names=("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "o_norm", "o_proj"),
    wiring=DeltaNetWiring(),
    needs={
        "qk_norm": "l2", "qk_activation": "silu", "use_beta": True, "use_short_conv": True, "conv_bias": False,
    },
    # fla's fused MLP reads down_proj.weight past the module, and its attention bears the DeltaNet's name, `attn`.
    linears={"mlp.gate": ("mlp.gate_proj",), "mlp.up": ("mlp.up_proj",)},
)  # fmt: skip

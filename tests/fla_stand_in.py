"""A DeltaNet language model in plain torch with the class, attribute and call conventions of flash-linear-attention.

fla's kernels need a GPU. What the adapter meets is what counts here: the layer's class name, its sub-modules and
options, how the decoder layer calls it, and fla's cache; the rule is the token-by-token recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class DeltaNetConfig(PreTrainedConfig):
    model_type = "delta_net"

    vocab_size: int = 100
    hidden_size: int = 64
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 2.0
    conv_size: int = 4
    use_gate: bool = False
    allow_neg_eigval: bool = False
    qk_norm: str = "l2"
    initializer_range: float = 0.02


class FlaCache:
    """One dictionary per layer, replaced by each update."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        if layer_idx >= len(self.layers):
            raise KeyError(layer_idx)
        return self.layers[layer_idx]

    def update(self, *, recurrent_state: Any, conv_state: Any, layer_idx: int, offset: int) -> None:
        seen = self.layers[layer_idx]["seen"] if layer_idx < len(self.layers) else 0
        entry = {"recurrent_state": recurrent_state, "conv_state": conv_state, "seen": seen + offset}
        self.layers[layer_idx : layer_idx + 1] = [entry]


class ShortConvolution(nn.Conv1d):
    """Its forward returns a pair: the convolved [B, T, D] after SiLU, and the last inputs."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, groups=width, padding=kernel - 1, bias=False)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = x.transpose(1, 2) if cache is None else torch.cat([cache, x.transpose(1, 2)], dim=-1)
        y = F.silu(super().forward(inputs)[..., : inputs.shape[-1]])[..., -x.shape[1] :]
        return y.transpose(1, 2), inputs[..., 1 - self.kernel_size[0] :]


class FusedRMSNormGated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5) * F.silu(gate)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S <- S + k beta (v - S^T k)^T; o = S^T q. q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H]."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state = q.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    outputs = []
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * q.shape[-1] ** -0.5))
    return torch.stack(outputs, dim=1), state


class DeltaNet(nn.Module):
    def __init__(self, config: DeltaNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_heads, self.conv_size = layer_idx, config.num_heads, config.conv_size
        self.qk_norm, self.qk_activation, self.conv_bias = config.qk_norm, "silu", False
        self.use_beta, self.use_short_conv, self.use_gate = True, True, config.use_gate
        self.allow_neg_eigval = config.allow_neg_eigval
        keys, values = int(config.hidden_size * config.expand_k), int(config.hidden_size * config.expand_v)
        self.head_k_dim, self.head_v_dim = keys // self.num_heads, values // self.num_heads
        for name, width in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=False))
            setattr(self, f"{name}_conv1d", ShortConvolution(width, config.conv_size))
        self.b_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=False)
        self.o_norm = FusedRMSNormGated(self.head_v_dim) if config.use_gate else nn.RMSNorm(self.head_v_dim, eps=1e-5)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None, Any]:
        past = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            past = past_key_values[self.layer_idx]
        convs = (None, None, None) if past is None else past["conv_state"]
        x = hidden_states
        q, q_conv = self.q_conv1d(self.q_proj(x), convs[0])
        k, k_conv = self.k_conv1d(self.k_proj(x), convs[1])
        v, v_conv = self.v_conv1d(self.v_proj(x), convs[2])
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        beta = self.b_proj(x).sigmoid() * (2 if self.allow_neg_eigval else 1)
        o, state = delta_rule(q, k, v, beta, None if past is None else past["recurrent_state"])
        if past_key_values is not None:
            convs = (q_conv, k_conv, v_conv)
            past_key_values.update(recurrent_state=state, conv_state=convs, layer_idx=self.layer_idx, offset=x.shape[1])
        gate = (self.g_proj(x).unflatten(-1, (self.num_heads, -1)),) if self.use_gate else ()
        return self.o_proj(self.o_norm(o, *gate).flatten(2)), None, past_key_values


class GatedMLP(nn.Module):
    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class DeltaNetBlock(nn.Module):
    def __init__(self, config: DeltaNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(config.hidden_size, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = DeltaNet(config, layer_idx), GatedMLP(config)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        attended, weights, cache = self.attn(hidden_states=self.attn_norm(x), **kwargs)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), weights, cache


class DeltaNetModel(nn.Module):
    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DeltaNetBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)


class DeltaNetForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DeltaNetConfig
    base_model_prefix = "model"
    _no_split_modules = ("DeltaNetBlock",)

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None, use_cache: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        if use_cache and past_key_values is None:
            past_key_values = FlaCache()
        x = self.model.embeddings(input_ids)
        for layer in self.model.layers:
            x, _, past_key_values = layer(
                x, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache,
                output_attentions=False,
            )  # fmt: skip
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(x)), past_key_values=past_key_values)


AutoConfig.register("delta_net", DeltaNetConfig)
AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM)

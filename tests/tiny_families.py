"""A tiny random model of every family: two linear layers, one of full attention where the family has any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "tie_word_embeddings": True,
    **HEADS,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
DT = torch.tensor([5e-4, 0.05, 3e-3, 0.5])  # slow gates: only then do products of many keys, and the inverse, matter


def qwen3_5() -> Any:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, head_dim=32))


def qwen3_5_multimodal() -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**TEXT, "head_dim": 32}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=True)
    )


def qwen3_5_moe() -> Any:
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**TEXT, **EXPERTS, head_dim=32))


def qwen3_5_moe_multimodal() -> Any:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text = {**TEXT, **EXPERTS, "head_dim": 32}
    return Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=True)
    )


def qwen3_next() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(Qwen3NextConfig(**TEXT, **EXPERTS, head_dim=32, mlp_only_layers=[0]))


def olmo_hybrid() -> Any:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    return OlmoHybridForCausalLM(OlmoHybridConfig(**TEXT, pad_token_id=0, eos_token_id=1))


def delta_net(**options: Any) -> Any:
    from fla_stand_in import DeltaNetConfig, DeltaNetForCausalLM

    return DeltaNetForCausalLM(DeltaNetConfig(**options))


def delta_net_gated() -> Any:
    """With an output gate and negative eigenvalues."""
    return delta_net(use_gate=True, allow_neg_eigval=True)


FAMILIES: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        qwen3_5,
        qwen3_5_multimodal,
        qwen3_5_moe,
        qwen3_5_moe_multimodal,
        qwen3_next,
        olmo_hybrid,
        delta_net,
        delta_net_gated,
    )
}


def tiny(family: str) -> Any:
    """The same weights at every call: decay is slow, beta spreads over its range."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.zero_()
        elif name.endswith("dt_bias"):
            parameter.data = DT + torch.log(-torch.expm1(-DT))
        elif name.endswith(("in_proj_b.weight", "b_proj.weight")):
            parameter.data *= 10
        elif name.endswith("in_proj_ba.weight"):
            parameter.data.view(2, 2, 2, -1)[:, 0] *= 10  # of each key head b, then a
    return model.eval()

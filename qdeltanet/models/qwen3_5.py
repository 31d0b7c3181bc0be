"""Qwen3.5, dense and mixture of experts: text models, and the text part of multimodal ones."""

from __future__ import annotations

from .family import Adapter

QWEN3_5 = Adapter(
    model_types=("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe"),
    layer_classes=("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"),
    role_names={
        "proj.qkv": ("in_proj_qkv",),
        "proj.z": ("in_proj_z",),
        "proj.out": ("out_proj",),
        "proj.a": ("in_proj_a",),
        "proj.b": ("in_proj_b",),
    },
    part_names=(
        "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "dt_bias", "A_log", "norm", "out_proj",
    ),
)  # fmt: skip

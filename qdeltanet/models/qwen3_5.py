"""Qwen3.5: text models, and the text part of multimodal ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..delta_rule import Dimensions


class Qwen3_5Adapter:
    model_types = ("qwen3_5_text", "qwen3_5")
    role_names: ClassVar[Mapping[str, str]] = {
        "proj.qkv": "in_proj_qkv",
        "proj.z": "in_proj_z",
        "proj.out": "out_proj",
        "proj.a": "in_proj_a",
        "proj.b": "in_proj_b",
    }
    _names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "dt_bias", "A_log", "norm", "out_proj")

    def is_layer(self, module: nn.Module) -> bool:
        # By name: importing the class would import the family's modelling code for every model.
        return type(module).__name__ == "Qwen3_5GatedDeltaNet"

    def dimensions(self, module: Any) -> Dimensions:
        return Dimensions(
            module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim, module.conv_kernel_size
        )

    def parts(self, module: Any) -> dict[str, nn.Module | nn.Parameter]:
        return {name: getattr(module, name) for name in self._names}

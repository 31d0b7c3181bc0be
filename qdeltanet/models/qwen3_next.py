"""Qwen3-Next: q, k, v and z are one projection, b and a another, interleaved by key head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import Projected, Wiring
from .family import Adapter


class Qwen3NextWiring(Wiring):
    def project(self, layer: Any, hidden: Tensor) -> Projected:
        """Each key head's rows of in_proj_qkvz hold its q, k, then v and z of its value heads; of in_proj_ba b, then a
        (transformers' `fix_query_key_value_ordering`)."""
        d = layer.dims
        group = d.value_heads // d.key_heads
        grouped = (*hidden.shape[:2], d.key_heads, -1)
        qkvz, ba = layer.in_proj_qkvz(hidden).reshape(grouped), layer.in_proj_ba(hidden).reshape(grouped)
        values = group * d.value_dim
        q, k, v, z = (x.flatten(2) for x in qkvz.split([d.key_dim, d.key_dim, values, values], dim=-1))
        b, a = (x.flatten(2) for x in ba.split(group, dim=-1))
        return Projected(torch.cat((q, k, v), dim=-1), z, b, a)


QWEN3_NEXT = Adapter(
    model_types=("qwen3_next",),
    layer_classes=("Qwen3NextGatedDeltaNet",),
    role_names={
        "proj.qkv": ("in_proj_qkvz",),
        "proj.z": ("in_proj_qkvz",),
        "proj.out": ("out_proj",),
        "proj.a": ("in_proj_ba",),
        "proj.b": ("in_proj_ba",),
    },
    part_names=("in_proj_qkvz", "in_proj_ba", "conv1d", "dt_bias", "A_log", "norm", "out_proj"),
    wiring=Qwen3NextWiring(),
)

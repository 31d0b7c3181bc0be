"""OLMo-hybrid: separate projections, and negative eigenvalues (beta in (0, 2)) where the layer allows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import Projected, Wiring
from .family import Adapter


class OlmoHybridWiring(Wiring):
    norm, out = "o_norm", "o_proj"

    def project(self, layer: Any, hidden: Tensor) -> Projected:
        mixed = torch.cat([layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)], dim=-1)
        return Projected(mixed, layer.g_proj(hidden), layer.b_proj(hidden), layer.a_proj(hidden))


OLMO_HYBRID = Adapter(
    model_types=("olmo_hybrid",),
    layer_classes=("OlmoHybridGatedDeltaNet",),
    role_names={
        "proj.qkv": ("q_proj", "k_proj", "v_proj"),
        "proj.z": ("g_proj",),
        "proj.out": ("o_proj",),
        "proj.a": ("a_proj",),
        "proj.b": ("b_proj",),
    },
    part_names=(
        "q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj", "conv1d", "dt_bias", "A_log", "o_norm", "o_proj",
    ),
    wiring=OlmoHybridWiring(),
)  # fmt: skip

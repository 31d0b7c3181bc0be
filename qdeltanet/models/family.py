"""What qdeltanet has to know about a model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core import QDeltaNetError
from ..delta_rule import Dimensions
from ..nn import Wiring

# Linears of a decoder layer beside its Gated DeltaNet. Of a mixture of experts the shared one: the others are slices of
# 3-D tensors, not modules.
LINEARS = {
    "attn.q": ("self_attn.q_proj",),
    "attn.k": ("self_attn.k_proj",),
    "attn.v": ("self_attn.v_proj",),
    "attn.o": ("self_attn.o_proj",),
    "mlp.gate": ("mlp.gate_proj", "mlp.shared_expert.gate_proj"),
    "mlp.up": ("mlp.up_proj", "mlp.shared_expert.up_proj"),
    "mlp.down": ("mlp.down_proj", "mlp.shared_expert.down_proj"),
}


@dataclass(frozen=True)
class Adapter:
    """A family, in the attribute names that transformers' Gated DeltaNets share; others override the methods.

    model_types: values of `config.model_type`. layer_classes: names of the float layer's class (by name, since
    importing it would import the family's modelling code for every model). role_names: the modules of each role of a
    recipe; a module may stand under several roles, and a layer may lack some. part_names: sub-modules and parameters
    to take over. needs: attributes of the float layer with the only value that the wiring knows. linears: roles of the
    decoder layer's other linears, as paths in it that a layer may lack.
    """

    model_types: tuple[str, ...]
    layer_classes: tuple[str, ...]
    role_names: Mapping[str, tuple[str, ...]]
    part_names: tuple[str, ...]
    wiring: Wiring = field(default_factory=Wiring)
    needs: Mapping[str, Any] = field(default_factory=lambda: {"activation": "silu"})
    linears: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LINEARS)

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is the family's Gated DeltaNet."""
        return type(module).__name__ in self.layer_classes

    def dimensions(self, module: Any) -> Dimensions:
        return Dimensions(
            module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim, module.conv_kernel_size,
            beta_max=2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
        )  # fmt: skip

    def parts(self, module: Any) -> dict[str, nn.Module | nn.Parameter]:
        """Sub-modules and parameters by the names that they keep in the state dict.

        Raises QDeltaNetError for an option of the layer that the wiring does not know.
        """
        for name, known in self.needs.items():
            value = getattr(module, name)
            if value != known:
                raise QDeltaNetError(
                    f"layer {module.layer_idx}: {name} is {value!r}, and only {known!r} is supported in a "
                    f"{type(module).__name__}; leave this model in float"
                )
        return {name: getattr(module, name) for name in self.part_names if hasattr(module, name)}

"""Quantized modules: Gated DeltaNet and its projections."""

from .execution import EXECUTIONS, Execution
from .gated_deltanet import GatedDeltaNet
from .linear import QuantLinear
from .scales import Scales
from .state import pack_state, unpack_state
from .weights import gptq_weight, quantize_weight
from .wiring import Memory, Projected, RuleInputs, Wiring, split_heads

__all__ = [
    "EXECUTIONS",
    "Execution",
    "GatedDeltaNet",
    "Memory",
    "Projected",
    "QuantLinear",
    "RuleInputs",
    "Scales",
    "Wiring",
    "gptq_weight",
    "pack_state",
    "quantize_weight",
    "split_heads",
    "unpack_state",
]

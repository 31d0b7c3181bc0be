"""Quantized modules: Gated DeltaNet and its projections."""

from .execution import EXECUTIONS, Execution
from .gated_deltanet import GatedDeltaNet
from .linear import QuantLinear
from .scales import Scales
from .state import pack_state, unpack_state
from .weights import quantize_weight

__all__ = [
    "EXECUTIONS",
    "Execution",
    "GatedDeltaNet",
    "QuantLinear",
    "Scales",
    "pack_state",
    "quantize_weight",
    "unpack_state",
]

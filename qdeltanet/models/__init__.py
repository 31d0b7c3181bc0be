"""Adapters to model families: the only place that knows transformers' modelling code."""

from .adapters import Adapter, adapter_for, quantize_model
from .fingerprint import model_fingerprint
from .layers import QuantizedLayer, delta_net_layers, quantized_layers, set_execution
from .load import load_model, load_tokenizer

__all__ = [
    "Adapter",
    "QuantizedLayer",
    "adapter_for",
    "delta_net_layers",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "quantize_model",
    "quantized_layers",
    "set_execution",
]

"""Adapters to model families: the only place that knows transformers' modelling code."""

from .adapters import Adapter, adapter_for, delta_net_layers, quantize_model, set_execution
from .fingerprint import model_fingerprint
from .load import load_model, load_tokenizer

__all__ = [
    "Adapter",
    "adapter_for",
    "delta_net_layers",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "quantize_model",
    "set_execution",
]

"""Adapters to model families: the only place that knows transformers' modelling code."""

from .adapters import Adapter, adapter_for, ensure_quantized, quantize_model
from .fingerprint import model_fingerprint, weights_digest
from .layers import QuantizedLayer, delta_net_layers, quantized_layers, set_execution
from .load import load_model, load_tokenizer, vocabulary_size
from .placement import execution_device, materialised
from .stream import StreamedModel

__all__ = [
    "Adapter",
    "QuantizedLayer",
    "StreamedModel",
    "adapter_for",
    "delta_net_layers",
    "ensure_quantized",
    "execution_device",
    "load_model",
    "load_tokenizer",
    "materialised",
    "model_fingerprint",
    "quantize_model",
    "quantized_layers",
    "set_execution",
    "vocabulary_size",
    "weights_digest",
]

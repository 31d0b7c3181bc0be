"""The delta rule as ONNX graphs, and AIMET encodings for them. Needs the package `onnx` (extra `onnx`)."""

from __future__ import annotations

from ...core import QDeltaNetError

try:
    import onnx  # noqa: F401
except ImportError as e:
    raise QDeltaNetError("ONNX export needs the package onnx: pip install 'qdeltanet[onnx]'") from e

from .aimet import export_aimet
from .export import export_onnx
from .runtime import run_in_onnxruntime

__all__ = ["export_aimet", "export_onnx", "run_in_onnxruntime"]

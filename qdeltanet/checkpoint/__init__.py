"""Calibrations and checkpoints on disk."""

from .calibration import Calibration, calibrate_weights, load_calibration, needs_calibration
from .export import export_checkpoint
from .tensors import read_tensors, write_tensors

__all__ = [
    "Calibration",
    "calibrate_weights",
    "export_checkpoint",
    "load_calibration",
    "needs_calibration",
    "read_tensors",
    "write_tensors",
]

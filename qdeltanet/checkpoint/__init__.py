"""Calibrations and checkpoints on disk."""

from .calibration import Calibration, calibrate_weights, load_calibration, needs_calibration
from .compressed_tensors import export_compressed_tensors
from .compressed_tensors_check import check_compressed_tensors
from .export import export_checkpoint
from .foreign_load import is_foreign, load_foreign
from .modelslim import export_modelslim
from .modelslim_check import check_modelslim
from .tensors import read_tensors, write_tensors

__all__ = [
    "Calibration",
    "calibrate_weights",
    "check_compressed_tensors",
    "check_modelslim",
    "export_checkpoint",
    "export_compressed_tensors",
    "export_modelslim",
    "is_foreign",
    "load_calibration",
    "load_foreign",
    "needs_calibration",
    "read_tensors",
    "write_tensors",
]

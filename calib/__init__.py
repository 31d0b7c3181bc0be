"""Calibration: data, observers, and the pass that turns them into scales."""

from .data import load_samples
from .observers import MinMaxObserver, MseObserver, Observer, PercentileObserver, make_observer
from .run import calibrate
from .sensitivity import Sensitivity, sensitivity

__all__ = [
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "Sensitivity",
    "calibrate",
    "load_samples",
    "make_observer",
    "sensitivity",
]

"""Calibration: data, observers, and the pass that turns them into scales."""

from .data import load_samples
from .layerwise import calibrate_layerwise
from .observers import KlObserver, MinMaxObserver, MseObserver, Observer, PercentileObserver, make_observer
from .run import calibrate
from .sensitivity import Sensitivity, sensitivity
from .session import Resume

__all__ = [
    "KlObserver",
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "Resume",
    "Sensitivity",
    "calibrate",
    "calibrate_layerwise",
    "load_samples",
    "make_observer",
    "sensitivity",
]

"""Calibration: data, observers, and the pass that turns them into scales."""

from .data import load_samples
from .observers import MinMaxObserver, Observer, PercentileObserver, make_observer
from .run import calibrate

__all__ = ["MinMaxObserver", "Observer", "PercentileObserver", "calibrate", "load_samples", "make_observer"]

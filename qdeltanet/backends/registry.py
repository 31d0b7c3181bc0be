"""Names to backends, loaded lazily."""

from __future__ import annotations

from collections.abc import Callable

from ..core import Backend, FloatContainers, QDeltaNetError, unknown


def _reference() -> Backend:
    from .reference import ReferenceBackend

    return ReferenceBackend()


def _cpu() -> Backend:
    from .cpu import CpuBackend

    return CpuBackend()


_FACTORIES: dict[str, Callable[[], Backend]] = {"reference": _reference, "cpu": _cpu, "fake": FloatContainers}


def backend_status(name: str) -> tuple[bool, str]:
    """(available, reason). Raises QDeltaNetError for an unknown name, with the nearest ones."""
    if name not in _FACTORIES:
        raise unknown("backend", name, _FACTORIES)
    return True, "runs everywhere torch does"


def backend_names() -> list[str]:
    """All backends that integer execution knows, available or not."""
    return [name for name in _FACTORIES if name != "fake"]


def available_backends() -> list[str]:
    return [name for name in _FACTORIES if backend_status(name)[0]]


def get_backend(name: str) -> Backend:
    """A backend by name. Raises QDeltaNetError if it is unknown or cannot run here (saying why)."""
    available, reason = backend_status(name)
    if not available:
        raise QDeltaNetError(f"backend {name}: {reason}; available: {', '.join(available_backends())}")
    return _FACTORIES[name]()

"""Names to backends, loaded lazily. Entries answer (available, reason)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core import Backend, FloatContainers, QDeltaNetError, unknown


@dataclass(frozen=True)
class Entry:
    """A backend by name: what makes it, whether it can run here and why not, and the device types it takes."""

    make: Callable[[], Backend]
    status: Callable[[], tuple[bool, str]]
    devices: tuple[str, ...]


def _everywhere() -> tuple[bool, str]:
    return True, "runs everywhere torch does"


def _reference() -> Backend:
    from .reference import ReferenceBackend

    return ReferenceBackend()


def _cpu() -> Backend:
    from .cpu import CpuBackend

    return CpuBackend()


def _triton() -> Backend:
    from .triton.backend import TritonBackend

    return TritonBackend()


def _triton_status() -> tuple[bool, str]:
    from .triton import triton_status

    return triton_status()


def _npu() -> Backend:
    from .npu import NpuBackend

    return NpuBackend()


def _npu_status() -> tuple[bool, str]:
    from .npu import npu_status

    return npu_status()


ANY = ("cpu", "cuda", "npu")
_ENTRIES: dict[str, Entry] = {
    "reference": Entry(_reference, _everywhere, ANY),
    "cpu": Entry(_cpu, _everywhere, ("cpu",)),
    "triton": Entry(_triton, _triton_status, ("cuda", "cpu")),  # the CPU under its interpreter
    "npu": Entry(_npu, _npu_status, ("npu", "cpu")),  # the CPU under emulation
    "fake": Entry(FloatContainers, _everywhere, ANY),
}
AUTO = "auto"
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton", "npu": "npu"}


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        raise unknown("backend", name, _ENTRIES)
    return _ENTRIES[name]


def backend_status(name: str) -> tuple[bool, str]:
    """(available, reason). Raises QDeltaNetError for an unknown name, with the nearest ones."""
    return _entry(name).status()


def backend_names() -> list[str]:
    """All backends that integer execution knows, available or not."""
    return [name for name in _ENTRIES if name != "fake"]


def available_backends() -> list[str]:
    return [name for name in _ENTRIES if backend_status(name)[0]]


def get_backend(name: str, device: str = "") -> Backend:
    """A backend by name; `auto` takes the one of the device.

    device: type or name of a device (`cpu`, `cuda:0`); empty for no check. Raises QDeltaNetError if the backend is
    unknown, cannot run here (saying why), or does not take the device.
    """
    kind = device.split(":")[0]
    if name == AUTO:
        name = _BY_DEVICE.get(kind, "cpu")
    entry = _entry(name)
    available, reason = entry.status()
    if not available:
        here = [n for n in backend_names() if backend_status(n)[0]]
        raise QDeltaNetError(f"backend {name}: {reason}; available: {', '.join(here)}")
    if kind and kind not in entry.devices:
        raise QDeltaNetError(
            f"backend {name} runs on {' or '.join(entry.devices)}, not on {device}; "
            f"{kind} has backend {_BY_DEVICE.get(kind, 'reference')}"
        )
    return entry.make()


def check_device(name: str) -> str:
    """`cpu`, `cuda:N` or `npu:N`, if this machine has it. Raises QDeltaNetError that says what it has."""
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise QDeltaNetError(f"device {name!r}: must be cpu, cuda:N or npu:N") from e
    has = {"cpu": 1, "cuda": torch.cuda.device_count(), "npu": _npu_count()}
    here = ["cpu", *(f"{kind}:{i}" for kind in ("cuda", "npu") for i in range(has[kind]))]
    if (device.index or 0) >= has.get(device.type, 0):
        raise QDeltaNetError(f"device {name!r}: not on this machine, which has {', '.join(here)}")
    return name


def _npu_count() -> int:
    module = getattr(torch, "npu", None)
    return int(module.device_count()) if module is not None else 0

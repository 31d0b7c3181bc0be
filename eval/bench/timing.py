"""Verify, then time: alternating calls, medians and spread, and the memory of one call."""

from __future__ import annotations

import ctypes
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..._threads import threads as threads

Call = Callable[[], Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """One comparison. verify says whether ours is right, and by how much; ours and peer do the same work."""

    name: str
    ours: str
    run_ours: Call
    peer: str
    run_peer: Call
    verify: Callable[[], tuple[bool, str]]


@dataclass(frozen=True)
class Settings:
    """rounds: of alternating calls after one warm-up each. device: where the calls run."""

    rounds: int = 7
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """What was measured: medians in ms with the 10th and 90th percentile, ratio = peer / ours, MiB at the peak."""

    case: str
    ours: str
    ours_ms: float
    ours_spread: tuple[float, float]
    peer: str
    peer_ms: float
    peer_spread: tuple[float, float]
    ratio: float
    verified: bool
    how: str
    ours_mib: float
    peer_mib: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_cases(cases: Sequence[Case], settings: Settings, progress: Progress | None = None) -> list[Row]:
    """A row per case; one whose verification fails is reported with verified false and is still timed."""
    rows = []
    for i, case in enumerate(cases):
        with torch.no_grad():
            rows.append(_row(case, settings))
        if progress is not None:
            progress(i + 1, len(cases))
    return rows


def _row(case: Case, settings: Settings) -> Row:
    verified, how = case.verify()
    ours_mib, peer_mib = (peak_mib(run, settings.device) for run in (case.run_ours, case.run_peer))
    ours: list[float] = []
    peer: list[float] = []
    for n in range(settings.rounds + 1):
        for run, times in ((case.run_ours, ours), (case.run_peer, peer)):
            seconds = timed(run, settings.device)
            if n:
                times.append(seconds * 1e3)
    return Row(
        case=case.name,
        ours=case.ours,
        ours_ms=round(quantile(ours, 0.5), 3),
        ours_spread=(round(quantile(ours, 0.1), 3), round(quantile(ours, 0.9), 3)),
        peer=case.peer,
        peer_ms=round(quantile(peer, 0.5), 3),
        peer_spread=(round(quantile(peer, 0.1), 3), round(quantile(peer, 0.9), 3)),
        ratio=round(quantile(peer, 0.5) / quantile(ours, 0.5), 3),
        verified=verified,
        how=how,
        ours_mib=round(ours_mib, 1),
        peer_mib=round(peer_mib, 1),
    )


def timed(run: Call, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    result = run()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del result
    return seconds


def _synchronize(device: str) -> None:
    if not device.startswith("cpu"):
        torch.get_device_module(device.split(":")[0]).synchronize()


def quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_mib(run: Call, device: str = "cpu") -> float:
    """Largest sum of tensors that one call holds at a time, its result included, its inputs not; MiB.

    On the CPU it is counted tensor by tensor: scratch inside of an operator does not show. Elsewhere the allocator
    says.
    """
    if device.startswith("cpu"):
        with LiveTensors() as live:
            result = run()
        del result
        return live.peak / 2**20
    module = torch.get_device_module(device.split(":")[0])
    module.synchronize()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    run()
    module.synchronize()
    return float(module.max_memory_allocated() - before) / 2**20


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages that operators make, until they are freed. peak: the largest sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in _tensors((args, kwargs)):
            self._known.add(x.untyped_storage())  # an input, or counted already
        result = func(*args, **(kwargs or {}))
        for x in _tensors(result):
            self._count(x.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_flatten(tree)[0] if isinstance(x, Tensor))


# -- conditions --------------------------------------------------------------------------------------------------------


def keep_memory() -> bool:
    """Ask glibc to keep what is freed instead of handing it back, for the whole process: no page faults are timed,
    on either side. Returns whether it could."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        return bool(libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False


def machine(device: str) -> str:
    """The processor or accelerator in words."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    if not device.startswith("cpu"):
        return device
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()

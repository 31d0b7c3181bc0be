"""Several processes on one piece of work: which of them this is, what they tell one another, and how they end together.

A launcher (torchrun, `accelerate launch`, mpirun) starts the same command several times and says so in the environment.
What they exchange are plain Python objects over gloo, on any device; the products of a model stay on each one's own.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .core.errors import QDeltaNetError

T = TypeVar("T")
R = TypeVar("R")

# A process that dies closes its connections, which the others see at once. This is for a machine that falls silent, and
# must outlast the difference between a fast machine's work and a slow one's.
TIMEOUT = timedelta(hours=6)
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
FAILED = "qdeltanet/failed"
SILENCE = 2.0  # seconds in which the first process that fails can speak: launchers end all when one of them ends
ONE_PROCESS = (
    "`accelerate launch --cpu` starts one process, however many are asked for; on a CPU, several are started by "
    "`torchrun --nproc-per-node N -m ...` or `accelerate launch --multi_gpu --num_processes N -m ...`"
)


@dataclass(frozen=True)
class Processes:
    """rank: of this process among `world`; local: among those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, on all of them; all have to call it.

        Raises QDeltaNetError if another process is gone.
        """
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[-1]
            raise QDeltaNetError(f"another process ended or fell silent ({reason}); run the same command again") from e
        return found

    def agree(self, value: T) -> T:
        """The first process's value, on all of them."""
        return self.gather(value)[0]

    def share(self, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """work(item) for all items, in order, on every process; each does every world-th of them.

        What each item is must not depend on the number of processes: then the results do not either.
        """
        own = [work(item) for item in items[self.rank :: self.world]]
        parts = self.gather(own)
        return [parts[i % self.world][i // self.world] for i in range(len(items))]

    def device(self, name: str) -> str:
        """This process's own: `cuda` or `cuda:0` is `cuda:<local rank>` where there are several."""
        kind = name.partition(":")[0]  # torch knows npu only where its extension is
        return name if self.world == 1 or kind == "cpu" else f"{kind}:{self.local}"


_current = Processes()


def current() -> Processes:
    """Those that `joined` has brought together around the caller; one alone outside of it."""
    return _current


def launched() -> int:
    """How many processes a launcher says that it started; 1 without one."""
    return _variable(COUNT, 1) if any(os.environ.get(name) for name in RANK) else 1


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that a launcher started, together for a block; alone without a launcher.

    Those behind the first print nothing to stdout. If one fails, the first to fail says so in its message and the job
    ends: the launcher ends the others, and where there is none they find the connection closed and leave silently.
    Raises QDeltaNetError if they do not find one another.
    """
    global _current
    if launched() == 1 or _current.world > 1:
        yield _current
        return
    here, store = _connected()
    _current = here
    try:
        with suppress_output(not here.first):
            yield here
    except Exception as e:
        _leave(here, store, e)
    finally:
        _current = Processes()
    dist.destroy_process_group()


def _connected() -> tuple[Processes, Any]:
    from torch.distributed.rendezvous import rendezvous

    rank, count = _variable(RANK, 0), launched()
    try:
        store, rank, count = next(rendezvous("env://", rank, count, timeout=timedelta(minutes=10)))
        dist.init_process_group("gloo", store=dist.PrefixStore("qdeltanet", store), rank=rank, world_size=count)
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise QDeltaNetError(
            f"process {rank} of {count} did not find the others ({reason}): set MASTER_ADDR to the first one's machine "
            "and MASTER_PORT to a free port there, alike for all"
        ) from e
    return Processes(rank, count, _variable(LOCAL, 0), group), store


def _leave(here: Processes, store: Any, error: Exception) -> None:
    """Raise the reason if this process is the first to fail, else exit: what follows from a failure is no news."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    before = 0
    with suppress(RuntimeError):  # the store went with the process that kept it
        before = store.add(FAILED, 1) - 1
    if before:
        time.sleep(SILENCE)
        _exit_at_once(2)
    get_error_handler().record_exception(error)  # for torchrun's own report, where it asks for one
    atexit.register(_exit_at_once, 2 if isinstance(error, QDeltaNetError) else 1)
    reason = f"process {here.rank} of {here.world}: {error}"
    if isinstance(error, QDeltaNetError):
        raise QDeltaNetError(reason) from error
    raise RuntimeError(reason) from error


def _exit_at_once(code: int) -> None:
    """Not through the interpreter's end, where a broken group may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def suppress_output(yes: bool) -> Iterator[None]:
    """Nothing reaches stdout within the block; stderr stays."""
    if not yes:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def only_one_started() -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes: it starts one, and says nothing (1.15)."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    return launched() == 1 and on_cpu and "MASTER_ADDR" in os.environ


def _variable(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[n]) for n in names if os.environ.get(n)), default)

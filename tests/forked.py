"""Work in forked processes, which may be killed, limited or refused what root may do; torch computes on one thread."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

import torch

from qdeltanet.core import QDeltaNetError

Work = Callable[[], object]


def child(work: Work) -> int:
    """The id of a process that does some work and ends with 0, or 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's other threads are not here
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int, kill: bool = False) -> bool:
    """Wait for the end of a process, which is killed if asked; whether it ended well."""
    if kill:
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


def said_by_child(work: Work) -> str:
    """The message of the QDeltaNetError that some work raised in a process of its own; empty if it raised none."""
    reading, writing = os.pipe()

    def tell() -> None:
        try:
            work()
        except QDeltaNetError as e:
            os.write(writing, str(e).encode())

    well = ended(child(tell))
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    assert well
    return text


def limited(work: Work, size: int = 100) -> Work:
    """No file of the process may grow beyond some bytes: as on a full disk, every writer is told so."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return run


def as_somebody(work: Work) -> Work:
    """Without root's permissions."""

    def run() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        work()

    return run

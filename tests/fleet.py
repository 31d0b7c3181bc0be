"""The command in processes of its own that start at once: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = ["qdeltanet.workflow", "transformers.models.qwen3_5.modeling_qwen3_5", "datasets"]
LIMIT = 200  # seconds that a process may take


def _main(arguments: Sequence[str], variables: Mapping[str, str], log: str, largest_file: int | None) -> None:
    """Runs in the child: the command as a shell would start it, both streams in one file."""
    streams = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(streams, 1)
    os.dup2(streams, 2)
    os.environ.update({"TQDM_DISABLE": "1", **variables})
    sys.argv = ["qdeltanet", *arguments]
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from qdeltanet.cli import main

    main()


@dataclass
class Fleet:
    """Starts processes of the command; every one ends with the fleet. folder: of their output."""

    folder: Path
    processes: list[ForkServerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, *arguments: str, largest_file: int | None = None, **variables: str) -> ForkServerProcess:
        """largest_file: in bytes; writing beyond it fails, as on a full disk."""
        log = str(self.folder / f"log-{len(self.processes)}")
        process = self._context.Process(target=_main, args=(arguments, variables, log, largest_file), name=log)
        process.start()
        self.processes.append(process)
        return process

    def start_group(self, world: int, *arguments: str, largest: Mapping[int, int] | None = None) -> list[Any]:
        """As a launcher does it, but for ending all when one ends. largest: file by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        sizes = largest or {}
        return [
            self.start(*arguments, largest_file=sizes.get(r), RANK=str(r), LOCAL_RANK=str(r), **group)
            for r in range(world)
        ]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def wait(condition: Callable[[], bool], process: Any) -> None:
    """Until it holds, or the process ends."""
    end = time.monotonic() + LIMIT
    while not condition() and process.exitcode is None:
        assert time.monotonic() < end
        time.sleep(0.0005)


def finished(process: Any) -> tuple[int | None, str]:
    """Exit code (negative: of the signal; None: it hangs) and what it said."""
    process.join(LIMIT)
    return process.exitcode, Path(process.name).read_text()


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

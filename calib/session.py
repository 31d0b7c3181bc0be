"""What an interrupted calibration goes on from: exact sums on disk, each file beside the batches that are in it.

A state file holds the watchers of one pass over one set of batches, written by one process. Any choice of files whose
sets do not meet can be merged, in any order, into the state of their union: that is all that resuming does. So a file
may come from a job with more or fewer processes, and one that is lost, or left over, costs time and never a bit.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .._processes import Processes
from ..core import QDeltaNetError
from ..core.files import write_text
from .request import difference, digest
from .state_file import read_state, write_state

REQUEST = "request.json"
SAVE_EVERY = 30.0  # seconds
COST = 20  # a save that takes t seconds is not repeated within COST * t


class Summing(Protocol):
    """What a pass adds up in one decoder layer. The state of all batches is the merge of the states of any parts."""

    def state(self) -> Mapping[str, Any]:
        """CPU tensors, and plain data that JSON holds exactly (integers of any size), by name."""
        ...

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another one saw; associative and commutative to the bit."""
        ...


W = TypeVar("W", bound=Summing)
Watchers = Mapping[int, Summing]  # by layer


@dataclass(frozen=True)
class Resume:
    """Where state is kept (None: nowhere), how often, and whether that of another request may be replaced.

    every: seconds at least between two saves, which are rarer where they take long; 0 saves after each batch.
    """

    folder: Path | None = None
    every: float = SAVE_EVERY
    overwrite: bool = False

    @classmethod
    def beside(cls, output: Path, every: float = SAVE_EVERY, overwrite: bool = False) -> Resume:
        """In `.<name>.calibrating` beside the output `name`."""
        output = output.absolute()
        return cls(output.parent / f".{output.name}.calibrating", every, overwrite)

    def remove(self) -> None:
        """The calibration is written: its state is of no use any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Session:
    """The state of one request, pass by pass. With several processes all of them make the same calls.

    Raises QDeltaNetError if the folder cannot be written, is damaged, or holds the state of another request and may not
    be overwritten; and if the processes have different requests.
    """

    def __init__(self, resume: Resume, request: Mapping[str, Any], processes: Processes | None = None) -> None:
        self.resume, self.request = resume, json.loads(json.dumps(request))
        self.processes = processes or Processes()
        self.key = digest(self.request)
        self._token = uuid.uuid4().hex[:12]  # no two runs write the same file
        self._done: set[int] = set()  # in the watchers of this process
        self._merged: list[Path] = []  # files that a save replaces
        self._due = 0.0
        _check_alike(self.processes.gather(self.request))
        if resume.folder is not None:
            if self.processes.first:
                self._open()
            self.processes.gather(None)
            self._open()  # where machines do not share a file system

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        folder = self._folder
        there = self._request_there(folder / REQUEST)
        if there == self.request:
            return
        if there is not None and any(folder.glob("*.safetensors")) and not self.resume.overwrite:
            raise QDeltaNetError(
                f"{folder} holds the state of another calibration ({difference(there, self.request)}): ask for that "
                "one again to finish it, or pass --overwrite to give it up"
            )
        shutil.rmtree(folder, ignore_errors=True)
        write_text(folder / REQUEST, json.dumps(self.request, indent=1) + "\n")

    def _request_there(self, path: Path) -> dict[str, Any] | None:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as e:
            if self.resume.overwrite:
                return None
            raise QDeltaNetError(f"{path} cannot be read ({e}); pass --overwrite to start anew") from e

    @property
    def _folder(self) -> Path:
        assert self.resume.folder is not None
        return self.resume.folder

    def close(self) -> None:
        """Leave no folder without state behind. Of several processes another one may be about to write there."""
        alone = self.processes.world == 1
        if alone and self.resume.folder is not None and not any(self._folder.glob("*.safetensors")):
            self.resume.remove()

    # -- one pass ------------------------------------------------------------------------------------------------------

    def restore(self, name: str, watchers: Watchers) -> set[int]:
        """Begin a pass with what earlier runs left of it, merged into these watchers (by layer).

        Each file goes to one of the processes that see it. Returns the batches that are done, in any process.
        """
        self._done, self._merged, self._due = set(), [], time.monotonic() + self.resume.every
        if self.resume.folder is None:
            return set()
        owners: dict[str, tuple[int, list[int]]] = {}
        for rank, files in enumerate(self.processes.gather(self._there(name))):
            for file, batches in files.items():
                owners.setdefault(file, (rank, batches))
        chosen = disjoint({file: batches for file, (_, batches) in owners.items()})
        own = [file for file, (rank, _) in owners.items() if rank == self.processes.rank]
        self._take([file for file in own if file in chosen], watchers)
        for file in set(own) - chosen:
            (self._folder / file).unlink(missing_ok=True)
        return {batch for file in chosen for batch in owners[file][1]}

    def _there(self, name: str) -> dict[str, list[int]]:
        """Batches by state file of a pass."""
        for partial in self._folder.glob(f".{name}-*.partial-*"):
            partial.unlink(missing_ok=True)  # of a process that was killed while it wrote
        return {path.name: read_state(path, self.key).batches for path in sorted(self._folder.glob(f"{name}-*"))}

    def _take(self, files: Iterable[str], watchers: Watchers) -> None:
        for file in files:
            path = self._folder / file
            found = read_state(path, self.key)
            for layer, watcher in watchers.items():
                watcher.merge(found.layers[layer])
            self._done |= set(found.batches)
            self._merged.append(path)

    def finished(self, name: str, watchers: Watchers, batch: int) -> None:
        """A batch is in the watchers of this process; saved where that is due."""
        self._done.add(batch)
        if self.resume.folder is None or time.monotonic() < self._due:
            return
        start = time.monotonic()
        self._save(name, watchers)
        now = time.monotonic()
        self._due = now + (max(self.resume.every, COST * (now - start)) if self.resume.every else 0)

    def _save(self, name: str, watchers: Watchers) -> None:
        path = self._folder / f"{name}-{self._token}.safetensors"
        write_state(path, self.key, sorted(self._done), {i: w.state() for i, w in watchers.items()})
        for old in set(self._merged) - {path}:
            old.unlink(missing_ok=True)
        self._merged = [path]

    def whole(self, name: str, watchers: Mapping[int, W], fresh: Callable[[], Mapping[int, W]]) -> Mapping[int, W]:
        """End a pass: watchers that hold every batch of every process. fresh: makes ones that saw nothing.

        Process 0 keeps the whole state, which makes what the others have left of the pass superfluous.
        """
        done = self.processes.gather(sorted(self._done))
        if self.processes.world > 1:
            merged = fresh()
            for layer, watcher in merged.items():
                for state in self.processes.gather(watchers[layer].state()):
                    watcher.merge(state)
            watchers = merged
        if self.resume.folder is not None and self.processes.first:
            self._done = {batch for batches in done for batch in batches}
            self._save(name, watchers)
            self._sweep(name)
        return watchers

    def _sweep(self, name: str) -> None:
        for path in self._folder.glob(f"{name}-*.safetensors"):
            if path not in self._merged:
                with suppress(OSError):
                    path.unlink()


def _check_alike(requests: Sequence[Mapping[str, Any]]) -> None:
    for rank, other in enumerate(requests):
        differs = difference(requests[0], other)
        if differs:
            raise QDeltaNetError(f"processes 0 and {rank} do not compute alike: {differs}")


def disjoint(files: Mapping[str, Sequence[int]]) -> set[str]:
    """Files no two of which share a batch, the fullest first: two runs may have left the same work."""
    chosen: set[str] = set()
    done: set[int] = set()
    for file in sorted(files, key=lambda f: (-len(files[f]), f)):
        if files[file] and done.isdisjoint(files[file]):
            chosen.add(file)
            done |= set(files[file])
    return chosen

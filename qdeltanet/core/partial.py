"""Partial neighbours: what is being written stands beside its target until it takes the target's place in one step.

Each is locked as long as its process lives, so that what a killed one left can be told from what another one writes.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves there stays, and is in nobody's way
    fcntl = None  # type: ignore[assignment]

PARTIAL, OLD = "partial", "old"


def neighbour(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new, empty neighbour that `sweep` spares as long as the descriptor is open. Raises OSError."""
    while True:
        made = _name(path, PARTIAL)
        if folder:
            made.mkdir()
        held = os.open(made, os.O_RDONLY) if folder else os.open(made, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        _lock(held, wait=True)
        with suppress(FileNotFoundError):  # swept before it was locked
            if os.path.samestat(made.stat(), os.fstat(held)):
                return made, held
        os.close(held)


def sweep(path: Path) -> None:
    """Remove what killed processes left beside `path`; what one had moved away and not yet replaced is put back."""
    if not path.parent.is_dir():
        return
    stem = re.sub(r"([*?[])", r"[\1]", path.name)
    for kind in (OLD, PARTIAL):
        for left in path.parent.glob(f".{stem}.{kind}-*"):
            with suppress(OSError):
                held = os.open(left, os.O_RDONLY)
                try:
                    if _lock(held, wait=False):
                        _settle(path, left, put_back=kind == OLD)
                finally:
                    os.close(held)


def _settle(path: Path, left: Path, put_back: bool) -> None:
    if put_back and not path.exists():
        left.rename(path)
    elif left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink()


def replace(path: Path, partial: Path) -> None:
    """The partial directory takes the place of `path`, whose content is then in the partial one, or gone.

    In one step where the system can; else a process that is killed between two leaves what `sweep` mends. Raises
    OSError.
    """
    if not path.exists() or not any(path.iterdir()):
        partial.rename(path)
    elif not exchange(path, partial):
        old, held = _name(path, OLD), os.open(path, os.O_RDONLY)
        try:
            _lock(held, wait=True)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(held)


def exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot (renameat2 is Linux's)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), swap) == 0)


def to_disk(file: Path) -> None:
    """A rename may outlive a power failure that the content behind it does not. Raises OSError, also on a full disk."""
    held = os.open(file, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


def _lock(held: int, wait: bool) -> bool:
    """Whether nobody else holds it; a file system without locks leaves that open, and then it is not ours."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (OSError, AttributeError):
        return False
    return True

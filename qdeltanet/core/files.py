"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import QDeltaNetError


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a directory that holds something, unless it may be overwritten. Raises QDeltaNetError."""
    if path.exists() and not path.is_dir():
        raise QDeltaNetError(f"output {path} is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise QDeltaNetError(f"output directory {path} is not empty; pass --overwrite to replace it")


@contextmanager
def whole_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write into a temporary neighbour; it takes the place of `path` only when the block ends well.

    Raises QDeltaNetError if `path` is not empty and may not be overwritten, or cannot be written.
    """
    check_output(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as e:
        raise QDeltaNetError(f"cannot write to {path.parent}: {e.strerror}") from e
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_file(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written in the end. Raises QDeltaNetError; None is fine."""
    if path is None:
        return
    folder = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not folder.is_dir():
        raise QDeltaNetError(f"cannot write {path}: {folder} is a file, not a folder")
    if path.is_dir():
        raise QDeltaNetError(f"cannot write {path}: it is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise QDeltaNetError(f"cannot write {path}: no permission to write into {folder}")


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step, in UTF-8. Raises QDeltaNetError if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step. Raises QDeltaNetError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as e:
        raise QDeltaNetError(f"cannot write {path}: {e.strerror}") from e
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

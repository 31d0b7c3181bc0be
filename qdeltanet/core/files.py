"""Files and directories appear whole or not at all, whatever ends the process or fills the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import QDeltaNetError
from .partial import neighbour, replace, sweep, to_disk

# What only a write meets; any other error is about writing where it names a path inside of the folder that is written.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, a directory that could not be written, or holds something unless it may be overwritten.

    Puts back what a killed process had moved out of the way. Raises QDeltaNetError.
    """
    if path.name in ("", ".."):
        raise QDeltaNetError(f"output {path}: name a directory that can be made or replaced, e.g. {path / 'output'}")
    with writing(path):
        sweep(_real(path))
        if path.exists() and not path.is_dir():
            raise QDeltaNetError(f"output {path} is a file; name a directory")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise QDeltaNetError(f"output directory {path} is not empty; pass --overwrite to replace it")
        _check_folder(path)


def check_file(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written in the end. Raises QDeltaNetError; None is fine."""
    if path is None:
        return
    with writing(path):
        _check_folder(path)
        if path.is_dir():
            raise QDeltaNetError(f"cannot write {path}: it is a folder; name a file")


def _check_folder(path: Path) -> None:
    folder = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not folder.is_dir():
        raise QDeltaNetError(f"cannot write {path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise QDeltaNetError(f"cannot write {path}: no permission to write into {folder}")


@contextmanager
def whole_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write into a temporary neighbour; it takes the place of `path` only when the block ends well.

    Raises QDeltaNetError if `path` is not empty and may not be overwritten, or cannot be written: also for a full disk
    that any writer met inside of the block.
    """
    check_output(path, overwrite)
    target = _real(path)
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial, held = neighbour(target, folder=True)
    try:
        with writing(path, partial):
            yield partial
            usual = partial.stat().st_mode & 0o666
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(usual)  # safetensors keeps its files from others
                    to_disk(file)
            replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step, in UTF-8. Raises QDeltaNetError if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step. Raises QDeltaNetError if it cannot be written."""
    target = _real(path)
    with writing(path):
        if target.exists() and not target.is_file():  # a device or a pipe is written to, not replaced
            target.write_bytes(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        partial, held = neighbour(target, folder=False)
        try:
            partial.write_bytes(content)
            os.fsync(held)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
            os.close(held)


def _real(path: Path) -> Path:
    """What is replaced is what a link names, not the link."""
    return path.resolve() if path.is_symlink() else path


@contextmanager
def writing(path: Path, below: Path | None = None) -> Iterator[None]:
    """Whatever cannot be written within the block is one line that names `path` and the reason.

    below: the folder that is written; without one every OSError is about writing. Raises QDeltaNetError.
    """
    try:
        yield
    except QDeltaNetError as e:
        if below is None or str(below) not in str(e):
            raise
        raise QDeltaNetError(str(e).replace(str(below), str(path))) from e  # the partial one's name says nothing
    except Exception as e:
        reason = _reason(e, below)
        if reason is None:
            raise
        raise QDeltaNetError(f"cannot write {path}: {reason}") from e


def _reason(error: Exception, below: Path | None) -> str | None:
    """What the system said, if the error is about writing; writers in Rust (safetensors, tokenizers) quote it."""
    if isinstance(error, OSError):
        named = below is not None and str(error.filename or "").startswith(str(below))
        return (error.strerror or str(error)) if below is None or named or error.errno in FULL else None
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(quoted[1])) if quoted and int(quoted[1]) in FULL else None


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

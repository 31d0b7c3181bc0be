"""English text that every Python installation carries: documentation topics and docstrings of the standard library.

A document is one topic, or all docstrings of one source file. The library's text differs between Python versions, so
the held-out part that models are measured on is frozen in `eval/data`; what is held out is decided by name, and stays
out of training under every version.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 16
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "idle_test", "__pycache__"}


def documents() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every document, in an order that does not depend on the file system."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic:{name}", topics[name].strip() + "\n"
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            text = "\n\n".join(docstrings(path))
            if len(text) > 200:
                yield f"module:{relative.with_suffix('').as_posix()}", text + "\n"


def docstrings(path: Path) -> list[str]:
    """All docstrings of a source file in reading order; nothing is imported, a file that does not parse has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text.strip() for text in found if text and text.strip()]


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the held-out part; a hash of the name, the same on every machine."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def split() -> tuple[list[str], list[str]]:
    """The texts to train on and those held out; what occurs in both (a docstring copied between modules) is held out.

    Raises:
        RuntimeError: if this Python carries too little text (some distributions strip docstrings and topics).
    """
    train: list[str] = []
    held_out: list[str] = []
    for name, text in documents():
        (held_out if is_held_out(name) else train).append(text)
    copied = {paragraph for text in held_out for paragraph in text.split("\n\n") if len(paragraph) > 80}
    train = ["\n\n".join(p for p in text.split("\n\n") if p not in copied) for text in train]
    if sum(map(len, train)) < 500_000:
        raise RuntimeError("the standard library of this Python carries less than 500 kB of documentation")
    return train, held_out


def pieces(texts: list[str], size: int) -> list[str]:
    """Cuts texts at line ends into pieces of at most `size` bytes of UTF-8; longer lines are dropped."""
    cut: list[str] = []
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if len((piece + line).encode()) > size:
                cut.append(piece)
                piece = ""
            if len(line.encode()) <= size:
                piece += line
        cut.append(piece)
    return [piece for piece in cut if len(piece.strip()) >= size // 4]

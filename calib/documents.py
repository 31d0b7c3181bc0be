"""The texts of a dataset: local files, directories and hub ids; plain text and conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core import QDeltaNetError

LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SHUFFLE_BUFFER = 10_000

_TEXT = ("text", "content")
_CHATS = ("messages", "conversations")
_KEYS = {"from": "role", "value": "content"}  # how ShareGPT writes a conversation
_ROLES = {"human": "user", "gpt": "assistant"}


class Documents:
    """Iterates over the non-empty texts of a dataset; one use only.

    column: where they stand, known after the first. count: how many there were so far.
    """

    def __init__(self, name: str, tokenizer: Any, column: str | None = None, seed: int | None = None) -> None:
        self.name, self.tokenizer, self.column, self.seed = name, tokenizer, column, seed
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        """Raises QDeltaNetError if the dataset cannot be read or has no text."""
        for number, row in enumerate(_rows(self.name, self.seed), 1):
            if self.column is None:
                self.column = self._find_column(row)
            if self.column not in row:
                raise self._error(f"row {number} has no column {self.column!r}; columns are {', '.join(row)}")
            if text := self._text(row[self.column], number):
                self.count += 1
                yield text
        if not self.count:
            raise self._error("it holds no text")

    def _find_column(self, row: dict[str, Any]) -> str:
        """`text` or `content`, else conversations, else the only column of strings."""
        known = [key for key in _TEXT if key in row and isinstance(row[key], str | None)]
        known += [key for key in _CHATS if isinstance(row.get(key), list)]
        strings = [key for key, value in row.items() if isinstance(value, str | None)]
        if not known and len(strings) > 1:
            raise self._error(f"several columns may hold the text: name one with --text-column ({', '.join(strings)})")
        if not known and not strings:
            raise self._error(f"no text column; columns are {', '.join(row)}")
        return (known + strings)[0]

    def _text(self, value: Any, number: int) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise self._error(f"column {self.column!r} of row {number} holds {type(value).__name__}, not text")
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise self._error(
                f"column {self.column!r} holds conversations and the tokenizer has no chat template; "
                "name a column of text with --text-column"
            )
        try:
            return (
                str(self.tokenizer.apply_chat_template([_message(m) for m in value], tokenize=False)) if value else ""
            )
        except Exception as e:  # a template may raise whatever it likes
            raise self._error(f"the chat template refuses row {number} ({_first_line(e)})") from e

    def _error(self, what: str) -> QDeltaNetError:
        return QDeltaNetError(f"dataset {self.name}: {what}")


def _message(raw: dict[str, Any]) -> dict[str, Any]:
    """As templates want it: no keys that only other rows fill, and ShareGPT's names translated."""
    message = {_KEYS.get(key, key): value for key, value in raw.items() if value is not None}
    return {**message, "role": _ROLES.get(message.get("role", ""), message.get("role"))}


def _rows(name: str, seed: int | None) -> Iterator[dict[str, Any]]:
    """Rows of a local or a streamed hub dataset, with one-line errors."""
    try:
        stream = _stream(name)
        yield from stream if seed is None else stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except (QDeltaNetError, GeneratorExit):
        raise
    except Exception as e:  # datasets, hub and parsers each have their own
        raise QDeltaNetError(f"dataset {name}: cannot be read ({_first_line(e)})") from e


def _stream(name: str) -> Any:
    """An IterableDataset."""
    from datasets import load_dataset

    if Path(name).exists() or Path(name).suffix in (*LOADERS, *COMPRESSED):
        source, config, split = name, "", ""
    else:
        source, config, split = (*name.split(":"), "", "")[:3]
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, split)
    if path.is_file() or (not path.exists() and path.suffix in LOADERS):
        return load_dataset(_loader(name, path), data_files=source, split="train", streaming=True)
    return load_dataset(source, config or None, split=split or "train", streaming=True)


def _loader(name: str, path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if suffix not in LOADERS:
        raise QDeltaNetError(f"dataset {name}: local files end in {', '.join(LOADERS)}")
    if not path.is_file():
        raise QDeltaNetError(f"dataset {name}: no such file")
    if path.stat().st_size == 0:
        raise QDeltaNetError(f"dataset {name}: the file is empty")
    return LOADERS[suffix]


def _saved(path: Path, split: str) -> Any:
    """What `save_to_disk` wrote: a dataset, or several splits of which one is taken."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        wanted = split or (next(iter(found)) if len(found) == 1 else "train")
        if wanted not in found:
            raise QDeltaNetError(f"dataset {path}: no split {wanted!r}; name one as {path}::SPLIT ({', '.join(found)})")
        found = found[wanted]
    return found.to_iterable_dataset()


def _first_line(error: Exception) -> str:
    """The message of another library on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__

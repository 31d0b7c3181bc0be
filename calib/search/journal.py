"""What has been measured so far, on disk after each measurement: a search that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...core import QDeltaNetError
from ...core.files import write_text
from ...recipe import flat

VERSION = 2  # of what is measured and under which names; a request holds it
SHOWN = 40  # characters of a value in a refusal


def digest(content: Any) -> str:
    """sha256 over data as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Journal:
    """Measurements by name. request: all that they depend on; path None keeps nothing.

    Nothing is written before `write` or the first measurement. Raises QDeltaNetError if the file holds another request
    and may not be overwritten, or is damaged, or cannot be written.
    """

    def __init__(self, path: Path | None, request: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self.request = path, dict(request)
        self.measured: dict[str, Any] = {}
        there = None if path is None or not path.exists() else self._read(path, overwrite)
        if there is not None and there["key"] == self.key:
            self.measured = there["measured"]
        elif there is not None and not overwrite:
            raise QDeltaNetError(
                f"{path} is of another search ({_difference(there['request'], self.request)}): pass --overwrite to "
                "replace it, or name another --output"
            )

    @property
    def key(self) -> str:
        return digest(self.request)

    def measure(self, name: str, make: Callable[[], Any]) -> Any:
        """What is recorded under a name, or made (plain data) and recorded now."""
        if name not in self.measured:
            # As it will be read back, so that a resumed search sees the same numbers.
            self.measured[name] = json.loads(json.dumps(make()))
            self.write()
        return self.measured[name]

    def write(self) -> None:
        content = {"key": self.key, "request": self.request, "measured": self.measured}
        if self.path is not None:
            write_text(self.path, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def _read(path: Path, overwrite: bool) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["key"], content["request"], content["measured"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            if overwrite:
                return None
            raise QDeltaNetError(f"{path}: no record of a search ({e}); pass --overwrite to start anew") from e
        return dict(content)


def _difference(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """`settings.keep was 12, is 3`; of long values (hashes) only that they differ."""
    old, new = flat(there), flat(asked)
    found = []
    for key in {**old, **new}:
        was, now = (str(x.get(key)) for x in (old, new))
        if was != now:
            found.append(f"{key} differs" if max(len(was), len(now)) > SHOWN else f"{key} was {was}, is {now}")
    return "; ".join(found)

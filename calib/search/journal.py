"""What has been measured so far, on disk after each measurement: a search that was cut off goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...core import QDeltaNetError
from ...core.files import write_text
from ..request import difference, digest

VERSION = 3  # of what is measured and under which names; a request holds it


class Journal:
    """Measurements by name. request: all that they depend on; path None keeps nothing.

    Nothing is written before `write` or the first measurement. The file is replaced as a whole each time: a thousand
    measurements are 170 kB, milliseconds beside the least of them. Raises QDeltaNetError if the file holds another
    request and may not be overwritten, or is damaged, or cannot be written.
    """

    def __init__(self, path: Path | None, request: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self.request = path, json.loads(json.dumps(request))
        self.measured: dict[str, Any] = {}
        there = None if path is None or not path.exists() else self._read(path, overwrite)
        if there is not None and there["request"] == self.request:
            self.measured = there["measured"]
        elif there is not None and not overwrite:
            raise QDeltaNetError(
                f"{path} is of another search ({difference(there['request'], self.request)}): pass --overwrite to "
                "replace it, or name another --output"
            )

    def measure(self, name: str, make: Callable[[], Any]) -> Any:
        """What is recorded under a name, or made (plain data) and recorded now."""
        if name not in self.measured:
            # As it will be read back, so that a resumed search sees the same numbers.
            self.measured[name] = json.loads(json.dumps(make()))
            self.write()
        return self.measured[name]

    def write(self) -> None:
        content = {"request": self.request, "measured": self.measured}
        if self.path is not None:
            write_text(self.path, json.dumps({"sha256": digest(content), **content}, indent=1) + "\n")

    @staticmethod
    def _read(path: Path, overwrite: bool) -> dict[str, Any] | None:
        """The file's content, None if it is damaged and may be overwritten."""
        why = "it was changed or damaged"
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
            if content.pop("sha256", None) == digest(content):
                return content
        except (OSError, ValueError, TypeError) as e:
            why = str(e)
        if overwrite:
            return None
        raise QDeltaNetError(f"{path}: no record of a search ({why}); pass --overwrite to start anew")

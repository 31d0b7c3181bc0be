"""YAML files that ship by name, or that a user names: recipes and hardware profiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .core import QDeltaNetError, unknown


def read_mapping(
    kind: str, name_or_path: str | Path, shipped: Mapping[str, Path], keys: Iterable[str]
) -> tuple[str, dict[str, Any]]:
    """(file name, content) of a shipped file by name, or of a YAML file. kind: what it holds, for errors.

    Raises QDeltaNetError for an unknown name, with the nearest ones, a file that is missing or not YAML, and content
    that is no mapping (it should have `keys`).
    """
    path = Path(name_or_path)
    if str(name_or_path) in shipped:
        path = shipped[str(name_or_path)]
    elif path.suffix in (".yaml", ".yml") and not path.is_file():
        raise QDeltaNetError(f"{kind} {path}: no such file")
    elif not path.is_file():
        raise unknown(kind, str(name_or_path), shipped)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise QDeltaNetError(f"{path}: not YAML ({str(e).splitlines()[0]}{line})") from e
    if not isinstance(content, dict):
        raise QDeltaNetError(f"{path}: a {kind} is a mapping with keys {', '.join(keys)}")
    return path.name, content

"""A checkpoint directory of another format, opened for checks: its config, headers, and tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..core import QDeltaNetError
from ..core.files import sha256_file
from .folder import INDEX, read_headers
from .foreign import CONFIG_KEY

FLOATS = frozenset({"F32", "F16", "BF16"})
Wanted = Mapping[str, tuple[frozenset[str], tuple[int, ...] | None]]


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """A config whose parts are of other kinds than the format has is damage, too. Raises QDeltaNetError."""
    try:
        yield
    except QDeltaNetError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise QDeltaNetError(f"{path}: damaged config ({type(e).__name__}: {e}); export the model again") from e


class Opened:
    """problems: what is wrong with the files themselves. Raises QDeltaNetError for a directory without a config."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = self.json("config.json")
        if (path / INDEX).is_file():
            names = sorted(set(self.json(INDEX).get("weight_map", {}).values()))
        else:
            names = ["model.safetensors"]
        self.problems = [f"{name} is missing" for name in names if not (path / name).is_file()]
        self.files = [path / name for name in names if (path / name).is_file()]
        self.headers, unreadable = read_headers(self.files)
        self.problems += unreadable.values()
        self.problems += self._digest_problems(set(unreadable))

    def json(self, name: str) -> dict[str, Any]:
        """A file that holds an object. Raises QDeltaNetError."""
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as e:
            raise QDeltaNetError(f"{self.path}: {name} is missing; export the model again") from e
        except ValueError as e:
            raise QDeltaNetError(f"{self.path}: {name} is damaged ({e}); export the model again") from e
        if not isinstance(content, dict):
            raise QDeltaNetError(f"{self.path}: {name} holds no object; export the model again")
        return content

    def tensor(self, name: str) -> Tensor:
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 (not a dict)
                    found: Tensor = opened.get_tensor(name)
                    return found
        raise QDeltaNetError(f"{self.path}: tensor {name} is missing; export the model again")

    def misfits(self, module: str, wanted: Wanted) -> list[str]:
        """How the tensors of a module differ from those wanted, by their last name: dtypes and a shape, None: any."""
        own = {name.rpartition(".")[2]: h for name, h in self.headers.items() if name.rpartition(".")[0] == module}
        problems = [f"missing tensor {module}.{k}" for k in sorted(wanted.keys() - own.keys())]
        problems += [f"unexpected tensor {module}.{k}" for k in sorted(own.keys() - wanted.keys() - {"bias"})]
        for key in sorted(wanted.keys() & own.keys()):
            (dtypes, shape), (own_shape, own_dtype) = wanted[key], own[key]
            if own_dtype not in dtypes:
                problems.append(f"{module}.{key} is {own_dtype}, expected {' or '.join(sorted(dtypes))}")
            if shape is not None and own_shape != shape:
                problems.append(f"{module}.{key} has shape {list(own_shape)}, expected {list(shape)}")
        return problems

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; () where it is missing, which `misfits` says."""
        return self.headers.get(name, ((), ""))[0]

    def _digest_problems(self, unreadable: set[str]) -> list[str]:
        """Of the files that an export of ours lists; those of others have no digests."""
        files = {n: d for n, d in self.config.get(CONFIG_KEY, {}).get("files", {}).items() if n not in unreadable}
        missing = [n for n in files if not (self.path / n).is_file()]
        changed = [n for n, digest in files.items() if n not in missing and sha256_file(self.path / n) != digest]
        gone = [f"{n} is missing" for n in missing if f"{n} is missing" not in self.problems]
        return gone + [f"{n} is not the file that was exported (sha256 differs)" for n in changed]

    def refuse(self, problems: Iterable[str], what: str) -> None:
        """Raises QDeltaNetError that lists every problem of the directory."""
        listed = [*self.problems, *problems]
        if listed:
            raise QDeltaNetError(f"{self.path}: not a whole {what} checkpoint: {'; '.join(listed)}; export it again")

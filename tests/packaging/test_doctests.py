"""Examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import qdeltanet.core
import qdeltanet.inverse

MODULES = [
    name
    for package in (qdeltanet.core, qdeltanet.inverse)
    for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert result.failed == 0, name


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(importlib.import_module(n)).attempted for n in MODULES if n.endswith(("build",))) > 0

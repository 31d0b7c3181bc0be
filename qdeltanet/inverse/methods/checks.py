"""What the builders ask of their options. Each raises QDeltaNetError that names the method, the option and the mend."""

from __future__ import annotations

from collections.abc import Sequence

from ...core import QDeltaNetError


def check_least(method: str, least: int, **options: int) -> None:
    """Whole numbers of at least `least`."""
    for name, value in options.items():
        if not isinstance(value, int) or value < least:
            raise QDeltaNetError(f"{method}: {name} = {value}; it must be at least {least}")


def check_choice(method: str, name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise QDeltaNetError(f"{method}: {name} = {value!r}; choose {' or '.join(choices)}")


def check_block(method: str, name: str, value: int) -> None:
    """A power of two, the size of a block."""
    if not isinstance(value, int) or value < 2 or value & (value - 1):
        raise QDeltaNetError(f"{method}: {name} = {value}; it must be a power of two, at least 2")

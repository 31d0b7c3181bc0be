"""Integer formats: symmetric, narrow, zero point 0."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import QDeltaNetError

MIN_BITS, MAX_BITS = 2, 16


@dataclass(frozen=True, order=True)
class IntFormat:
    """Codes of `bits` bits in [-qmax, qmax].

    >>> IntFormat(8).qmax, IntFormat(4).qmax, IntFormat(16).qmax
    (127, 7, 32639)

    qmax(16) is 32639 rather than 32767, so that the high and the low byte of a code both fit INT8.

    Raises QDeltaNetError if bits is not in 2..16.
    """

    bits: int

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise QDeltaNetError(f"format int{self.bits}: bits must be in {MIN_BITS}..{MAX_BITS}")

    @property
    def qmax(self) -> int:
        return 32639 if self.bits == 16 else 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        return -self.qmax

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @classmethod
    def parse(cls, name: str) -> IntFormat:
        """`"int8"` -> IntFormat(8). Raises QDeltaNetError on anything that is not int2..int16."""
        digits = name[3:] if name.startswith("int") else ""
        if not digits.isdigit():
            raise QDeltaNetError(f"unknown format {name!r}; formats are int{MIN_BITS}..int{MAX_BITS}, or float")
        return cls(int(digits))

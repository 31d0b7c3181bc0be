from __future__ import annotations

import numpy as np
import pytest

from qdeltanet.core import IntFormat, QDeltaNetError


@pytest.mark.parametrize("bits", range(2, 17))
def test_range_is_symmetric_and_narrow(bits: int) -> None:
    fmt = IntFormat(bits)
    assert fmt.qmin == -fmt.qmax
    assert fmt.qmax == (32639 if bits == 16 else 2 ** (bits - 1) - 1)
    assert IntFormat.parse(f"int{bits}") == fmt
    assert fmt.name == f"int{bits}"


def test_both_bytes_of_every_int16_code_fit_int8() -> None:
    codes = np.arange(IntFormat(16).qmin, IntFormat(16).qmax + 1)
    low = (codes + 128) % 256 - 128
    high = (codes - low) // 256
    assert low.min() == -128
    assert low.max() == 127
    assert high.min() == -127
    assert high.max() == 127
    assert (high * 256 + low == codes).all()


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(QDeltaNetError, match=r"bits must be in 2\.\.16"):
        IntFormat(bits)


@pytest.mark.parametrize("name", ["float", "uint8", "int", "int-8", "8", "int8x", ""])
def test_unknown_format_names_are_refused(name: str) -> None:
    with pytest.raises(QDeltaNetError, match=r"int2\.\.int16"):
        IntFormat.parse(name)


def test_parse_refuses_bits_out_of_range() -> None:
    with pytest.raises(QDeltaNetError, match="int17"):
        IntFormat.parse("int17")

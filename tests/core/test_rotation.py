"""The Hadamard rotation against its matrix, and that its bits depend on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdeltanet.core import QDeltaNetError, hadamard, rotate_state


def sylvester(width: int) -> Tensor:
    """float64, normalised."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < width:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H * width**-0.5


@pytest.mark.parametrize("width", [1, 2, 8, 32, 128])
def test_is_sylvesters_matrix(width: int) -> None:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ sylvester(width), rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-13)


def test_integers_are_exact() -> None:
    x = torch.randint(-1000, 1000, (7, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(hadamard(x).double() * 8, (x.double() @ sylvester(64) * 8).round())


def test_bits_do_not_depend_on_batch_or_layout() -> None:
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    whole = hadamard(x)
    assert all(torch.equal(hadamard(x[i, j]), whole[i, j]) for i in range(2) for j in range(9))
    assert torch.equal(hadamard(x.mT.contiguous().mT), whole)


def test_gradient_is_the_rotation_back() -> None:
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, (x,))


def test_state_is_turned_on_both_axes_and_back() -> None:
    S = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = frozenset({"qk", "v"})
    torch.testing.assert_close(rotate_state(S, both), sylvester(8) @ S @ sylvester(16), rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate_state(rotate_state(S, both), both), S, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate_state(S, frozenset({"qk"})), sylvester(8) @ S, rtol=0, atol=1e-13)
    assert rotate_state(S, frozenset()) is S


def test_other_widths_are_refused() -> None:
    with pytest.raises(QDeltaNetError, match="power of two, not 24"):
        hadamard(torch.ones(2, 24))

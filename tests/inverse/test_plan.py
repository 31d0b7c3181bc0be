"""The plan language: counts, depths, masks, names and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeltanet.core import QDeltaNetError
from qdeltanet.inverse import Mask, method_options, plan

COUNTS = [
    ("block_merge", 16, {}, 6, 6),
    ("block_merge", 32, {}, 8, 8),
    ("block_merge", 64, {}, 10, 10),
    ("block_merge", 128, {}, 12, 12),
    ("block_merge", 64, {"radices": [4, 4, 4]}, 10, 8),
    ("block_merge", 64, {"radices": [2, 2, 4, 4]}, 10, 8),
    ("block_merge", 64, {"radices": [8, 4, 2]}, 10, 8),
    ("block_merge", 64, {"radices": [8, 8]}, 10, 7),
    ("block_merge", 64, {"radices": [16, 4]}, 10, 7),
    ("block_merge", 16, {"radices": [16]}, 6, 4),
    ("block_merge", 32, {"radices": [32]}, 8, 5),
    ("block_merge", 64, {"radices": [64]}, 10, 6),
    ("block_merge", 128, {"radices": [128]}, 12, 7),
    ("block_merge", 128, {"radices": [16, 2, 2, 2]}, 12, 10),
    ("neumann", 64, {}, 7, 6),
    ("neumann", 64, {"residual_steps": 1}, 1, 1),
    ("neumann", 64, {"residual_steps": 2}, 3, 3),
    ("neumann", 64, {"residual_steps": 4}, 5, 5),
    ("neumann", 64, {"residual_steps": 16}, 9, 7),
    ("neumann", 64, {"residual_steps": 9}, 8, 7),
    ("neumann", 32, {"order": 4, "residual_steps": 3}, 5, 5),
    ("neumann", 128, {}, 9, 8),
    ("forward_substitution", 64, {}, 62, 62),
    ("identity", 64, {}, 0, 0),
]


@pytest.mark.parametrize(("method", "chunk_size", "options", "matmuls", "depth"), COUNTS)
def test_matmuls_and_depth(method: str, chunk_size: int, options: dict[str, object], matmuls: int, depth: int) -> None:
    p = plan(method, chunk_size, **options)
    assert (p.matmuls, p.depth) == (matmuls, depth)


@given(
    log_inner=st.integers(0, 3),
    log_more=st.integers(1, 3),
    log_copies=st.integers(0, 2),
    band=st.none() | st.integers(1, 9),
    rows=st.none() | st.integers(1, 16),
)
def test_masks(log_inner: int, log_more: int, log_copies: int, band: int | None, rows: int | None) -> None:
    inner = 2**log_inner
    outer = inner * 2**log_more
    size = outer * 2**log_copies
    kept = Mask(inner, outer, band, rows).matrix(size)
    for i in range(size):
        for j in range(size):
            keep = i > j and i // outer == j // outer and i // inner != j // inner
            keep = keep and (band is None or i - j <= band) and (rows is None or i < rows)
            assert bool(kept[i, j]) == keep


@given(log_inner=st.integers(0, 2), log_more=st.integers(1, 3), data=st.data())
def test_ranges_of_masks_leave_out_zeros_only(log_inner: int, log_more: int, data: st.DataObject) -> None:
    inner = 2**log_inner
    outer = inner * 2**log_more
    size = 2 * outer
    mask = Mask(inner, outer)
    kept = mask.matrix(size)
    start = data.draw(st.integers(0, outer - 1))
    stop = data.draw(st.integers(start + 1, outer))
    first, last = mask.columns_of((start, stop))
    assert not kept[start:stop, :first].any()
    assert not kept[start:stop, last:].any()
    first, last = mask.rows_of((start, stop))
    assert not kept[:first, start:stop].any()
    assert not kept[last:, start:stop].any()
    block = mask.matrix(outer)
    (top, bottom), (left, right) = mask.row_range, mask.column_range
    assert block[top:bottom, left:right].sum() == block.sum()


def test_registers_uses_and_text() -> None:
    p = plan("block_merge", 8)
    assert p.registers == ("N4", "L4", "N8")
    assert str(p).splitlines() == [
        "L2 = A masked 1:2",
        "N4 = L2 @ A + A",
        "L4 = N4 @ L2 + N4 + L2",
        "N8 = L4 @ A + A",
        "T = N8 @ L4 + N8 + L4",
    ]
    assert p.uses("A") == {"left", "right", "addend"}  # through its copy L2 also on the left
    assert p.uses("N4") == {"left", "addend"}
    assert p.uses("L4") == {"left", "right", "addend"}
    assert p.uses("T") == set()
    assert p.masks["N8"] == Mask(4, 8)


def test_registers_of_the_published_method() -> None:
    p = plan("neumann", 64)
    assert set(p.registers) == {"T0", "E", "E^2", "E^4", "S4", "S8"}
    assert p.bounded == {"A"}


@pytest.mark.parametrize("options", [{}, {"radices": [4, 4, 4]}, {"radices": [8, 8]}])
def test_bounded_registers_exist(options: dict[str, list[int]]) -> None:
    p = plan("block_merge", 64, **options)
    written = {"A", "T", *p.registers}
    assert p.bounded & written >= {"A", "T", "N64"}
    if not options:
        assert p.bounded >= written


def test_plans_are_equal_by_value_and_hashable() -> None:
    assert plan("block_merge", 64) == plan("block_merge", 64, radices=None)
    assert len({plan("block_merge", 64), plan("block_merge", 64), plan("neumann", 64)}) == 2


@pytest.mark.parametrize(
    ("method", "chunk_size", "options", "message"),
    [
        ("block_merg", 64, {}, r"unknown method 'block_merg'; did you mean block_merge\?"),
        ("newton", 64, {}, r"unknown method 'newton'; (did you mean|known: block_merge)"),
        ("block_merge", 64, {"radixes": [2]}, r"unknown option of block_merge 'radixes'; did you mean radices\?"),
        ("neumann", 64, {"residual_step": 3}, r"option of neumann 'residual_step'; did you mean residual_steps\?"),
        ("forward_substitution", 64, {"order": 3}, r"unknown option of forward_substitution 'order'; known: \(none\)"),
        ("block_merge", 48, {}, r"chunk size 48: must be a power of two \(usual: 16, 32, 64, 128\)"),
        ("block_merge", 0, {}, "chunk size 0"),
        ("block_merge", -64, {}, "chunk size -64"),
        ("block_merge", 64, {"radices": [8, 4]}, r"radices \(8, 4\): need powers of two whose product is .* 64"),
        ("block_merge", 64, {"radices": [1, 64]}, r"radices \(1, 64\)"),
        ("block_merge", 64, {"radices": [3, 21]}, r"radices \(3, 21\)"),
        ("block_merge", 64, {"radices": []}, r"radices \(\)"),
        ("neumann", 64, {"order": 1}, "order = 1; it must be at least 2"),
        ("neumann", 64, {"band": 0}, "band = 0; it must be at least 1"),
        ("neumann", 64, {"residual_steps": 0}, "residual_steps = 0; it must be at least 1"),
    ],
)
def test_wrong_requests_name_the_thing_and_the_mend(
    method: str, chunk_size: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(QDeltaNetError, match=message):
        plan(method, chunk_size, **options)


def test_options_that_are_none_take_the_default() -> None:
    assert plan("neumann", 64, order=None, band=None) == plan("neumann", 64)
    assert method_options("neumann") == {"order", "band", "residual_steps"}
    assert method_options("block_merge") == {"radices"}


def test_masks_are_built_once_per_device() -> None:
    from qdeltanet.inverse.plan import cached_mask

    cpu = torch.device("cpu")
    assert cached_mask(Mask(1, 8), 8, cpu) is cached_mask(Mask(1, 8), 8, cpu)

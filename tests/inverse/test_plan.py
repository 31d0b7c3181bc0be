"""The plan language: counts, depths, masks, names and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeltanet.core import QDeltaNetError
from qdeltanet.inverse import Mask, method_options, plan

COUNTS = [
    ("block_merge", 16, {}, 4, 4),
    ("block_merge", 32, {}, 6, 6),
    ("block_merge", 64, {}, 7, 7),
    ("block_merge", 128, {}, 8, 8),
    ("block_merge", 16, {"radices": [2] * 4}, 6, 6),
    ("block_merge", 128, {"radices": [2] * 7}, 12, 12),
    ("block_merge", 64, {"radices": [64]}, 6, 6),
    ("block_merge", 128, {"radices": [128]}, 7, 7),
    ("block_merge", 64, {"radices": [4, 4, 4]}, 8, 8),
    ("block_merge", 64, {"radices": [2] * 6, "join": "powers"}, 10, 10),
    ("block_merge", 64, {"radices": [4, 4, 4], "join": "powers"}, 10, 8),
    ("block_merge", 64, {"radices": [2, 2, 4, 4], "join": "powers"}, 10, 8),
    ("block_merge", 64, {"radices": [8, 4, 2], "join": "powers"}, 10, 8),
    ("block_merge", 64, {"radices": [8, 8], "join": "powers"}, 10, 7),
    ("block_merge", 64, {"radices": [16, 4], "join": "powers"}, 10, 7),
    ("block_merge", 16, {"radices": [16], "join": "powers"}, 6, 4),
    ("block_merge", 32, {"radices": [32], "join": "powers"}, 8, 5),
    ("block_merge", 64, {"radices": [64], "join": "powers"}, 10, 6),
    ("block_merge", 128, {"radices": [128], "join": "powers"}, 12, 7),
    ("block_merge", 128, {"radices": [16, 2, 2, 2], "join": "powers"}, 12, 10),
    ("neumann", 64, {}, 7, 6),
    ("neumann", 64, {"residual_steps": 1}, 1, 1),
    ("neumann", 64, {"residual_steps": 2}, 3, 3),
    ("neumann", 64, {"residual_steps": 4}, 5, 5),
    ("neumann", 64, {"residual_steps": 16}, 9, 7),
    ("neumann", 64, {"residual_steps": 9}, 8, 7),
    ("neumann", 32, {"order": 4, "residual_steps": 3}, 5, 5),
    ("neumann", 128, {}, 9, 8),
    ("neumann", 128, {"block": 128}, 7, 6),
    ("neumann", 128, {"block": 32}, 11, 10),
    ("neumann", 64, {"residual_sum": "linear"}, 9, 9),
    ("neumann", 64, {"order": 4, "band": "none", "residual_steps": 1}, 2, 2),
    ("truncated_neumann", 64, {}, 1, 1),
    ("truncated_neumann", 64, {"order": 64}, 62, 62),
    ("newton_schulz", 64, {"start": "identity"}, 10, 10),
    ("newton_schulz", 64, {"iterations": 1}, 0, 0),
    ("mixed", 64, {"leaf": 8}, 10, 9),
    ("mixed", 8, {}, 4, 3),
    ("forward_substitution", 64, {}, 0, 62),
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
    column=st.none() | st.integers(0, 7),
    diagonal=st.booleans(),
)
def test_masks(
    log_inner: int,
    log_more: int,
    log_copies: int,
    band: int | None,
    rows: int | None,
    column: int | None,
    diagonal: bool,
) -> None:
    inner = 2**log_inner
    outer = inner * 2**log_more
    size = outer * 2**log_copies
    kept = Mask(inner, outer, band, rows, column, diagonal).matrix(size)
    for i in range(size):
        for j in range(size):
            keep = i > j and i // outer == j // outer and i // inner != j // inner
            keep = keep and (band is None or i - j <= band)
            keep = (keep or (diagonal and i == j)) and (rows is None or i % outer < rows)
            assert bool(kept[i, j]) == (keep and (column is None or j % outer == column))


@given(
    log_inner=st.integers(0, 2),
    log_more=st.integers(0, 3),
    diagonal=st.booleans(),
    one_column=st.booleans(),
    data=st.data(),
)
def test_ranges_of_masks_leave_out_zeros_only(
    log_inner: int, log_more: int, diagonal: bool, one_column: bool, data: st.DataObject
) -> None:
    inner = 2**log_inner
    outer = inner * 2**log_more
    size = 2 * outer
    column = data.draw(st.integers(0, outer - 1)) if one_column else None
    mask = Mask(inner, outer, column=column, diagonal=diagonal)
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
    p = plan("block_merge", 8, radices=[2, 2, 2])
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


def test_eager_joins_multiply_all_of_the_rows() -> None:
    p = plan("block_merge", 16, radices=[4, 4])
    assert str(p).splitlines() == [
        "N4_2 = A masked 1:2",
        "Q4_2 = N4_2 @ A + A",
        "N4_4 = Q4_2 masked 2:4",
        "L4 = N4_4 @ Q4_2 + Q4_2",
        "A16 = A masked 4:16",
        "Q16_4 = L4 @ A16 + A16 + L4",
        "N16_8 = Q16_4 masked 4:8",
        "Q16_8 = N16_8 @ Q16_4 + Q16_4",
        "N16_16 = Q16_8 masked 8:16",
        "T = N16_16 @ Q16_8 + Q16_8",
    ]
    assert p.registers == ("Q4_2", "L4", "Q16_4", "Q16_8")


@pytest.mark.parametrize("join", ["eager", "powers"])
def test_radix_2_is_the_same_under_either_join(join: str) -> None:
    made = plan("block_merge", 64, radices=[2] * 6, join=join)
    assert made.steps == plan("bunch_hopcroft", 64, diagonal="implicit").steps


def test_registers_of_the_published_method() -> None:
    p = plan("neumann", 64)
    assert set(p.registers) == {"T0", "E", "E^2", "E^4", "S4", "S8"}
    assert p.bounded == {"A"}


@pytest.mark.parametrize("radices", [[4, 4, 4], [8, 8], [2, 32]])
def test_bounded_registers_exist(radices: list[int]) -> None:
    p = plan("block_merge", 64, radices=radices, join="powers")
    assert p.bounded & {"A", "T", *p.registers} >= {"A", "T", "N64"}
    assert not p.bounded >= set(p.registers)


@pytest.mark.parametrize("radices", [None, [4, 4, 4], [8, 8], [64], [2] * 6])
def test_every_register_of_eager_joins_is_bounded(radices: list[int] | None) -> None:
    p = plan("block_merge", 64, radices=radices)
    assert p.bounded >= {"A", "T", *p.registers}


def test_plans_are_equal_by_value_and_hashable() -> None:
    assert plan("block_merge", 64) == plan("block_merge", 64, radices=None)
    assert len({plan("block_merge", 64), plan("block_merge", 64), plan("neumann", 64)}) == 2


@pytest.mark.parametrize(
    ("method", "chunk_size", "options", "message"),
    [
        ("block_merg", 64, {}, r"unknown method 'block_merg'; did you mean block_merge\?"),
        ("newton", 64, {}, r"unknown method 'newton'; (did you mean|known: block_merge)"),
        ("block_merge", 64, {"radixes": [2]}, r"unknown option of block_merge 'radixes'; did you mean radices\?"),
        ("neumann", 64, {"residual_step": 3}, r"option of neumann 'residual_step'; did you mean residual_steps or"),
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
        ("neumann", 64, {"band": "all"}, "neumann: band = 'all'; it must be a number of sub-diagonals or none"),
        ("neumann", 64, {"residual_sum": "tree"}, "neumann: residual_sum = 'tree'; choose doubled or linear"),
        ("neumann", 64, {"block": 48}, "neumann: block = 48; it must be a power of two, at least 2"),
        ("truncated_neumann", 64, {"order": 1}, "truncated_neumann: order = 1; it must be at least 2"),
        ("truncated_neumann", 64, {"band": 3}, r"unknown option of truncated_neumann 'band'; known: order"),
        ("newton_schulz", 64, {"start": "zero"}, "newton_schulz: start = 'zero'; choose scaled or identity"),
        ("newton_schulz", 64, {"iterations": 0}, "newton_schulz: iterations = 0; it must be at least 1"),
        ("column_sweep", 64, {"form": "row"}, "column_sweep: form = 'row'; choose vector or matrix"),
        ("block_merge", 64, {"diagonal": "none"}, "block_merge: diagonal = 'none'; choose implicit or explicit"),
        ("bunch_hopcroft", 64, {"diagonal": "none"}, "bunch_hopcroft: diagonal = 'none'; choose implicit or explicit"),
        ("mixed", 64, {"leaf": 12}, "mixed: leaf = 12; it must be a power of two, at least 2"),
    ],
)
def test_wrong_requests_name_the_thing_and_the_mend(
    method: str, chunk_size: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(QDeltaNetError, match=message):
        plan(method, chunk_size, **options)


def test_options_that_are_none_take_the_default() -> None:
    assert plan("neumann", 64, order=None, band=None) == plan("neumann", 64)
    assert method_options("neumann") == {"order", "band", "residual_steps", "residual_sum", "block"}
    assert method_options("block_merge") == {"radices", "join", "diagonal"}


def test_masks_are_built_once_per_device() -> None:
    from qdeltanet.inverse.mask import cached_mask

    cpu = torch.device("cpu")
    assert cached_mask(Mask(1, 8), 8, cpu) is cached_mask(Mask(1, 8), 8, cpu)

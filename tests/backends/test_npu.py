"""Backend `npu` on the emulated operator: exact products, the operator's contract, what it says where it cannot run."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import INTEGER_KINDS, KINDS, Recording, bound_rule, differing, rule_inputs, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeltanet.backends import npu, npu_emulation
from qdeltanet.backends.npu import EMULATE, NpuBackend, npu_status, rounds_like_the_host, smoke
from qdeltanet.core import (
    FLOAT32_EXACT,
    Granularity,
    IntFormat,
    QDeltaNetError,
    RuleScheme,
    Target,
    Term,
    exact_matmul,
    product_bound,
    requantize,
)
from qdeltanet.inverse import plan

PATTERNS = ("random", "max", "minus", "alternating", "zero", "one_hot")
ALL_KINDS = KINDS | INTEGER_KINDS


@pytest.fixture(autouse=True, scope="module")
def _emulation() -> Iterator[None]:
    """The operator while this module runs, gone afterwards: other tests see a machine without it."""
    npu_emulation.register_emulation()
    yield
    assert npu_emulation._library is not None
    npu_emulation._library._destroy()
    npu_emulation._library = None
    npu_status.cache_clear()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    npu_status.cache_clear()
    rounds_like_the_host.cache_clear()
    yield
    npu_status.cache_clear()
    rounds_like_the_host.cache_clear()


def codes(pattern: str, shape: tuple[int, ...], qmax: int, make: torch.Generator) -> Tensor:
    """float32 codes [..., R, C]."""
    if pattern == "random":
        return torch.randint(-qmax, qmax + 1, shape, generator=make).float()
    if pattern == "alternating":
        return torch.where(torch.arange(shape[-1]) % 2 == 0, float(qmax), float(-qmax)).expand(shape).clone()
    if pattern == "one_hot":
        hot = torch.zeros(shape)
        hot[..., 0, -1] = qmax
        hot[..., -1, 0] = -qmax
        return hot
    return torch.full(shape, {"max": qmax, "minus": -qmax, "zero": 0}[pattern]).float()


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


# -- products --------------------------------------------------------------------------------------------------------


@given(
    left=st.integers(2, 16),
    right=st.integers(2, 16),
    k=st.sampled_from([1, 3, 16, 64, 127, 257, 1041]),
    patterns=st.tuples(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS)),
    leads=st.sampled_from(
        [((2, 3), (2, 3)), ((), ()), ((4,), ()), ((), (2, 3)), ((2, 1), (1, 3)), ((2, 1, 3), (5, 1)), ((1,), (1,))]
    ),
    layout=st.sampled_from(["plain", "transposed", "sliced"]),
    container=st.sampled_from([torch.float32, torch.float64, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_products_are_exact(
    left: int,
    right: int,
    k: int,
    patterns: tuple[str, str],
    leads: tuple[tuple[int, ...], tuple[int, ...]],
    layout: str,
    container: torch.dtype,
    seed: int,
) -> None:
    a_fmt, b_fmt = IntFormat(left), IntFormat(right)
    make = torch.Generator().manual_seed(seed)
    a = codes(patterns[0], (*leads[0], 5, k), a_fmt.qmax, make).to(container)
    b = codes(patterns[1], (*leads[1], k, 7), b_fmt.qmax, make).to(container)
    if layout == "transposed":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.zeros(*leads[0], 10, k, dtype=container)
        wide[..., ::2, :] = a
        a, b = wide[..., ::2, :], torch.cat([b, b], -1)[..., :7]
    got = NpuBackend().matmul(a, b, a_fmt.qmax, b_fmt.qmax)
    assert torch.equal(got.long(), exact_matmul(a, b))
    bound = product_bound(k, a_fmt, b_fmt)
    assert got.dtype is (torch.float32 if bound <= FLOAT32_EXACT else torch.int64)


@pytest.mark.parametrize("bits", [(8, 8), (16, 8), (16, 16)])
@pytest.mark.parametrize(
    "leads",
    [
        ((), ()),
        ((2, 1, 3, 1), (1, 2, 1, 2)),
        ((2, 1, 3, 1, 2), (1, 2, 1, 2, 1)),
        ((2, 1, 3, 1, 2), ()),
        ((3,), (2, 1, 2, 1, 3)),
        ((1, 2, 1, 2, 1, 2), (2, 1)),
    ],
)
def test_every_rank(leads: tuple[tuple[int, ...], tuple[int, ...]], bits: tuple[int, int]) -> None:
    make = torch.Generator().manual_seed(len(leads[0]))
    a_max, b_max = IntFormat(bits[0]).qmax, IntFormat(bits[1]).qmax
    a, b = codes("random", (*leads[0], 3, 11), a_max, make), codes("random", (*leads[1], 11, 4), b_max, make)
    got = NpuBackend().matmul(a, b, a_max, b_max)
    assert torch.equal(got.long(), exact_matmul(a, b))
    assert got.shape == exact_matmul(a, b).shape


def test_expanded_and_unit_axes_and_empty_ones() -> None:
    a = codes("random", (1, 1, 4), 127, torch.Generator().manual_seed(0)).expand(3, 1, 4)
    b = codes("random", (4, 1), 127, torch.Generator().manual_seed(1)).mT.contiguous().mT
    assert torch.equal(NpuBackend().matmul(a, b, 127, 127).long(), exact_matmul(a, b))
    for m, k, n in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
        x, y = torch.ones(2, m, k), torch.ones(k, n)
        got = NpuBackend().matmul(x, y, 127, 127)
        assert torch.equal(got.long(), exact_matmul(x, y))


def test_the_longest_axis_reaches_int32_and_no_further() -> None:
    a, b = torch.full((1, 65535), 32639.0), torch.full((65535, 1), -32639.0)
    assert int(NpuBackend().matmul(a, b, 32639, 32639)) == -65535 * 32639**2
    for x, y in ((torch.ones(1, 65536), torch.ones(65536, 1)), (torch.ones(1, 1), torch.ones(1, 65536))):
        with pytest.raises(QDeltaNetError, match="backend npu: an axis of 65536 exceeds 65535; use another backend"):
            NpuBackend().matmul(x, y, 7, 7)


def test_codes_on_the_wrong_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_emulation, "_library", None)
    with pytest.raises(QDeltaNetError, match="the codes are on the CPU; move the model to the NPU, or emulate with"):
        NpuBackend().matmul(torch.ones(1, 1), torch.ones(1, 1), 7, 7)


def test_the_operator_gets_what_its_documentation_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.ops.npu.npu_quant_matmul

    def watched(x1: Tensor, x2: Tensor, scale: Tensor, *, output_dtype: torch.dtype) -> Tensor:
        seen.append((x1, x2, scale, output_dtype))
        result: Tensor = real(x1, x2, scale, output_dtype=output_dtype)
        return result

    monkeypatch.setattr(torch.ops.npu, "npu_quant_matmul", watched)
    NpuBackend().matmul(torch.ones(2, 3, 4).mT, torch.ones(3, 5), 32639, 127)
    assert len(seen) == 2  # INT16 x INT8
    for x1, x2, scale, output_dtype in seen:
        assert x1.dtype is x2.dtype is torch.int8
        assert x1.stride() == (12, 3, 1)
        assert (scale.shape, scale.dtype, output_dtype) == ((1,), torch.float32, torch.int32)


# -- the rule --------------------------------------------------------------------------------------------------------


class OnNpu(Recording):
    """Records on backend `npu`, whatever the registry knows of it."""

    def __init__(self, scheme: RuleScheme, scales: dict[str, Tensor], backend: NpuBackend) -> None:
        super().__init__(scheme, scales, "reference")
        self.backend = backend


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("method", ["block_merge", "neumann"])
def test_the_whole_rule_is_the_reference(method: str, kind: str, bits: int) -> None:
    p = plan(method, 16)
    inputs = rule_inputs(2, 37, 1, 2, 16, 8, seed=bits)
    scheme, scales = bound_rule(inputs, p, bits, ALL_KINDS[kind])
    loud = tuple(3 * x if i == 2 else x for i, x in enumerate(inputs))  # values that saturate static scales
    judge, other = Recording(scheme, scales, "reference"), OnNpu(scheme, scales, NpuBackend())
    expected, state = run(loud, p, judge)  # type: ignore[arg-type]
    got, got_state = run(loud, p, other)  # type: ignore[arg-type]
    assert differing(judge, other) == {}
    assert torch.equal(got, expected)
    assert torch.equal(got_state.codes.long(), state.codes.long())
    assert other.saturated == judge.saturated
    assert bool(judge.saturated) == (ALL_KINDS[kind].scale != "dynamic")


@pytest.mark.parametrize("granularity", [None, *(g for g in Granularity if g is not Granularity.FINEST)])
def test_folded_multipliers_are_those_of_the_definition(granularity: Granularity | None) -> None:
    """And what remains gives the same bits where `double` is float32, as torch_npu has it."""
    make = torch.Generator().manual_seed(0)

    def scale(*shape: int) -> Tensor:
        return torch.rand(shape, generator=make) / 100 + 1e-3

    def acc() -> Tensor:
        return torch.randint(-(2**30), 2**30, (2, 3, 8, 6), generator=make)

    terms = [
        Term(acc(), (scale(3, 8, 1), scale(3, 1, 6), scale(1, 1, 1))),
        Term(acc(), (scale(3, 1, 6), scale(2, 3, 1, 1)), sign=-1),
        Term(acc()[..., :4, 2:], (scale(2, 3, 4, 1),), region=(slice(0, 4), slice(2, 6))),
        Term(acc(), (), sign=-1),
        Term(acc() // 2**10, (scale(1, 1, 1),), coefficient=torch.randint(0, 2**15, (2, 3, 8, 6), generator=make)),
    ]
    outs: list[Tensor | Granularity] = [granularity] if granularity else [scale(3, 8, 1) * 1e6, scale(3, 1, 6) * 1e6]
    for out in outs:
        target = Target(IntFormat(16), out, shape=(2, 3, 8, 6), mask=torch.ones(8, 6).tril())
        expected = requantize(terms, target)
        folded, plain = npu._folded(terms, target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "double", lambda self: self.to(torch.float32))
            got = requantize(folded, plain)
        assert torch.equal(got.codes, expected.codes)
        assert int(got.saturated) == int(expected.saturated)
        whole = NpuBackend().requantize(terms, target)
        assert torch.equal(whole.codes, expected.codes)
        assert torch.equal(whole.scale, expected.scale)
        if not isinstance(out, Granularity):
            assert 0 < int(expected.saturated) < expected.codes.numel()


def test_multipliers_without_float64_would_change_codes() -> None:
    make = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**30), 2**30, (16, 64, 64), generator=make)
    shapes = ((16, 64, 1), (16, 1, 64), (1, 1, 1))
    rows, columns, one = (torch.rand(shape, generator=make) / 100 + 1e-3 for shape in shapes)
    terms = [Term(acc, (rows, columns, one))]
    out = (acc * rows * columns * one).abs().amax(-1, keepdim=True) / 32639
    target = Target(IntFormat(16), out)
    expected = requantize(terms, target).codes
    assert torch.equal(NpuBackend().requantize(terms, target).codes, expected)
    folded, plain = npu._folded(terms, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "double", lambda self: self.to(torch.float32))
        assert not torch.equal(requantize(terms, target).codes, expected)
        assert torch.equal(requantize(folded, plain).codes, expected)


@pytest.mark.parametrize("mode", ["float", "fixed_point"])
def test_a_device_that_rounds_otherwise_requantizes_on_the_host(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(npu, "rounds_like_the_host", lambda device: False)
    monkeypatch.setattr(npu, "_folded", None)
    inputs = rule_inputs(1, 32, 1, 2, 16, 8)
    p = plan("block_merge", 16)
    scheme, scales = bound_rule(inputs, p, 8, ALL_KINDS["per_head" if mode == "float" else mode])
    judge, other = Recording(scheme, scales, "reference"), OnNpu(scheme, scales, NpuBackend())
    run(inputs, p, judge)
    run(inputs, p, other)
    assert differing(judge, other) == {}


def test_rounding_is_tried() -> None:
    assert rounds_like_the_host("cpu")
    assert not rounds_like_the_host("nothing")  # a device that cannot even be reached

    def truncating(*inputs: Tensor) -> list[Tensor]:
        calls.append(inputs)
        results = arithmetic(*inputs)
        return [r.nextafter(torch.zeros(())) for r in results] if len(calls) == 1 else results

    calls: list[tuple[Tensor, ...]] = []
    arithmetic = npu._arithmetic
    rounds_like_the_host.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npu, "_arithmetic", truncating)
        assert not rounds_like_the_host("cpu")


# -- the operator's contract -----------------------------------------------------------------------------------------

ONE = torch.ones(1)
REFUSED: dict[str, tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], str]] = {
    "float codes": (lambda: (torch.ones(2, 3), int8(3, 2), ONE), "x1 must be int8"),
    "wide codes": (lambda: (int8(2, 3), int8(3, 2).short(), ONE), "x2 must be int8"),
    "rank 1": (lambda: (int8(3), int8(3, 2), ONE), "x1 must have 2 to 6 dimensions, got 1"),
    "rank 7": (lambda: (int8(2, 3), int8(1, 1, 1, 1, 1, 3, 2), ONE), "x2 must have 2 to 6 dimensions, got 7"),
    "empty": (lambda: (int8(0, 3), int8(3, 2), ONE), "x1 must not be empty"),
    "contracted": (lambda: (int8(2, 3), int8(4, 2), ONE), "contracted axes of x1 and x2 differ: 3, 4"),
    "batch": (lambda: (int8(2, 2, 3), int8(5, 3, 2), ONE), "the batch shape cannot be broadcast: 2, 5"),
    "long K": (lambda: (int8(1, 65536), int8(65536, 1), ONE), "last axis of x1 must not exceed 65535, got 65536"),
    "long N": (lambda: (int8(1, 2), int8(2, 65536), ONE), "last axis of x2 must not exceed 65535"),
    "long transposed": (lambda: (int8(1, 2), int8(2, 2, 65536)[0].mT, ONE), "x2 must not exceed 65535"),
    "sliced": (lambda: (int8(2, 6)[:, ::2], int8(3, 2), ONE), "x1 may only be transposed in its last two axes"),
    "permuted": (lambda: (int8(2, 4, 3).transpose(0, 1), int8(3, 2), ONE), "x1 may only be transposed"),
    "int64 scale": (lambda: (int8(2, 3), int8(3, 2), ONE.long()), "scale must be float32 or bfloat16 for int32"),
    "float16 scale": (lambda: (int8(2, 3), int8(3, 2), ONE.half()), "scale must be float32 or bfloat16"),
    "scalar scale": (lambda: (int8(2, 3), int8(3, 2), ONE[0]), "scale must have the shape (1,) or (2,), got ()"),
    "batch scale": (lambda: (int8(4, 2, 3), int8(4, 3, 2), torch.ones(4)), "shape (1,) or (2,), got (4,)"),
    "matrix scale": (lambda: (int8(2, 3), int8(3, 2), torch.ones(1, 2)), "shape (1,) or (2,), got (1, 2)"),
    "scaled": (lambda: (int8(2, 3), int8(3, 2), 2 * ONE), "a scale other than 1 is not emulated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_emulation_refuses_what_the_operator_refuses(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(RuntimeError) as error:
        torch.ops.npu.npu_quant_matmul(*arguments(), output_dtype=torch.int32)
    assert message in str(error.value)


@pytest.mark.parametrize("output_dtype", [None, torch.int8, torch.float16, torch.bfloat16])
def test_only_int32_output_is_emulated(output_dtype: torch.dtype | None) -> None:
    with pytest.raises(RuntimeError, match="only output_dtype=torch.int32 is emulated"):
        torch.ops.npu.npu_quant_matmul(int8(2, 3), int8(3, 2), ONE, output_dtype=output_dtype)


@pytest.mark.parametrize("extra", [{"offset": ONE}, {"pertoken_scale": ONE}, {"bias": ONE}, {"group_sizes": [1, 1, 1]}])
def test_other_arguments_are_not_emulated(extra: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match="only x1, x2, scale and output_dtype are emulated"):
        torch.ops.npu.npu_quant_matmul(int8(2, 3), int8(3, 2), ONE, output_dtype=torch.int32, **extra)


@pytest.mark.parametrize("scale", [ONE, torch.ones(4), ONE.bfloat16(), torch.ones(4, dtype=torch.bfloat16)])
def test_the_emulation_multiplies_bytes_exactly(scale: Tensor) -> None:
    for x1, x2 in (
        (int8(2, 3), int8(3, 4)),
        (int8(3, 2).mT, int8(4, 3).mT),
        (int8(5, 1, 2, 3), int8(2, 3, 4)),
        (int8(1, 2, 1, 2, 2, 3), int8(2, 1, 1, 1, 3, 4)),
    ):
        got = torch.ops.npu.npu_quant_matmul(x1, x2, scale, output_dtype=torch.int32)
        assert got.dtype is torch.int32
        assert torch.equal(got.long(), exact_matmul(x1, x2))


def test_registering_again_changes_nothing() -> None:
    before = npu_emulation._library
    npu_emulation.register_emulation()
    assert npu_emulation._library is before
    assert npu_emulation.is_registered()


def test_a_real_operator_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_emulation, "_library", None)
    with pytest.raises(QDeltaNetError, match="the real npu_quant_matmul is loaded"):  # another library has it
        npu_emulation.register_emulation()
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    with pytest.raises(QDeltaNetError, match="unset QDELTANET_EMULATE_NPU"):
        npu_emulation.register_emulation()


# -- what can run here -----------------------------------------------------------------------------------------------


def pretend_installed(monkeypatch: pytest.MonkeyPatch, outcome: object, visible: bool = True) -> None:
    """A torch_npu that is found; importing it raises `outcome` where that is an exception."""

    def load(name: str) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(torch, "get_device_module", lambda name: SimpleNamespace(is_available=lambda: visible))


def test_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_emulation, "_library", None)
    monkeypatch.delenv(EMULATE, raising=False)
    reason = "torch_npu is not installed: pip install qdeltanet[npu] on a machine with CANN"
    assert npu_status() == (False, reason)


def test_emulated() -> None:
    assert npu_status() == (True, "emulated on the CPU: the operator's contract, not hardware")
    assert npu_status.cache_info().misses == 1
    npu_status()
    assert npu_status.cache_info().misses == 1


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_the_emulation(value: str, expected: bool) -> None:
    code = (
        "import os, sys, torch; from qdeltanet.backends.npu import npu_status\n"
        f"os.environ['{EMULATE}'] = '{value}'\n"
        "available, reason = npu_status()\n"
        f"assert available is {expected}, reason\n"
        "assert 'torch_npu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("libhccl.so: cannot open shared object file\nmore"), "libhccl.so: cannot open shared object file"),
        (ImportError(""), "ImportError"),
    ],
)
def test_torch_npu_that_does_not_import(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    pretend_installed(monkeypatch, error)
    assert npu_status() == (False, f"torch_npu does not import: {reason}")


def test_no_npu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, None, visible=False)
    assert npu_status() == (False, "no NPU is visible")


@pytest.mark.parametrize(("same", "where"), [(True, "the device"), (False, "the host")])
def test_an_npu_that_answers(monkeypatch: pytest.MonkeyPatch, same: bool, where: str) -> None:
    pretend_installed(monkeypatch, None)
    tried: list[str] = []
    monkeypatch.setattr(npu, "smoke", tried.append)
    monkeypatch.setattr(npu, "rounds_like_the_host", lambda device: same)
    available, reason = npu_status()
    assert available
    assert reason.startswith(f"npu_quant_matmul; requantizes on {where}")
    assert tried == ["npu"]


def test_a_broken_npu_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, None)  # torch knows no such device here: the smoke call itself fails
    available, reason = npu_status()
    assert not available
    assert reason.startswith("npu_quant_matmul failed its smoke call: ")
    assert "\n" not in reason


def test_smoke_feels_one_wrong_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert smoke("cpu") is None
    real = torch.ops.npu.npu_quant_matmul

    def off_by_one(*args: Tensor, **options: object) -> Tensor:
        result: Tensor = real(*args, **options).clone()
        result.view(-1)[7] += 1
        return result

    monkeypatch.setattr(torch.ops.npu, "npu_quant_matmul", off_by_one)
    assert smoke("cpu") == "npu_quant_matmul gave wrong integers in its smoke call"
    assert npu_status() == (False, "npu_quant_matmul gave wrong integers in its smoke call")


def test_smoke_reports_what_the_operator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Tensor, **options: object) -> Tensor:
        raise RuntimeError("call aclnnQuantMatmulV5 failed, error code is 161002\n[ERROR] and a page more")

    monkeypatch.setattr(torch.ops.npu, "npu_quant_matmul", failing)
    reason = "npu_quant_matmul failed its smoke call: call aclnnQuantMatmulV5 failed, error code is 161002"
    assert npu_status() == (False, reason)


def test_smoke_feels_a_wrong_division(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x)
        high = torch.floor((x + (128 if len(calls) > 1 else 127)) / 256)
        return high, x - 256 * high

    calls: list[Tensor] = []
    monkeypatch.setattr(npu, "split_bytes", late)
    assert smoke("cpu") == "npu_quant_matmul gave wrong integers in its smoke call"

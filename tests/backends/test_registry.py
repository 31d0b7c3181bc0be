"""Looking backends up, and the process-wide switch that the cpu backend borrows."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from qdeltanet.backends import available_backends, backend_status, get_backend
from qdeltanet.backends.cpu import permit_bf16
from qdeltanet.core import QDeltaNetError

MATMUL = torch.backends.mkldnn.matmul


def test_backends_by_name() -> None:
    assert {"reference", "cpu", "fake"} <= set(available_backends())
    for name in available_backends():
        assert get_backend(name).name == name
        assert backend_status(name)[0] is True


@pytest.mark.parametrize(("name", "hint"), [("refrence", "did you mean reference"), ("cppu", "did you mean cpu")])
def test_unknown_backends_come_with_the_nearest(name: str, hint: str) -> None:
    for look_up in (get_backend, backend_status):
        with pytest.raises(QDeltaNetError, match=f"unknown backend '{name}'; {hint}"):
            look_up(name)
    with pytest.raises(QDeltaNetError, match=r"unknown backend 'zzz'; known: .*cpu.*reference"):
        get_backend("zzz")


def test_the_switch_is_put_back() -> None:
    before = MATMUL.fp32_precision
    with permit_bf16():
        assert MATMUL.fp32_precision == "bf16"
        with permit_bf16():
            assert MATMUL.fp32_precision == "bf16"
        assert MATMUL.fp32_precision == "bf16"
    assert MATMUL.fp32_precision == before


def test_the_switch_is_put_back_after_an_exception() -> None:
    before = MATMUL.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), permit_bf16():
        raise RuntimeError("inside")
    assert MATMUL.fp32_precision == before
    with pytest.raises(RuntimeError):  # shapes that do not fit fail inside of the backend
        get_backend("cpu").matmul(torch.ones(1, 2, 3), torch.ones(1, 2, 3), 1, 1)
    assert MATMUL.fp32_precision == before


def test_a_setting_of_the_users_is_kept() -> None:
    before = MATMUL.fp32_precision
    try:
        MATMUL.fp32_precision = "ieee"
        get_backend("cpu").matmul(torch.ones(1, 2, 2), torch.ones(1, 2, 2), 1, 1)
        assert MATMUL.fp32_precision == "ieee"
    finally:
        MATMUL.fp32_precision = before


@pytest.mark.parametrize("backend", ["cpu", "fake"])
def test_a_users_permission_for_bfloat16_changes_no_code(backend: str) -> None:
    make = torch.Generator().manual_seed(0)
    before = MATMUL.fp32_precision
    try:
        MATMUL.fp32_precision = "bf16"
        for left, right, k in ((127, 127, 64), (511, 511, 64), (32639, 7, 16), (2047, 2047, 4)):
            a = torch.randint(-left, left + 1, (64, 64, k), generator=make).float()
            b = torch.randint(-right, right + 1, (64, k, 64), generator=make).float()
            got = get_backend(backend).matmul(a, b, left, right)
            assert torch.equal(got.long(), a.long() @ b.long())
    finally:
        MATMUL.fp32_precision = before


def test_wide_codes_never_meet_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    import qdeltanet.backends.cpu as cpu

    def forbidden() -> None:
        raise AssertionError("the switch was used")

    monkeypatch.setattr(cpu, "permit_bf16", forbidden)
    a = torch.full((1, 2, 2), 257.0)
    assert get_backend("cpu").matmul(a, a, 257, 257)[0, 0, 0] == 2 * 257**2
    long = torch.ones(1, 2, 2048)  # 2048 * 127^2 > 2^24
    get_backend("cpu").matmul(long, long.mT, 127, 127)
    with pytest.raises(AssertionError, match="the switch was used"):
        get_backend("cpu").matmul(a, a, 127, 127)


def test_the_switch_under_threads() -> None:
    """One thread at a time holds it, and the last one out leaves it as it was."""
    before = MATMUL.fp32_precision
    inside, most, wrong = 0, 0, []

    def worker() -> None:
        nonlocal inside, most
        for n in range(20):
            try:
                with permit_bf16():
                    inside += 1
                    most = max(most, inside)
                    if MATMUL.fp32_precision != "bf16":
                        wrong.append(n)
                    time.sleep(0.0005)
                    inside -= 1
                    if n % 5 == 0:
                        raise KeyError
            except KeyError:
                pass

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert most == 1
    assert MATMUL.fp32_precision == before


def test_products_under_threads_are_exact() -> None:
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (8, 32, 32), generator=make).float() for _ in range(2))
    expected = a.long() @ b.long()
    wrong: list[int] = []

    def worker(n: int) -> None:
        for _ in range(20):
            if not torch.equal(get_backend("cpu").matmul(a, b, 127, 127).long(), expected):
                wrong.append(n)

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []

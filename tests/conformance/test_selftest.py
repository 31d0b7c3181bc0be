"""The suite itself: it passes where it should, feels one wrong code, and the command says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qdeltanet.backends import get_backend
from qdeltanet.backends.cpu import CpuBackend
from qdeltanet.cli import app
from qdeltanet.conformance import Case, run_suite, suite
from qdeltanet.conformance.run import compare
from qdeltanet.core import Result, Target, Term

REFERENCE = get_backend("reference")
SOME = [case for case in suite(quick=True) if case.section != "decay"][::7]


class OneWrongCode(CpuBackend):
    """Requantizes one element of every call one code too high."""

    def requantize(self, terms: list[Term], target: Target) -> Result:  # type: ignore[override]
        result = super().requantize(terms, target)
        codes = result.codes.clone()
        codes.view(-1)[-1] += 1
        return Result(codes, result.scale, result.saturated)


class WrongCount(CpuBackend):
    """Right codes, but what it clipped it does not say."""

    def requantize(self, terms: list[Term], target: Target) -> Result:  # type: ignore[override]
        result = super().requantize(terms, target)
        return Result(result.codes, result.scale, 0)


class Breaks(CpuBackend):
    def matmul(self, left: torch.Tensor, right: torch.Tensor, left_max: int, right_max: int) -> torch.Tensor:
        raise RuntimeError("device lost")


def test_the_whole_quick_suite_on_cpu() -> None:
    report = run_suite(get_backend("cpu"), REFERENCE, suite(quick=True))
    assert report.mismatches == 0
    assert report.failures == []
    assert report.cases == len(suite(quick=True)) > 800
    assert report.elements > 10_000_000
    assert sum(s["elements"] for s in report.sections.values()) == report.elements


def test_the_full_suite_covers_every_plan_format_mode_and_chunk_size() -> None:
    names = " ".join(case.name for case in suite())
    for word in ("eager", "neumann", "cayley", "substitution", "radix 4, 8", "C = 16", "C = 64", "C = 128"):
        assert word in names
    for word in ("int4", "int6", "int8", "int12", "int16", "fixed_point", "power_of_two", "dynamic", "finest"):
        assert word in names
    for word in ("all max", "minus ones", "alternating", "zero", "one hot", "random", "mixed formats"):
        assert word in names
    assert len(suite()) > 4 * len(suite(quick=True))


@pytest.mark.parametrize(("backend", "section"), [(OneWrongCode, "inverse"), (WrongCount, "inverse")])
def test_a_fault_in_requantization_is_caught(backend: type[CpuBackend], section: str) -> None:
    report = run_suite(backend(), REFERENCE, SOME)
    assert report.mismatches > 0
    assert report.sections[section]["mismatches"] > 0
    assert report.sections["product"]["mismatches"] == 0
    assert any(failure.startswith(section) for failure in report.failures)


def test_a_backend_that_breaks_is_a_mismatch_with_its_reason() -> None:
    report = run_suite(Breaks(), REFERENCE, SOME[:3])
    assert report.mismatches == 3
    assert "RuntimeError: device lost" in report.failures[0]


def test_comparison_counts_elements() -> None:
    x = torch.arange(6)
    assert compare({"a": x}, {"a": x}) == {}
    assert compare({"a": x}, {"a": x.flip(0)}) == {"a": 6}
    assert compare({"a": x, "b": x[:2]}, {"a": x[:3]}) == {"a": 6, "b": 2}


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "selftest.json"
    done = CliRunner().invoke(
        app, ["selftest", "--backend", "cpu", "--quick", "--match", "cayley", "--json", str(out), "-q"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["mismatches"] == 0
    assert report["cases"] > 50
    assert report["backend"] == "cpu"


def test_the_command_fails_on_a_mismatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qdeltanet.backends.cpu.CpuBackend", OneWrongCode)
    out = tmp_path / "selftest.json"
    done = CliRunner().invoke(app, ["selftest", "--quick", "--match", "cayley, per_head, int8", "--json", str(out)])
    assert done.exit_code == 1
    assert json.loads(out.read_text())["mismatches"] > 0
    assert "inverse, cayley, per_head, int8" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--match", "nothing at all"], "no case contains it"),
        (["--backend", "cpuu"], "did you mean cpu"),
        (["--backend", "cpu", "--device", "cuda:7"], "not on this machine, which has cpu"),
        (["--backend", "cpu", "--device", "tpu"], "must be cpu, cuda:N or npu:N"),
        (["--backend", "npu"], "torch_npu is not installed"),
    ],
)
def test_bad_requests(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["selftest", *arguments])
    assert message in str(done.exception)


def test_cases_are_plain_data() -> None:
    case = SOME[0]
    assert isinstance(case, Case)
    outcome = case.run(REFERENCE, torch.device("cpu"))
    assert all(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in outcome.values())

"""Benchmarks verify before they time, compare side by side, and write what they saw. Times are never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qdeltanet.cli import app
from qdeltanet.eval.bench import Case, Settings, run_cases
from qdeltanet.eval.bench.delta_rule import Size, inputs_of
from qdeltanet.eval.bench.inverse import ut_matrices
from qdeltanet.eval.bench.peers import row_loop, solve_triangular, transformers_rule
from qdeltanet.eval.bench.timing import peak_mib, threads

SMALL = [
    "--tokens",
    "130",
    "--key-heads",
    "1",
    "--value-heads",
    "2",
    "--head-dim",
    "16",
    "--chunk-size",
    "32",
    "--rounds",
    "2",
]
KEYS = {"case", "ours", "ours_ms", "peer", "peer_ms", "ratio", "verified"}


def bench(tmp_path: Path, *arguments: str) -> dict:
    out = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", *arguments, "--json", str(out), "-q"])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


@pytest.mark.parametrize("what", ["inverse", "delta-rule"])
def test_every_row_is_verified_and_says_its_conditions(tmp_path: Path, what: str) -> None:
    result = bench(tmp_path, what, *SMALL)
    assert result["threads"] == 2
    assert result["device"] == "cpu"
    assert result["machine"]
    assert result["allocator"] == "default"
    assert len(result["rows"]) >= 3
    for row in result["rows"]:
        assert row.keys() >= KEYS
        assert row["verified"], row["how"]
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"], rel=0.01)
        assert row["ours_spread"][0] <= row["ours_ms"] <= row["ours_spread"][1]
        assert row["ours_mib"] > 0
    peers = {row["peer"] for row in result["rows"]}
    assert peers >= ({"solve_triangular(I)", "row loop"} if what == "inverse" else {"transformers float32"})


def test_a_model_in_integers_equals_reference(tmp_path: Path) -> None:
    result = bench(
        tmp_path, "model", "tiny-recall", "--recipe", "int4", "--batch", "1", "--tokens", "64", "--rounds", "1"
    )
    (row,) = result["rows"]
    assert row["ours"] == "int4"
    assert row["verified"]
    assert "equal reference" in row["how"]


def test_a_wrong_result_is_reported_and_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeltanet.eval.bench.inverse.TOLERANCE", 0.0)
    out = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "inverse", *SMALL, "--json", str(out)])
    assert done.exit_code == 1
    assert "NOT VERIFIED" in done.output
    assert not json.loads(out.read_text())["rows"][0]["verified"]


def test_calls_alternate_after_verification() -> None:
    calls: list[str] = []

    def verify() -> tuple[bool, str]:
        calls.append("verify")
        return True, ""

    case = Case("x", "ours", lambda: calls.append("ours"), "peer", lambda: calls.append("peer"), verify)
    (row,) = run_cases([case], Settings(rounds=3))
    assert row.verified
    # verification, one call each for memory, then a warm-up and three rounds in turn
    assert calls == ["verify"] + ["ours", "peer"] * 5


def test_memory_counts_live_tensors() -> None:
    x = torch.zeros(2**18)  # 1 MiB, an input: not counted

    def run() -> torch.Tensor:
        y = x + 1
        z = y * 2  # two alive
        del y
        return (z + 1).view(2, -1)[:1]

    assert peak_mib(run) == pytest.approx(2.0)
    assert peak_mib(lambda: x.view(-1).add_(1)) == 0.0


def test_peers_compute_what_they_stand_for() -> None:
    inputs = inputs_of(Size(1, 64, 1, 2, 16, 32), "cpu")
    A = ut_matrices(inputs, 32)
    exact = torch.linalg.inv(torch.eye(32) - A.double())
    assert torch.allclose(row_loop(A.double()), exact, atol=1e-12)
    assert torch.allclose(solve_triangular(A)().double(), exact, atol=1e-5)
    output, _ = transformers_rule()(*inputs, chunk_size=32, use_qk_l2norm_in_kernel=True)
    assert output.shape == (1, 64, 2, 16)


def test_memory_of_the_rule_is_bounded_by_the_block(tmp_path: Path) -> None:
    """Beside its output, a call needs a block's worth, however long the sequence."""
    from qdeltanet.conformance.inputs import run
    from qdeltanet.core import FloatArithmetic
    from qdeltanet.inverse import plan

    p = plan("block_merge", 32)
    beside = []
    for tokens in (512, 2048):
        inputs = inputs_of(Size(1, tokens, 1, 2, 16, 32), "cpu")
        output = tokens * 2 * 16 * 4 / 2**20
        with torch.no_grad():
            beside.append(peak_mib(lambda i=inputs: run(i, p, FloatArithmetic(), chunk_block=4)[0]) - output)
    assert beside[1] == pytest.approx(beside[0], rel=0.02)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key-heads", "3", "--value-heads", "4"], "4 value heads are no multiple of 3 key heads"),
        (["--chunk-size", "48"], "chunk size 48: must be a power of two"),
        (["--device", "cuda:3"], "not on this machine"),
        (["--backend", "gpu"], "unknown backend 'gpu'"),
    ],
)
def test_bad_requests(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "inverse", "--tokens", "64", *arguments])
    assert message in str(done.exception)

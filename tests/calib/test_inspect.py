"""What `inspect` says about a model's matrices is what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qdeltanet.calib.data import Samples
from qdeltanet.calib.inspect import Keeper, capture, energy_by_distance, inspect, losses, power_ranges
from qdeltanet.checkpoint import read_tensors
from qdeltanet.cli import app
from qdeltanet.core import QDeltaNetError
from qdeltanet.delta_rule.laboratory import exact_inverse
from qdeltanet.eval.embedded import model_path
from qdeltanet.inverse.families import FAMILIES, Shape
from qdeltanet.inverse.family_files import check_matrices
from qdeltanet.models import load_model, quantize_model
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import samples_for


def recall(samples: int = 8) -> Samples:
    return samples_for("tiny-recall", None, samples, None)


def tiny_recall():
    from qdeltanet.eval.embedded import model_path

    return load_model(model_path("tiny-recall"))


def test_captured_matrices_are_those_of_a_delta_rule() -> None:
    captures = capture(tiny_recall(), recall(), keep=64)
    assert list(captures) == [0, 1]
    for c in captures.values():
        assert c.A.shape == (4, 16, 64, 64)  # 8 sequences of 2 chunks
        assert c.seen == 16
        assert torch.equal(check_matrices(c.A), c.A)
        assert 0.2 < float(c.A.abs().max()) <= c.limit + 1e-6
        assert float(exact_inverse(c.A).tril(-1).abs().max()) <= c.limit + 1e-6


def test_memory_is_bounded_and_the_choice_is_the_same_for_every_batch_size() -> None:
    one = capture(tiny_recall(), recall(), keep=5, batch_size=8, layer=1)
    other = capture(tiny_recall(), recall(), keep=5, batch_size=3, layer=1)
    assert list(one) == [1]
    assert one[1].A.shape == (4, 5, 64, 64)
    assert one[1].seen == other[1].seen == 16
    # the same chunks; float32 sums of another batch differ in the last place
    assert torch.allclose(one[1].A, other[1].A, atol=1e-5)


def test_a_quantized_model_is_inspected_with_its_own_chunk_size() -> None:
    model = load_model(model_path("tiny-recall"))
    quantize_model(model, load_recipe("int8"))
    data = samples_for("tiny-recall", None, 2, 64)
    assert capture(model, data, chunk_size=64)[0].A.shape[-1] == 64
    with pytest.raises(QDeltaNetError, match="chunk size 32: the model is quantized with 64"):
        capture(model, data, chunk_size=32)


def test_keeper_keeps_some_of_all() -> None:
    keeper = Keeper(4)
    for n in range(25):
        keeper.site("q", torch.full((1, 1, 1, 2, 2), -1.0), False)
        keeper.site("A", torch.full((2, 2, 1, 2, 2), float(n)), False)
    assert keeper.seen == 100
    kept = [float(x[0, 0, 0]) for x in keeper.kept]
    assert len(kept) == 4
    assert -1.0 not in kept
    assert max(kept) > 0  # not merely the first ones


def test_power_ranges_are_those_of_the_powers() -> None:
    A = FAMILIES["correlated"].matrices(Shape(2, 3, 16))
    found = power_ranges(A)
    assert list(found) == [1, 2, 4, 8]
    for n, tops in found.items():
        expected = torch.linalg.matrix_power(A, n).abs().amax((1, 2, 3))
        assert tops == pytest.approx(expected.tolist())


def test_energy_adds_up_and_lies_where_it_should() -> None:
    T = torch.eye(32).double().repeat(2, 1, 1, 1)
    T[0, 0, 3, 2] = 2.0  # distance 1: 4 of 5
    T[0, 0, 31, 0] = 1.0
    found = energy_by_distance(T)
    assert {name: shares[0] for name, shares in found.items()} == {
        "1": 0.8, "2-3": 0, "4-7": 0, "8-15": 0, "16+": 0.2,
    }  # fmt: skip
    assert all(shares[1] == 0 for shares in found.values())  # T = I
    some = energy_by_distance(exact_inverse(FAMILIES["silu"].matrices(Shape(1, 4, 64))))
    assert sum(shares[0] for shares in some.values()) == pytest.approx(1)


def test_report_has_every_head_and_is_json() -> None:
    captures = capture(tiny_recall(), recall(), layer=1)
    report = inspect(captures)
    heads = report["1"]["heads"]
    assert len(heads) == 4
    assert list(heads[0]["powers"]) == ["1", "2", "4", "8", "16", "32"]
    worst = torch.linalg.cond(exact_inverse(captures[1].A)).amax(1)
    assert [h["condition"] for h in heads] == pytest.approx(worst.tolist())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    hard, easy = max(heads, key=lambda h: h["condition"]), min(heads, key=lambda h: h["condition"])
    assert hard["powers"]["8"] > 1e4 * easy["powers"]["8"]
    # a head that remembers: the default keeps T to its step, the published method and its truncation do not
    assert hard["loss"]["default"]["int8"] < 0.05
    assert hard["loss"]["neumann"]["int8"] > 1
    assert hard["loss"]["truncated"]["int8"] > 0.1


def test_losses_are_none_where_T_overflows() -> None:
    from qdeltanet.calib.inspect import Capture

    steep = -(1e30 * torch.ones(64, 64, dtype=torch.float64)).tril(-1).expand(1, 2, 64, 64)
    found = losses(Capture(steep, 2, 1.0))
    assert found["neumann"]["int8"] == [None]


def test_command_writes_what_bench_stability_reads(tmp_path: Path) -> None:
    json_file, matrices = tmp_path / "i.json", tmp_path / "A.safetensors"
    arguments = [
        "inspect",
        "tiny-recall",
        "--samples",
        "4",
        "--json",
        str(json_file),
        "--matrices",
        str(matrices),
        "-q",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "matrices per head: 8 of 8" in done.output
    report = json.loads(json_file.read_text())
    assert report["chunk_size"] == 64
    assert set(report["layers"]) == {"0", "1"}
    assert {name: x.shape for name, x in read_tensors(matrices).items()} == {
        "layers.0": (4, 8, 64, 64),
        "layers.1": (4, 8, 64, 64),
    }
    done = CliRunner().invoke(
        app, ["bench", "stability", "--matrices", str(matrices), "--method", "block_merge", "--format", "int8", "-q"]
    )
    assert done.exit_code == 0, done.output
    assert "2 families: A:layers.0, A:layers.1" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "9"], "layer 9 is no Gated DeltaNet; layers are 0, 1"),
        (["--keep", "0"], "keep 0: must be at least 1"),
        (["--batch-size", "0"], "batch size 0: must be at least 1"),
        (["--chunk-size", "48"], "chunk size 48: must be a power of two"),
        (["--dataset", "recal"], "unknown dataset 'recal'; did you mean recall"),
        (["--device", "cuda:9"], "not on this machine"),
    ],
)
def test_bad_requests(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["inspect", "tiny-recall", "--samples", "2", *arguments])
    assert isinstance(done.exception, QDeltaNetError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)

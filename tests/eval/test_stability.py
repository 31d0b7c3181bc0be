"""The stability map: its rows, its table, its files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qdeltanet import cli
from qdeltanet.checkpoint import write_tensors
from qdeltanet.cli import app
from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.bench.stability import FORMATS, METHOD_NAMES, Request, stability
from qdeltanet.eval.bench.stability_table import (
    counted,
    default_ratios,
    figure,
    label,
    matrix_counts,
    ratios,
    worst_ratio,
)
from qdeltanet.inverse import METHODS
from qdeltanet.inverse.families import FAMILIES, UNIFORM, Shape

KEYS = ["method", "options", "default", "family", "format", "chunk_size", "scale", "median", "worst", "worst_to_floor"]
KEYS += ["max_intermediate", "overflow", "theory", "matrices", "saturated"]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return stability(Request(chunk_sizes=(16,), tokens=1024))


def test_every_method_family_and_format_has_a_row(rows: list[dict]) -> None:
    assert all(list(r) == KEYS for r in rows)
    assert {r["method"] for r in rows} == set(METHODS) - {"identity"} == set(METHOD_NAMES)
    assert {r["family"] for r in rows} == {*FAMILIES, UNIFORM.name}
    seen = {(r["method"], json.dumps(r["options"]), r["family"], r["format"]) for r in rows}
    assert len(seen) == len(rows)
    lines = {(r["method"], json.dumps(r["options"])) for r in rows}
    assert len(rows) == len(lines) * (len(FAMILIES) + 1) * len(FORMATS)


def test_rows_are_valid_json_and_sound(rows: list[dict]) -> None:
    assert len(json.loads(json.dumps(rows, allow_nan=False))) == len(rows)
    for r in rows:
        assert (r["worst"] is None) <= r["overflow"]
        assert (r["scale"] is None) == (r["format"] in ("fp64", "fp32", "bf16", "fp16"))
        if r["worst"] is not None:
            assert 0 <= r["median"] <= r["worst"]
            assert r["theory"] is None or r["worst"] <= r["theory"]
    identical = {r["worst"] for r in rows if r["family"] == "orthogonal"}
    assert identical == {0.0}


def test_rows_say_how_many_matrices_and_how_many_clipped_codes(rows: list[dict]) -> None:
    """1024 tokens in chunks of 16 are 64 matrices, half of them measured; methods that go row by row get a quarter."""
    thinned = {"newton_schulz", "column_sweep", "forward_substitution"}
    assert {(r["method"] in thinned, r["matrices"]) for r in rows} == {(False, 32), (True, 8)}
    assert matrix_counts(rows) == "32; newton_schulz, column_sweep, forward_substitution 8"
    assert all(r["saturated"] == 0 for r in rows if r["scale"] in (None, "bound"))
    assert any(r["saturated"] > 0 for r in rows if r["format"] == "int4")


def test_one_method_is_the_default_and_within_twice_the_floor(rows: list[dict]) -> None:
    assert {r["method"] for r in rows if r["default"]} == {"block_merge"}
    assert len({json.dumps(r["options"]) for r in rows if r["default"]}) == 1
    found = default_ratios(rows)
    assert list(found) == ["int16", "int8", "int6", "int4"]
    assert max(found.values()) <= 2
    assert max(found.values()) > 1


def test_the_same_again(rows: list[dict]) -> None:
    again = stability(Request(methods=("neumann",), formats=("int8",), chunk_sizes=(16,), tokens=1024))
    assert again == [r for r in rows if r["method"] == "neumann" and r["format"] == "int8"]


def test_table_takes_the_worst_and_leaves_uniform_out() -> None:
    def row(family: str, ratio: float | None, default: bool = True, number: str = "int8") -> dict:
        options = {"radices": (2, 2, 2, 2), "diagonal": "implicit"}
        return {"method": "block_merge", "options": options, "default": default, "family": family, "format": number,
                "chunk_size": 16, "worst_to_floor": ratio}  # fmt: skip

    rows = [row("iid", 1.5), row("ones", 1.75), row("uniform", 100.0), row("iid", None, False)]
    assert ratios(rows) == {("block_merge", True): {"int8": 1.75}, ("block_merge 2^4", False): {"int8": math.inf}}
    assert default_ratios([*rows, row("iid", 1.9, number="int4")]) == {"int8": 1.75, "int4": 1.9}
    assert counted([rows[2]]) == [rows[2]]
    assert worst_ratio([]) == 0
    assert [figure(x) for x in (1.618, 37.4, 4.2e6, math.inf)] == ["1.62", "37", "4e6", "inf"]


def test_labels_say_what_differs() -> None:
    base = {"order": 3, "band": 3, "residual_steps": 8, "residual_sum": "doubled", "block": 64}

    def of(**options: object) -> str:
        return label({"method": "neumann", "options": base | options})

    assert of() == "neumann"
    assert of(order=4, band=4, residual_steps=3) == "neumann N4 S3"
    assert of(band=5, block=128) == "neumann band=5 block=128"
    assert of(residual_sum="linear") == "neumann linear"
    assert label({"method": "block_merge", "options": {"radices": [16, 2, 2], "diagonal": "implicit"}}) == (
        "block_merge 16,2^2"
    )


# -- the command -------------------------------------------------------------------------------------------------------

QUICK = ["bench", "stability", "-q", "--method", "block_merge", "--chunk-size", "16"]


def test_command_prints_a_table_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    arguments = [*QUICK, "--family", "ones", "--family", "iid", "--format", "int8", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "2 families: ones, iid" in done.output
    assert "matrices measured of a family: 256\n" in done.output
    assert "default method, worst error / floor: int8 1." in done.output
    written = json.loads(out.read_text())
    assert {r["family"] for r in written["rows"]} == {"ones", "iid"}
    assert {"seconds", "versions", "date"} <= set(written)


def files(folder: Path) -> dict[str, Path]:
    good = FAMILIES["iid"].matrices(Shape(2, 4, 16)).float()
    gates = {"m.beta": torch.rand(256, 2), "m.g": -torch.rand(256, 2)}
    made = {
        "matrices": {"x": good, "y": good[0, :3].clone()},
        "diagonal": {"x": good + torch.eye(16)},
        "upper": {"x": good.mT.contiguous()},
        "nan": {"x": good * float("nan")},
        "shape": {"x": torch.zeros(16, 8)},
        "size": {"x": torch.zeros(48, 48)},
        "none": {},
        "gates": gates,
        "alone": {"m.beta": gates["m.beta"]},
        "short": {k: x[:8] for k, x in gates.items()},
    }
    for name, tensors in made.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
    (folder / "damaged.safetensors").write_bytes((folder / "gates.safetensors").read_bytes()[:100])
    return {p.stem: p for p in folder.glob("*.safetensors")}


def test_families_of_files(tmp_path: Path) -> None:
    held = files(tmp_path)
    request = Request(("block_merge",), formats=("int8",), chunk_sizes=(16, 32), matrices=held["matrices"])
    rows = [r for r in stability(request) if r["default"]]
    assert [(r["family"], r["chunk_size"]) for r in rows] == [("matrices:x", 16), ("matrices:y", 16)]
    request = Request(("block_merge",), ("ones",), ("int8",), (16,), gates=held["gates"])
    rows = [r for r in stability(request) if r["default"]]
    assert [r["family"] for r in rows] == ["ones", "m/iid", "m/silu", "m/correlated", "m/repeated"]
    assert all(r["worst_to_floor"] <= 2 for r in rows)


def test_a_limit_holds_for_registers_of_given_matrices(tmp_path: Path) -> None:
    """|A| and |T| are within 1 here, and blocks that are merged are not: A is of no delta rule."""
    A = torch.zeros(1, 2, 16, 16)
    for i, j, value in ((1, 0, 1), (2, 0, 1), (2, 1, -1), (3, 0, 1), (3, 2, 1)):
        A[..., i, j] = value
    path = tmp_path / "given.safetensors"
    write_tensors(path, {"A": A})
    rows = stability(Request(formats=("int16",), chunk_sizes=(16,), matrices=path))
    assert max(r["worst"] for r in rows if r["method"] in ("block_merge", "bunch_hopcroft")) < 1e-3
    bound = [r for r in rows if r["scale"] == "bound"]
    assert {"block_merge", "column_sweep"} <= {r["method"] for r in bound}
    assert sum(r["saturated"] for r in bound) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "newton"], "unknown method 'newton'; did you mean newton_schulz"),
        (["--method", "identity"], "unknown method 'identity'"),
        (["--family", "silo"], "unknown family 'silo'; did you mean silu"),
        (["--format", "int1"], "unknown format 'int1'; did you mean int1"),
        (["--chunk-size", "48"], "chunk size 48: must be a power of two"),
        (["--chunk-size", "8"], "chunk size 8: the map begins at 16"),
        (["--gates", "{missing}"], "missing.safetensors: no such file"),
        (["--matrices", "{damaged}"], "not a safetensors file, or damaged"),
        (["--gates", "{alone}"], "m.g is missing; gates come in pairs"),
        (["--gates", "{matrices}"], "no <name>.beta with <name>.g; tensors are x, y"),
        (["--gates", "{short}"], "m has 8 tokens, fewer than a chunk of 16"),
        (["--matrices", "{diagonal}"], "x: its diagonal is not zero"),
        (["--matrices", "{upper}"], "x: its upper triangle is not zero"),
        (["--matrices", "{nan}"], "x: holds NaN or infinity"),
        (["--matrices", "{shape}"], "x [16, 8] float32: need floating point"),
        (["--matrices", "{size}"], "x: chunk size 48 is no power of two"),
        (["--matrices", "{none}"], "holds no tensor"),
        (["--matrices", "{matrices}", "--chunk-size", "64"], "no matrices of chunk size 64"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    held = files(tmp_path) | {"missing": tmp_path / "missing.safetensors"}
    base = QUICK[:3] if "--chunk-size" in arguments else QUICK
    given = [a.format(**held) for a in arguments]
    monkeypatch.setattr("sys.argv", ["qdeltanet", *base, *given])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("qdeltanet: ")
    assert message in line


def test_bad_requests_raise_before_anything_is_computed() -> None:
    done: list[int] = []
    with pytest.raises(QDeltaNetError):
        stability(Request(families=("iid", "nope")), lambda n, total: done.append(n))
    assert done == []

"""The calibration pass and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdeltanet.calib import calibrate, load_samples
from qdeltanet.calib.data import Samples
from qdeltanet.checkpoint import load_calibration
from qdeltanet.core import NonFiniteError, QDeltaNetError
from qdeltanet.delta_rule import SITES
from qdeltanet.eval.embedded import DATASETS, model_path
from qdeltanet.models import delta_net_layers, load_tokenizer
from qdeltanet.recipe import load_recipe


def samples(n: int = 6, length: int = 100) -> Samples:
    return Samples("random", torch.randint(0, 100, (n, length), generator=torch.Generator().manual_seed(3)), "digest")


def test_report_and_files(random_model, tmp_path):
    model = random_model()
    ticks: list[tuple[int, int]] = []
    calibration = calibrate(
        model, load_recipe("int8"), samples(), model_name="random", batch_size=4, progress=lambda *t: ticks.append(t)
    )
    assert ticks[-1] == (4, 4)  # two passes over two batches
    calibration.save(tmp_path / "cal")
    report = json.loads((tmp_path / "cal" / "calibration.json").read_text())
    sites = report["layers"]["0"]
    assert set(SITES) <= set(sites)
    head = sites["k"]["heads"][0]
    assert head["scale"] == pytest.approx(max(abs(v) for v in head["range"]) / 127, rel=1e-6)
    assert head["sqnr_db"] > 25
    assert head["saturated"] == 0
    assert sites["k"]["heads"][0]["range"][0] < 0 < sites["k"]["heads"][0]["range"][1]
    assert len(sites["q"]["heads"]) == 2  # key heads
    assert len(sites["T"]["heads"]) == 4  # value heads
    again = load_calibration(tmp_path / "cal")
    assert again.recipe.fingerprint == load_recipe("int8").fingerprint
    assert {k: v.tolist() for k, v in again.scales.items()} == {k: v.tolist() for k, v in calibration.scales.items()}


def test_batch_size_does_not_change_scales(random_model):
    scales = [calibrate(random_model(), load_recipe("int8"), samples(), batch_size=b).scales for b in (2, 3)]
    for key, value in scales[0].items():
        torch.testing.assert_close(value, scales[1][key], rtol=1e-5, atol=0)  # float sums over other batch shapes


def test_percentile_scales_are_smaller(random_model):
    full = calibrate(random_model(), load_recipe("int8"), samples()).scales
    cut = calibrate(
        random_model(), load_recipe("int8", ["observer.kind=percentile", "observer.percentile=99"]), samples()
    )
    assert all(bool((cut.scales[k] <= full[k]).all()) for k in full)
    assert float(cut.scales["layers.0.v_new"].sum()) < float(full["layers.0.v_new"].sum())


def test_shared_rescaling_gives_registers_one_scale(random_model):
    model = random_model()
    scales = calibrate(model, load_recipe("neumann-int8", ["inverse.rescale=shared"]), samples()).scales
    registers = [v for k, v in scales.items() if k.startswith("layers.0.inverse.")]
    assert len(registers) > 3
    assert all(torch.equal(r, registers[0]) for r in registers)


def test_power_of_two_scales(random_model):
    scales = calibrate(random_model(), load_recipe("int8", ["requantize=power_of_two"]), samples()).scales
    assert all(bool((torch.frexp(v).mantissa == 0.5).all()) for v in scales.values())


def test_bound_scales_need_no_data(random_model):
    model = random_model()
    scales = calibrate(model, load_recipe("int16"), samples()).scales
    assert scales["layers.0.inverse.Q64_32"].item() == pytest.approx(1 / 32639)


def test_nan_names_layer_and_site(random_model):
    model = random_model()
    model.model.layers[2].linear_attn.in_proj_qkv.weight.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="layer 2, site"):
        calibrate(model, load_recipe("int8"), samples())
    assert all(layer.observe is None for layer in delta_net_layers(model).values())


def test_another_model_is_refused(random_model, tmp_path):
    calibration = calibrate(random_model(), load_recipe("int8"), samples(), model_name="one")
    other = random_model()
    other.model.layers[0].linear_attn.A_log.data += 0.1
    with pytest.raises(QDeltaNetError, match=r"calibration is of model 'one' \(fingerprint"):
        calibration.apply(other)


@pytest.mark.parametrize("damage", ["truncated", "missing", "recipe", "json", "nan"])
def test_damaged_calibrations(random_model, tmp_path, damage):
    path = tmp_path / "cal"
    calibration = calibrate(random_model(), load_recipe("int8"), samples())
    if damage == "nan":
        calibration.scales["layers.0.q"].fill_(float("nan"))
    calibration.save(path)
    tensors, recipe, report = (path / n for n in ("calibration.safetensors", "recipe.yaml", "calibration.json"))
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-40])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "recipe":
        recipe.write_text(recipe.read_text().replace("chunk_size: 64", "chunk_size: 32"))
    elif damage == "json":
        report.write_text(report.read_text()[:100])
    with pytest.raises(QDeltaNetError, match="calibrat"):
        load_calibration(path)


def test_output_is_not_overwritten_unless_asked(random_model, tmp_path):
    calibration = calibrate(random_model(), load_recipe("int8"), samples())
    (tmp_path / "cal").mkdir()
    (tmp_path / "cal" / "mine.txt").write_text("keep")
    with pytest.raises(QDeltaNetError, match="not empty; pass --overwrite"):
        calibration.save(tmp_path / "cal")
    assert (tmp_path / "cal" / "mine.txt").read_text() == "keep"
    calibration.save(tmp_path / "cal", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cal"]


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_path("tiny-hybrid"))


def test_packing_without_padding(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = ["a" * 25, "bb", "cccc", "d" * 7]
    file.write_text("".join(json.dumps({"n": 1, "text": t}) + "\n" for t in lines))
    data = load_samples(str(file), tokenizer, 10, 10)
    eos = tokenizer.eos_token_id
    rows = data.tokens.tolist()
    assert rows[0] == rows[1] == [ord("a")] * 10  # a long document alone
    assert rows[2] == [ord("b")] * 2 + [eos] + [ord("c")] * 4 + [eos] + [ord("d")] * 2  # short ones joined
    assert len(rows) == 3


@pytest.mark.parametrize("suffix", ["txt", "parquet", "jsonl"])
def test_local_formats(tokenizer, tmp_path, suffix):
    from datasets import Dataset

    file = tmp_path / f"data.{suffix}"
    if suffix == "txt":
        file.write_text("hello world\n" * 20)
    elif suffix == "parquet":
        Dataset.from_dict({"content": ["hello world"] * 20}).to_parquet(str(file))
    else:
        file.write_text('{"content": "hello world"}\n' * 20)
    assert load_samples(str(file), tokenizer, 4, 16).tokens.shape == (4, 16)


def test_same_data_same_digest(tokenizer):
    a, b = (load_samples(str(DATASETS["bytes"]), tokenizer, 4, 128) for _ in range(2))
    assert a.digest == b.digest
    assert a.digest != load_samples(str(DATASETS["bytes"]), tokenizer, 5, 128).digest


def test_bad_data(tokenizer, tmp_path):
    cases: list[tuple[str, str, str]] = [
        ("none.jsonl", "", "no such file"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", '{"text": ""}\n', "holds no text"),
        ("numbers.jsonl", '{"n": 1}\n', "no text column; columns are n"),
        ("short.jsonl", '{"text": "ab"}\n', "too short for one sequence of 16"),
        ("bad.jsonl", "{", "dataset"),
    ]
    for name, content, says in cases:
        file = Path(tmp_path / name)
        if name != "none.jsonl":
            file.write_text(content)
        with pytest.raises(QDeltaNetError, match=says):
            load_samples(str(file), tokenizer, 4, 16)
    with pytest.raises(QDeltaNetError, match="no column 'body'; columns are text"):
        load_samples(str(DATASETS["bytes"]), tokenizer, 4, 16, text_column="body")
    with pytest.raises(QDeltaNetError, match="must be at least 1"):
        load_samples(str(DATASETS["bytes"]), tokenizer, 0, 16)

"""The calibration pass and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.checkpoint import load_calibration
from qdeltanet.core import NonFiniteError, QDeltaNetError
from qdeltanet.delta_rule import SITES
from qdeltanet.models import delta_net_layers
from qdeltanet.recipe import load_recipe
from qdeltanet.workflow import is_complete, run_calibration


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


def test_nan_in_a_static_projection_of_the_last_layer_is_named(random_model):
    """Nothing of the rule comes after it."""
    model = random_model()
    model.model.layers[3].mlp.up_proj.weight.data.fill_(float("inf"))
    static = "projections={mlp.*: {weight: int8, activation: int8, scale: calibrated}}"
    with pytest.raises(NonFiniteError, match=r"layer 3, site mlp\.down_proj: NaN or Inf"):
        calibrate(model, load_recipe("int8", [static]), samples())


def test_a_model_that_another_recipe_has_quantized_is_refused(random_model):
    model = random_model()
    calibration = calibrate(model, load_recipe("int8"), samples())
    calibration.apply(model)
    other = calibrate(random_model(), load_recipe("int16"), samples())
    for work in (lambda: calibrate(model, load_recipe("int16"), samples()), lambda: other.apply(model)):
        with pytest.raises(QDeltaNetError, match="quantized already, and its layer 0 is not recipe int16's"):
            work()


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


def test_what_is_complete(tmp_path):
    """The same request, model and data; else what differs."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "' + "k1 v2 k3 " * 60 + '"}\n')
    options = {"model": "tiny-recall", "dataset": str(data), "samples": 2, "seq_len": 64, "text_column": None}
    options |= {"seed": None, "batch_size": 8, "dtype": "float32", "threads": None, "backend": None}
    recipe = load_recipe("int8")
    given = {k: v for k, v in options.items() if k != "model"}
    made = run_calibration("tiny-recall", recipe, **given)
    path = tmp_path / "cal"
    assert not is_complete(path, recipe, options)
    replace(made, report={**made.report, "request": options}).save(path)
    assert is_complete(path, recipe, options)
    for changed, says in (({"samples": 3}, "samples was 2, is 3"), ({"seed": 1}, "seed was None, is 1")):
        with pytest.raises(QDeltaNetError, match=rf"another calibration \({says}\): pass --overwrite"):
            is_complete(path, recipe, {**options, **changed})
    with pytest.raises(QDeltaNetError, match="recipe differs"):
        is_complete(path, load_recipe("int16"), options)
    data.write_text('{"text": "' + "k1 v2 k4 " * 60 + '"}\n')
    with pytest.raises(QDeltaNetError, match=r"\(dataset differs\)"):
        is_complete(path, recipe, options)


def test_a_device_map_changes_no_bit():
    whole, mapped = (
        run_calibration("tiny-recall", load_recipe("int8"), samples=4, device_map=m).scales for m in (None, "auto")
    )
    assert whole.keys() == mapped.keys()
    assert all(torch.equal(whole[key], mapped[key]) for key in whole)
    with pytest.raises(QDeltaNetError, match="leave one of them out"):
        run_calibration("tiny-recall", load_recipe("int8"), device_map="auto", layerwise=True)

"""Layer by layer the calibration is what the ordinary pass makes, to the bit, interrupted or not, in bounded memory."""

from __future__ import annotations

import gc
import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import Fleet, content, finished, wait
from tiny_families import tiny
from torch import nn

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.calib.layerwise import calibrate_layerwise
from qdeltanet.calib.session import Resume
from qdeltanet.checkpoint import Calibration
from qdeltanet.core import NonFiniteError, QDeltaNetError
from qdeltanet.eval.embedded import model_path
from qdeltanet.eval.make_model import make_model
from qdeltanet.models import StreamedModel, load_model
from qdeltanet.recipe import Recipe, load_recipe

HYBRID = model_path("tiny-hybrid")
EVERYTHING = """projections={
  proj.*: {weight: int4, group: 32, activation: int8, scale: calibrated, method: gptq},
  attn.*: {weight: int8, activation: int8, scale: calibrated},
  mlp.*: {weight: int4, activation: float, method: gptq},
}"""
ATTENTION = "projections={attn.*: {weight: int8, activation: int8, scale: calibrated}}"  # the last layer counts, too
RECIPES: dict[str, tuple[str, list[str]]] = {
    "int8": ("int8", []),
    "int4-static": ("int4-static", []),
    "static w8a8": ("w8a8", ["projections.proj.*.scale=calibrated"]),
    "only projections": ("float", ["projections={mlp.*: {weight: int8, activation: int8, scale: calibrated}}"]),
    "dynamic": ("int4", []),
    # The pass that codes attention looks at no Gated DeltaNet, and meets the same activations for all that.
    "decay of the kernels": ("int8", ["decay=exp2", "projections={attn.*: {weight: int4, method: gptq}}"]),
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(*RECIPES[name])


def samples(vocabulary: int = 100, seed: int = 3) -> Samples:
    tokens = torch.randint(2, vocabulary, (5, 70), generator=torch.Generator().manual_seed(seed))
    return Samples("random", tokens, f"digest {seed}")


class Killed(Exception):
    """Stands for the end of the process: nothing is done about it."""


def layerwise(
    folder: Path,
    *,
    path: str = HYBRID,
    recipe: Recipe | None = None,
    stop: int | None = None,
    look: Callable[[], Any] = int,
    **other: Any,
) -> tuple[Calibration, list[int]]:
    """A calibration in three batches that ends after `stop` of them; returns it and all progress above 0.

    look: called after every batch.
    """
    ticks: list[int] = []

    def progress(done: int, total: int) -> None:
        ticks.append(done)
        look()
        if done == stop:
            raise Killed

    options = {"samples": samples(), "batch_size": 2, "threads": 1, "resume": Resume(folder), **other}
    done = calibrate_layerwise(path, recipe or recipe_of("int8"), progress=progress, **options)
    return done, [tick for tick in ticks if tick]


def ordinary(path: str, recipe: Recipe, dtype: str = "float32") -> Calibration:
    return calibrate(load_model(path, dtype), recipe, samples(), batch_size=2, threads=1)


def equal(a: Calibration, b: Calibration) -> bool:
    for mine, other in ((a.scales, b.scales), (a.weights, b.weights)):
        if mine.keys() != other.keys() or not all(torch.equal(mine[k], other[k]) for k in mine):
            return False
    return json.dumps(a.report) == json.dumps(b.report)


@pytest.fixture(scope="module")
def expected() -> Calibration:
    return ordinary(HYBRID, recipe_of("int8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".cal.calibrating"


# -- the same as in one piece ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(folder, name):
    found = layerwise(folder, recipe=recipe_of(name))[0]
    assert equal(found, ordinary(HYBRID, recipe_of(name)))


def test_dtypes(folder):
    found = layerwise(folder, dtype="bfloat16")[0]
    assert equal(found, ordinary(HYBRID, recipe_of("int8"), "bfloat16"))


@pytest.mark.filterwarnings("ignore:the recipe's mlp projections")
@pytest.mark.parametrize("family", ["qwen3_5_multimodal", "qwen3_5_moe", "olmo_hybrid"])
def test_families_with_everything(tmp_path, folder, family):
    """Prefixes, merged experts, merged convolutions; GPTQ's third pass; a last layer that is no Gated DeltaNet."""
    path = str(tmp_path / "model")
    tiny(family).save_pretrained(path, max_shard_size="100KB")
    recipe = load_recipe("int8", [EVERYTHING])
    found = layerwise(folder, path=path, recipe=recipe)[0]
    assert {k.split(".")[1] for k in found.weights} == {"0", "1", "2"}
    assert equal(found, ordinary(path, recipe))


# -- memory ------------------------------------------------------------------------------------------------------------


def real_weights() -> int:
    """Bytes of all parameters in memory."""
    parameters = [x for x in gc.get_objects() if type(x) is nn.Parameter and not x.is_meta]
    return sum(x.numel() * x.element_size() for x in parameters)


def test_memory_does_not_grow_with_depth(tmp_path):
    """At every batch of models with 4 and 8 layers: one layer's weights are there, neither embeddings nor output."""
    peaks = [peak_weights(tmp_path / str(depth), depth) for depth in (4, 8)]
    assert peaks[0] == peaks[1]


def peak_weights(folder: Path, depth: int) -> int:
    """Bytes of weights in memory at any batch; checks them against the largest layer's."""
    make_model(folder / "model", "tiny", 300, layers=depth)
    layers = StreamedModel(str(folder / "model")).model.model.layers
    largest = max(sum(4 * p.numel() for p in layer.parameters()) for layer in layers)
    before, seen = real_weights(), []
    layerwise(
        folder / "state", path=str(folder / "model"), batch_size=5, look=lambda: seen.append(real_weights() - before)
    )
    assert len(seen) == {4: 1 + 6, 8: 1 + 13}[depth]  # two passes of a linear layer, one of attention, not the last
    assert real_weights() == before
    assert max(seen[1:]) == largest
    return max(seen)


def test_scratch_is_two_files_whatever_the_depth(folder):
    with pytest.raises(Killed):
        layerwise(folder, stop=7)
    assert [p.stat().st_size for p in folder.glob("*.bin")] == [5 * 70 * 128 * 4] * 2


# -- interruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        # Of each layer the first pass is kept when it is whole, the second (which hands on) only with its layer.
        ([1, 3, 4, 7], [6, *range(7, 19)]),
        ([2, 6, 10, 16], [12, 15, 16, 17, 18]),
        ([18], [12, 15, 16, 17, 18]),
    ],
)
def test_interrupted_anywhere(expected, folder, stops, left):
    for stop in stops:
        with pytest.raises(Killed):
            layerwise(folder, stop=stop)
    done, ticks = layerwise(folder)
    assert ticks == left
    assert equal(done, expected)
    again, ticks = layerwise(folder)  # everything is there: nothing is run
    assert ticks == [18]
    assert equal(again, expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 5}, "dataset.batch_size was 2, is 5"),
        ({"samples": samples(seed=4)}, "dataset.sha256 was digest 3, is digest 4"),
        ({"threads": 2}, "environment.threads was 1, is 2"),
        ({"dtype": "bfloat16"}, "model.dtype was float32, is bfloat16"),
        ({"recipe": load_recipe("int8", ["observer.kind=mse"])}, "recipe.fingerprint differs"),
    ],
)
def test_a_changed_request_is_refused_unless_it_may_replace(folder, change, says):
    with pytest.raises(Killed):
        layerwise(folder, stop=7)
    with pytest.raises(QDeltaNetError, match="of another calibration") as refused:
        layerwise(folder, **change)
    assert says in str(refused.value)
    assert layerwise(folder)[1][0] == 6  # nothing was lost
    layerwise(folder, resume=Resume(folder, overwrite=True), **change)


def test_the_ordinary_pass_does_not_go_on_from_layers(folder):
    with pytest.raises(Killed):
        layerwise(folder, stop=7)
    with pytest.raises(QDeltaNetError, match="layerwise was True, is None"):
        calibrate(load_model(HYBRID), recipe_of("int8"), samples(), batch_size=2, threads=1, resume=Resume(folder))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("hidden-00001.bin", "hidden-00001.bin is missing or cut off: delete .*.calibrating and give"),
        ("finished-00000.safetensors", "finished-00000.safetensors: damaged"),
        ("layer00001.ranges-*", "ranges-.*: damaged"),
    ],
)
def test_damaged_state(expected, folder, file, says):
    """Layer 0 is finished, layer 1 in its second pass."""
    with pytest.raises(Killed):
        layerwise(folder, stop=10)
    (path,) = folder.glob(file)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(QDeltaNetError, match=says):
        layerwise(folder)
    shutil.rmtree(folder) if file.startswith("hidden") else path.unlink()
    assert equal(layerwise(folder)[0], expected)


def test_another_layers_input_is_not_taken(folder):
    """Layer 2 has begun to write where the input of layer 1 was; then the record of layer 1 is lost."""
    with pytest.raises(Killed):
        layerwise(folder, stop=16, recipe=load_recipe("int8", [ATTENTION]))
    assert sorted(p.name for p in folder.glob("hidden-*")) == ["hidden-00002.bin", "hidden-00003.bin"]
    (folder / "finished-00001.safetensors").unlink()
    with pytest.raises(QDeltaNetError, match="hidden-00001.bin is missing"):
        layerwise(folder, recipe=load_recipe("int8", [ATTENTION]))


def test_a_full_disk_is_seen_before_the_work(expected, folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(QDeltaNetError, match=r"cannot reserve 358,400 bytes for hidden states in .* \(File too la"):
            layerwise(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert equal(layerwise(folder)[0], expected)


def test_bad_requests(folder, tmp_path):
    with pytest.raises(QDeltaNetError, match="batch size 0: must be at least 1"):
        layerwise(folder, batch_size=0)
    with pytest.raises(QDeltaNetError, match="needs a folder for hidden states"):
        layerwise(folder, resume=Resume())
    with pytest.raises(QDeltaNetError, match="no such directory"):
        layerwise(folder, path=str(tmp_path / "none"))
    assert not folder.exists()


def test_nan_names_its_layer(random_model, folder, tmp_path):
    model = random_model()
    model.model.layers[2].linear_attn.in_proj_qkv.weight.data.fill_(1e38)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="layer 2, site"):
        layerwise(folder, path=str(tmp_path / "model"))


# -- the command -------------------------------------------------------------------------------------------------------

COMMAND = ["calibrate", "tiny-hybrid", "-r", "int8", "--samples", "6", "--seq-len", "128", "--batch-size", "1"]
COMMAND += ["--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the ordinary command writes."""
    folder = tmp_path_factory.mktemp("ordinary")
    code, said = finished(Fleet(folder).start(*COMMAND, "--output", str(folder / "cal")))
    assert code == 0, said
    return content(folder / "cal")


def test_the_command_killed_at_random_moments(fleet, written, tmp_path):
    """Twice, then finished by two processes, then asked for again."""
    choose, output, state = random.Random(5), tmp_path / "cal", tmp_path / ".cal.calibrating"
    for layer in range(2):
        process = fleet.start(*COMMAND, "--layerwise", "--output", str(output))
        wait((state / f"finished-{layer:05}.safetensors").exists, process)
        time.sleep(choose.random() * 0.05)
        process.kill()
        process.join()
        assert not output.exists()
    ends = [finished(p) for p in fleet.start_group(2, *COMMAND, "--layerwise", "--output", str(output))]
    assert [code for code, _ in ends] == [0, 0], ends
    assert content(output) == written
    assert not state.exists()
    code, said = finished(fleet.start(*COMMAND, "--layerwise", "--output", str(output)))
    assert (code, said.split(":")[0]) == (0, "already complete")


def test_three_processes(fleet, written, tmp_path):
    ends = [finished(p) for p in fleet.start_group(3, *COMMAND, "--layerwise", "--output", str(tmp_path / "cal"))]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert content(tmp_path / "cal") == written


def test_the_command_refuses_to_execute_what_is_not_loaded(fleet, tmp_path):
    more = ["--layerwise", "--backend", "cpu", "--output", str(tmp_path / "cal")]
    code, said = finished(fleet.start(*COMMAND, *more))
    assert code == 2
    assert said.strip().splitlines() == [
        "qdeltanet: backend executes the whole model, layerwise never loads it: leave one of them out"
    ]

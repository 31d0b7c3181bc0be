"""The layerwise benchmark: what it sees of a process, and a small run of it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from qdeltanet.calib.data import Samples
from qdeltanet.calib.layerwise import calibrate_layerwise
from qdeltanet.calib.session import Resume
from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.bench.layerwise import MIB, complete, watch
from qdeltanet.eval.embedded import model_path
from qdeltanet.recipe import load_recipe

HOLDS = """
import mmap, pathlib, sys, time
state = pathlib.Path(sys.argv[1])
state.mkdir()
mapped = mmap.mmap(-1, 1) if sys.argv[2] == "anonymous" else None
content = bytearray(100 * 2**20)
if sys.argv[2] == "mapped":
    (state / "hidden.bin").write_bytes(content)
    del content
    with open(state / "hidden.bin", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    sum(mapped[:: 4096])
for layer in range(2):
    time.sleep(0.2)
    (state / f"finished-{layer:05}.safetensors").write_bytes(b"")
time.sleep(0.2)
"""


@pytest.mark.parametrize("kind", ["anonymous", "mapped"])
def test_watching(tmp_path, kind):
    """100 MiB in a process of its own."""
    found = watch([sys.executable, "-c", HOLDS, str(tmp_path / "state"), kind], tmp_path / "state")
    assert found.looks > 5
    assert found.anonymous > 100 * MIB  # for a mapped file, too: before it was written
    assert (found.mapped > 100 * MIB) == (kind == "mapped")
    assert max(found.anonymous, found.mapped) <= found.resident < 300 * MIB
    assert (found.scratch >= 100 * MIB) == (kind == "mapped")
    first, second = found.layers
    assert 0.2 <= first < second < found.seconds


def test_a_command_that_fails(tmp_path):
    with pytest.raises(QDeltaNetError, match="ended with 3: no room"):
        watch([sys.executable, "-c", "import sys; print('no room', file=sys.stderr); sys.exit(3)"], tmp_path)


@pytest.mark.parametrize(("lost", "says"), [(None, "69 of 69"), ("layers.1.out_proj.input_scale", "68 of 69")])
def test_complete(tmp_path, lost, says):
    path = model_path("tiny-hybrid")
    recipe = load_recipe("w8a8", ["projections.proj.*.scale=calibrated"])
    samples = Samples("random", torch.randint(2, 100, (1, 64)), "digest")
    found = calibrate_layerwise(path, recipe, samples, resume=Resume(tmp_path / "state"))
    scales = {key: x for key, x in found.scales.items() if key != lost}
    replace(found, scales=scales).save(tmp_path / "cal")
    assert complete(path, recipe, tmp_path / "cal", "float32") == (lost is None, f"{says} scales there and finite")

"""A model of which one decoder layer is in memory computes what the loaded one does, to the bit."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny
from torch import Tensor

from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.embedded import model_path
from qdeltanet.models import StreamedModel, load_model, model_fingerprint, quantize_model
from qdeltanet.recipe import load_recipe

LOADABLE = [name for name in FAMILIES if not name.startswith("delta_net")]  # transformers has no such model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a tiny model in several shards."""
    made: dict[str, str] = {}

    def find(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            tiny(family).save_pretrained(made[family], max_shard_size="100KB")
        return made[family]

    return find


def tokens(batch: int = 2, length: int = 70) -> Tensor:
    return torch.randint(2, 100, (batch, length), generator=torch.Generator().manual_seed(0))


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    """What every decoder layer gives, and the logits."""
    seen: list[Tensor] = []
    hooks = [x.register_forward_hook(lambda m, a, y: seen.append(y)) for x in model.model.layers]
    with torch.no_grad():
        logits = model(input_ids=x, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return [*seen, logits]


def check(name: str, dtype: str) -> None:
    """Layer by layer as the loaded model: fingerprint, buffers, hidden states; nothing is left in memory."""
    loaded, streamed = load_model(name, dtype), StreamedModel(name, dtype)
    assert streamed.fingerprint() == model_fingerprint(loaded)
    for model in (loaded, streamed.model):
        quantize_model(model, load_recipe("w8a8"))
    assert streamed.fingerprint() == model_fingerprint(loaded)
    buffers = dict(streamed.model.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    assert all(torch.equal(b, buffers[n]) for n, b in loaded.named_buffers() if "layers." not in n)
    expected, hidden = outputs(loaded, tokens()), None
    for index in range(len(streamed)):
        with streamed.layer(index):
            hidden = streamed.run(index, tokens(), hidden)
        assert torch.equal(hidden, expected[index]), index
        assert all(p.is_meta for p in streamed.model.parameters())
    assert hidden is not None
    assert torch.equal(loaded.lm_head(loaded.model.norm(hidden)), expected[-1])


@pytest.mark.parametrize("family", LOADABLE)
def test_families(saved, family):
    check(saved(family), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtypes(dtype):
    """tiny-hybrid is stored in bfloat16: cast, mapped, mapped."""
    check(model_path("tiny-hybrid"), dtype)


def test_one_layer_at_a_time(saved):
    """Real parameters are those of the layer that was asked for, and are gone behind the block."""
    streamed = StreamedModel(saved("qwen3_5_moe"))
    quantize_model(streamed.model, load_recipe("w8a8"))
    for index in (1, 0, 1):
        with streamed.layer(index) as layer:
            real = {n for n, p in streamed.model.named_parameters() if not p.is_meta}
            assert real == {f"model.layers.{index}.{n}" for n, _ in layer.named_parameters()}
            left = [weakref.ref(p) for p in layer.parameters()]
            assert all(not b.is_meta for b in layer.buffers())
        assert not any(ref() is not None and not ref().is_meta for ref in left)


def test_scales_go_with_the_layer(saved):
    streamed = StreamedModel(saved("qwen3_5"))
    (first, *_) = quantize_model(streamed.model, load_recipe("int8")).values()
    with streamed.layer(0):
        first.scales.fill({key: torch.ones(1, 1, 1) for key in first.scales.keys})
    assert all(b.is_meta for b in first.scales.buffers())


def test_a_failure_inside_leaves_the_model_as_it_was(saved):
    streamed = StreamedModel(saved("qwen3_5"))
    layers = list(streamed.model.model.layers)
    with pytest.raises(KeyError), streamed.layer(1):
        raise KeyError
    assert list(streamed.model.model.layers) == layers
    assert all(p.is_meta for p in streamed.model.parameters())


@pytest.mark.parametrize("copy", ["equal", "different"])
def test_tied_weights_that_are_stored_twice(saved, tmp_path, copy):
    """transformers ties them if they are equal."""
    name = rewritten(saved("qwen3_5"), tmp_path, lambda all_: all_ | {"lm_head.weight": doubled(all_, copy)})
    check(name, "float32")


def doubled(weights: dict[str, Tensor], copy: str) -> Tensor:
    return weights["model.embed_tokens.weight"].clone() * (1 if copy == "equal" else 2)


def rewritten(source: str, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    """The model with its weights changed, in one file."""
    weights: dict[str, Tensor] = {}
    for file in Path(source).glob("*.safetensors"):
        weights |= load_file(file)
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    shutil.copy(Path(source) / "config.json", folder)
    return str(folder)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {k: x for k, x in weights.items() if k != name}


LATE = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(LATE), rf"lacks {LATE}"),
        (without("model.embed_tokens.weight"), r"lacks .*model.embed_tokens.weight"),
        (lambda w: w | {LATE: torch.zeros(3, 3)}, rf"{LATE} is \[3, 3\], the config wants \[64, 64\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_work(saved, tmp_path, change, says):
    name = rewritten(saved("qwen3_5"), tmp_path, change)
    for read in (load_model, StreamedModel):
        with pytest.raises(QDeltaNetError, match=says):
            read(name)


def test_nan_is_refused_with_its_layer(saved, tmp_path):
    name = rewritten(saved("qwen3_5"), tmp_path, lambda w: w | {LATE: torch.full_like(w[LATE], float("nan"))})
    streamed = StreamedModel(name)
    with streamed.layer(1):
        pass
    with pytest.raises(QDeltaNetError, match=rf"NaN or infinite in torch.float32: {LATE}"), streamed.layer(2):
        pass


def test_other_bad_models(saved, tmp_path):
    with pytest.raises(QDeltaNetError, match="no such directory"):
        StreamedModel(str(tmp_path / "none"))
    with pytest.raises(QDeltaNetError, match="dtype"):
        StreamedModel(saved("qwen3_5"), "float31")
    shards = shutil.copytree(saved("qwen3_5"), tmp_path / "shards")
    next(shards.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(QDeltaNetError, match="-00002-of-.* is missing"):
        StreamedModel(str(shards))
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(shards / "config.json", empty)
    with pytest.raises(QDeltaNetError, match="neither model.safetensors nor"):
        StreamedModel(str(empty))
    quantized = shutil.copytree(saved("qwen3_5"), tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(QDeltaNetError, match="is quantized already"):
        StreamedModel(str(quantized))

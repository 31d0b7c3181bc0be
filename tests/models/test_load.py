"""Loading: what is refused, what mixed dtypes become, and models that accelerate spreads over memory and disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdeltanet.calib import calibrate, load_samples
from qdeltanet.checkpoint import export_checkpoint
from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.embedded import DATASETS, model_path
from qdeltanet.eval.make_model import make_model
from qdeltanet.models import (
    execution_device,
    load_model,
    load_tokenizer,
    materialised,
    model_fingerprint,
    quantize_model,
    set_execution,
)
from qdeltanet.recipe import load_recipe

SHARD = "model-00003-of-00006.safetensors"  # decoder layer 1
LAYER = "model.layers.1."
WEIGHT = LAYER + "linear_attn.out_proj.weight"
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A random model in bfloat16 shards that hold A_log and the gated norm in float32, as on the hub."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(path, "tiny", 300)
    return path


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        held = load_file(folder / SHARD)
        change(held)
        save_file(held, folder / SHARD, {"format": "pt"})

    return edit


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def content(name: str, data: bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return edit


def zeros(*shape: int) -> Edit:
    return tensors(lambda held: held.update({WEIGHT: torch.zeros(shape)}))


def linear_layers(count: int) -> Edit:
    return config(num_hidden_layers=count, layer_types=["linear_attention"] * count)


def cut(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


BAD: dict[str, tuple[Edit, str]] = {
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing, and model.safetensors.index.json names it"),
    "cut shard": (cut, f"{SHARD} is damaged"),
    "empty shard": (content(SHARD, b""), f"{SHARD} is damaged"),
    "no safetensors": (content(SHARD, b"version https://git-lfs.github.com/spec/v1"), f"{SHARD} is damaged"),
    "bad index": (content("model.safetensors.index.json", b"{"), "index.json cannot be read"),
    "empty index": (content("model.safetensors.index.json", b"{}"), "index.json has no weight_map"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "no file named model.safetensors"),
    "bad config": (content("config.json", b"{"), "config.json cannot be read"),
    "missing tensor": (tensors(lambda t: t.pop(WEIGHT)), f"the checkpoint lacks {WEIGHT}"),
    "shape": (zeros(7, 2), f"{WEIGHT} is .7, 2., the config wants .64, 128"),
    "int8": (tensors(lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)})), rf"{SHARD} holds .* {WEIGHT} \(I8\)"),
    "fp8": (tensors(lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)})), rf"{WEIGHT} \(F8_E4M3\)"),
    "scale": (tensors(lambda t: t.update({f"{WEIGHT}_scale": torch.ones(1)})), f"has no place for {WEIGHT}_scale"),
    "fewer layers": (linear_layers(3), "no place for model.layers.3.*more"),
    "more layers": (linear_layers(5), "lacks model.layers.3.linear_attn"),
    "unknown quantization": (config(quantization_config={"quant_method": "marvel"}), "quantized by 'marvel'"),
    "NaN": (tensors(lambda t: t[WEIGHT].fill_(float("nan"))), f"NaN or infinite in torch.float32: {WEIGHT}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(copied, name, caplog, capfd):
    edit, says = BAD[name]
    edit(copied)
    with pytest.raises(QDeltaNetError, match=says) as caught:
        load_model(str(copied))
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err


def test_other_parts_of_a_checkpoint_may_be_left(whole, copied):
    tensors(lambda t: t.update({"mtp.layers.0.weight": torch.ones(2), "vision.layers.0.bias": torch.ones(2)}))(copied)
    tokens = torch.arange(32)[None]
    expected, found = (load_model(str(path))(tokens).logits for path in (whole, copied))
    assert torch.equal(expected, found)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_mixed_floats_are_converted(copied):
    tensors(lambda t: t.update({n: x.half() for n, x in t.items() if n.endswith("_proj.weight")}))(copied)
    stored = load_file(copied / SHARD)
    assert {x.dtype for x in stored.values()} == {torch.float32, torch.bfloat16, torch.float16}
    for dtype, into in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)):
        loaded = load_model(str(copied), dtype).state_dict()
        assert {x.dtype for x in loaded.values()} == {into}
        assert all(torch.equal(loaded[name], x.to(into)) for name, x in stored.items())


def test_a_dtype_that_cannot_hold_the_weights(copied):
    tensors(lambda t: t[WEIGHT].fill_(1e6))(copied)
    assert load_model(str(copied)).get_parameter(WEIGHT).max() > 9e5
    with pytest.raises(QDeltaNetError, match=f"infinite in torch.float16: {WEIGHT}; try --dtype float32"):
        load_model(str(copied), "float16")


# -- multimodal --------------------------------------------------------------------------------------------------------


def test_a_multimodal_checkpoint_loads_as_text(tmp_path):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    torch.manual_seed(0)
    made = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).eval()
    made.save_pretrained(tmp_path)
    tokens = torch.arange(96)[None]
    loaded = load_model(str(tmp_path))
    assert type(loaded).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(loaded(tokens).logits, made(input_ids=tokens).logits)
    assert list(quantize_model(loaded, load_recipe("int8"))) == [0, 1, 2]


# -- what a recipe asks of a model -------------------------------------------------------------------------------------


def test_a_recipe_that_names_absent_layers(random_model):
    for key in ("99", "3", "1?"):  # 3 is full attention
        with pytest.raises(
            QDeltaNetError, match=rf"layers '{key[0]}.*' is no Gated DeltaNet layer of the model \(0, 1, 2\)"
        ):
            quantize_model(random_model(), load_recipe("int8", [f"layers.{key}.chunk_size=32"]))
    made = quantize_model(random_model(), load_recipe("int8", ["layers.[1-9].chunk_size=32"]))
    assert [layer.scheme.plan.chunk_size for layer in made.values()] == [64, 32, 32]


def test_a_model_without_linear_attention():
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=3, layer_types=["full_attention"] * 3))
    with pytest.raises(QDeltaNetError, match="no Gated DeltaNet .* to quantize: it has 3 full_attention"):
        quantize_model(model, load_recipe("int8"))


# -- device_map --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Any:
    path = model_path("tiny-hybrid")
    return load_samples(DATASETS["bytes"], load_tokenizer(path), 2, 128)


def everything(data: Any, recipe: str, **placement: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """The model, its calibration, and logits in float and in integers."""
    model = load_model(model_path("tiny-hybrid"), **placement)
    calibration = calibrate(model, load_recipe(recipe), data, batch_size=1)
    logits = []
    for execution in ("float", "integer"):
        set_execution(model, execution)
        with torch.no_grad():
            logits.append(model(input_ids=data.tokens[:2], use_cache=False).logits)
    return model, calibration, *logits


@pytest.mark.parametrize(("recipe", "memory", "places"), [("int8", "1MB", {"cpu", "disk"}), ("w8a8", "10KB", {"disk"})])
def test_offloaded_equals_loaded_to_the_bit(data, recipe, memory, places, tmp_path):
    _, expected, *logits = everything(data, recipe)
    spread = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": str(tmp_path)}
    model, found, *theirs = everything(data, recipe, **spread)
    assert set(model.hf_device_map.values()) == places
    assert model.model.layers[0].linear_attn.A_log.is_meta  # and stays so
    assert all(torch.equal(a, b) for a, b in zip(logits, theirs, strict=True))
    assert expected.report == found.report
    assert expected.scales.keys() == found.scales.keys()
    assert all(torch.equal(scale, found.scales[key]) for key, scale in expected.scales.items())


def test_an_exported_checkpoint_can_be_offloaded(data, tmp_path):
    model, _, _, expected = everything(data, "w8a8")
    export_checkpoint(model, load_recipe("w8a8"), tmp_path / "exported")
    spread = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "weights")}
    offloaded = load_model(str(tmp_path / "exported"), **spread)
    assert execution_device(offloaded) == torch.device("cpu")
    assert torch.equal(offloaded(input_ids=data.tokens[:2], use_cache=False).logits, expected)


def test_what_is_offloaded_can_be_looked_at(tmp_path):
    path = model_path("tiny-hybrid")
    loaded = load_model(path)
    offloaded = load_model(path, device_map={"": "disk"}, offload_folder=str(tmp_path))
    layer, same = offloaded.model.layers[1], loaded.model.layers[1]
    assert execution_device(offloaded) == execution_device(layer.linear_attn) == torch.device("cpu")
    with materialised(layer):
        assert all(torch.equal(x, same.get_parameter(name)) for name, x in layer.named_parameters())
    with materialised(layer, recurse=False):
        assert layer.linear_attn.A_log.is_meta
    assert all(x.is_meta for x in layer.parameters())
    with materialised(same):
        assert execution_device(same) == torch.device("cpu")
    offloaded(input_ids=torch.arange(8)[None])  # from then on accelerate takes tied weights for two
    assert model_fingerprint(offloaded) == model_fingerprint(loaded)

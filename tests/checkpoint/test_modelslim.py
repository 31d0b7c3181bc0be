"""ModelSlim: the projections recomputed from the files alone, the validator, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from exports import KINDS, calibrated, logits, recipe, rewrite, rewrite_json
from safetensors.torch import load_file

from qdeltanet.checkpoint import check_modelslim, export_modelslim, load_foreign
from qdeltanet.checkpoint.foreign import quantized_projections
from qdeltanet.checkpoint.modelslim_check import deq_scale_in, float_of, quant_bias
from qdeltanet.core import QDeltaNetError
from qdeltanet.models import load_model

DESCRIPTION = "quant_model_description.json"
COUNT = 3 * 3 + 4 + 4 * 3


@pytest.fixture(scope="module")
def made(random_model, tmp_path_factory):
    """(kind, dtype) -> (quantized model, exported folder)."""
    root = tmp_path_factory.mktemp("exports")
    cache = {}

    def make(kind: str, dtype: str = "float32"):
        key = f"{kind}-{dtype}"
        if key not in cache:
            wanted = recipe(KINDS[kind])
            model = calibrated(random_model, root / "float", wanted, dtype)
            export_modelslim(model, wanted, root / key)
            cache[key] = model, root / key
        return cache[key]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """A folder that may be damaged."""
    return lambda kind: Path(shutil.copytree(made(kind)[1], tmp_path / "copy"))


def described(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / DESCRIPTION).read_text())
    return found


def accumulators(x: torch.Tensor, tensors: dict[str, torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """int64 [tokens, out] as an NPU has them: codes of x @ weight^T + quant_bias."""
    codes = (x / scale).round().clamp(-127, 127).to(torch.int64) + tensors.get("input_offset", torch.zeros(1)).long()
    return codes @ tensors["weight"].long().T + tensors.get("quant_bias", torch.zeros(1)).long()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_every_projection_recomputed_from_the_files_alone(made, kind):
    model, folder = made(kind)
    files, kinds = load_file(folder / "model.safetensors"), described(folder)
    coded = quantized_projections(model)
    wanted = {"static": "W8A8", "dynamic": "W8A8_DYNAMIC"}[kind]
    assert {n for n, k in kinds.items() if k == wanted and n.endswith(".weight")} == {f"{n}.weight" for n in coded}
    assert len(coded) == COUNT
    for name, linear in coded.items():
        tensors = {n.rpartition(".")[2]: x for n, x in files.items() if n.startswith(f"{name}.")}
        assert all(kinds[f"{name}.{n}"] == wanted for n in tensors)
        x = torch.randn(20, linear.in_features, generator=torch.Generator().manual_seed(2))
        scale = tensors["input_scale"] if kind == "static" else x.abs().amax(1, keepdim=True) / 127
        acc = accumulators(x, tensors, scale)
        expected = linear(x)
        # equal to the bit by our order of roundings: so every integer is
        assert torch.equal((acc.float() * scale) * tensors["weight_scale"].T, expected), name
        if kind == "static":  # the runtime's: one factor, itself rounded, so up to two more half-steps of float32
            assert torch.allclose(acc.float() * tensors["deq_scale"], expected, rtol=2**-22, atol=0), name


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_it_comes_back_with_every_bit_and_the_rule_in_integers(made, kind):
    model, folder = made(kind)
    assert torch.equal(logits(load_foreign(folder)), logits(model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_that_a_runtime_has(made, dtype):
    """float16 wants the bits of deq_scale in an int64, bfloat16 a float32; scales keep their 32 bits."""
    model, folder = made("static", dtype)
    files = load_file(folder / "model.safetensors")
    name, linear = next(iter(quantized_projections(model).items()))
    found, exact = files[f"{name}.deq_scale"], linear.input_scale * linear.scale
    assert found.dtype == (torch.int64 if dtype == "float16" else torch.float32)
    assert torch.equal(float_of(found), exact)
    assert files[f"{name}.weight_scale"].dtype == torch.float32
    assert files["model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert torch.equal(logits(load_foreign(folder)), logits(model))


def test_quant_bias_undoes_offset_and_adds_the_bias():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (6, 40), generator=draw).to(torch.int8)
    offset, deq_scale = torch.tensor([-9], dtype=torch.int8), torch.rand(6, generator=draw) / 1000 + 1e-4
    bias, codes = torch.randn(6, generator=draw), torch.randint(-118, 119, (5, 40), generator=draw)
    shifted = (codes + offset.long()) @ weight.long().T + quant_bias(weight, offset, deq_scale, bias).long()
    exact = (codes @ weight.long().T).double() * deq_scale.double() + bias.double()
    assert ((shifted * deq_scale.double() - exact).abs() <= deq_scale.double() / 2 + 1e-12).all()
    with pytest.raises(QDeltaNetError, match="does not fit int32"):
        quant_bias(weight, offset, deq_scale, bias * 1e9)
    assert torch.equal(float_of(deq_scale_in(torch.float16, deq_scale)), deq_scale)


def test_what_is_written(made):
    _, folder = made("static")
    kinds, files = described(folder), load_file(folder / "model.safetensors")
    assert kinds.pop("model_quant_type") == "W8A8"
    assert kinds.pop("version") == "1.0.0"
    assert kinds.keys() - files.keys() == {"lm_head.weight"}  # tied; the runtime asks
    for name in ("in_proj_a", "in_proj_b", "conv1d"):
        assert kinds[f"model.layers.0.linear_attn.{name}.weight"] == "FLOAT"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["w4a16", "mixed"])
def test_what_the_format_cannot_express(random_model, tmp_path, kind):
    wanted = recipe(KINDS[kind])
    model = calibrated(random_model, tmp_path / "float", wanted)
    with pytest.raises(QDeltaNetError, match=r"int4 weights in groups of 32 with float .*mlp.up_proj"):
        export_modelslim(model, wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


P = "model.layers.0.linear_attn"
DAMAGE = {
    f"{P}.in_proj_a.weight has no entry": lambda d, t: d.pop(f"{P}.in_proj_a.weight"),
    f"{P}.in_proj_z.weight has no entry, and is a shard": lambda d, t: [
        d.pop(n) for n in [*d] if f"{P}.in_proj_z" in n
    ] + [t.pop(n) for n in [*t] if f"{P}.in_proj_z" in n],
    "in_proj_z run as one, and are FLOAT and W8A8": lambda d, t: d.update({f"{P}.in_proj_z.weight": "FLOAT"}),
    "is 'W3A3', expected one of": lambda d, t: d.update({f"{P}.out_proj.weight": "W3A3"}),
    "is described, and no file has it": lambda d, t: d.update({f"{P}.other.weight": "FLOAT"}),
    f"missing tensor {P}.out_proj.deq_scale": lambda d, t: t.pop(f"{P}.out_proj.deq_scale"),
    f"{P}.out_proj.weight is F32, expected I8": lambda d, t: t.update(
        {f"{P}.out_proj.weight": t[f"{P}.out_proj.weight"].float()}
    ),
    "out_proj.weight_scale has shape [3, 1]": lambda d, t: t.update({f"{P}.out_proj.weight_scale": torch.ones(3, 1)}),
    "out_proj.quant_bias is not round(": lambda d, t: t[f"{P}.out_proj.quant_bias"].add_(1),
    "out_proj.deq_scale is not input_scale": lambda d, t: t[f"{P}.out_proj.deq_scale"].mul_(1.01),
    "out_proj.deq_scale has values that are not positive": lambda d, t: t[f"{P}.out_proj.deq_scale"].zero_(),
    "holds integers, and is FLOAT": lambda d, t: t.update({f"{P}.norm.weight": torch.ones(32, dtype=torch.int8)}),
}  # fmt: skip


@pytest.mark.parametrize("says", DAMAGE)
def test_damage(copied, says):
    folder = copied("static")
    check_modelslim(folder)
    content = described(folder)
    rewrite(folder, lambda tensors: DAMAGE[says](content, tensors))
    (folder / DESCRIPTION).write_text(json.dumps(content))
    with pytest.raises(QDeltaNetError) as error:
        check_modelslim(folder)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_all_damage_is_listed_at_once(copied):
    folder = copied("dynamic")
    rewrite_json(folder / DESCRIPTION, lambda d: d.pop(f"{P}.norm.weight"))
    rewrite(folder, lambda t: t.pop("model.layers.3.self_attn.o_proj.weight_scale"))
    (folder / "qdeltanet" / "delta_rule.safetensors").unlink()
    with pytest.raises(QDeltaNetError) as error:
        load_foreign(folder)
    for says in ("norm.weight has no entry", "o_proj.weight_scale", "qdeltanet/delta_rule.safetensors is missing"):
        assert says in str(error.value)
    (folder / DESCRIPTION).write_text("{")
    with pytest.raises(QDeltaNetError, match=r"quant_model_description.json is damaged"):
        check_modelslim(folder)


def test_it_never_loads_as_a_float_model(made):
    """Its int8 tensors are called `weight`: transformers would take them for the float ones."""
    with pytest.raises(QDeltaNetError):
        load_model(str(made("dynamic")[1]))

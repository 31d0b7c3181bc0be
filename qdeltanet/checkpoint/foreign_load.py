"""Checkpoints of other formats back into this program: codes and the rule's scales, executed as they were before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError
from ..models import quantize_model, set_execution
from ..nn import GatedDeltaNet, QuantLinear
from ..recipe import parse_recipe
from .compressed_tensors_check import METHOD as COMPRESSED_TENSORS
from .compressed_tensors_check import check_compressed_tensors
from .description import check_description
from .export import FORMAT_VERSION
from .folder import exported_tensors
from .foreign import CONFIG_KEY, SCALES, SIDE_FOLDER, float_tensors, quantized_projections, rule_scales
from .modelslim_check import DESCRIPTION, check_modelslim
from .opened import Opened, well_formed
from .packing import unpack
from .tensors import read_tensors

Read = Callable[[str], Tensor]


GENERATION = "generation_config.json"


def load_foreign(path: Path, dtype: str = "auto") -> Any:
    """A model from a compressed-tensors or ModelSlim directory of ours, rule quantized as its recipe says.

    dtype: of its float weights, `auto` as they stand there. Everything comes from the files: nothing is calibrated or
    coded again. Execution starts as integer. Raises QDeltaNetError for a directory that is not whole, was not written
    here or by another version, or does not fit its own recipe (naming every tensor).
    """
    with well_formed(path):
        opened = _checked(path)
        own = opened.config[CONFIG_KEY]
        recipe, schemes = parse_recipe(own["recipe"], where=f"{CONFIG_KEY}.recipe"), own["schemes"]
    model = _model(path)
    quantize_model(model, recipe)
    check_description(schemes, model, f"{CONFIG_KEY}.schemes")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.original = None
    _fill(model, opened)
    if dtype != "auto":
        model.to(getattr(torch, dtype))
    set_execution(model, "integer")
    return model


def is_foreign(path: Path) -> bool:
    """Whether a directory is one of ours in another format. Reads its config alone."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and CONFIG_KEY in content


def _checked(path: Path) -> Opened:
    if not is_foreign(path):
        raise QDeltaNetError(
            f"{path}: no config.json with {CONFIG_KEY}: not written by qdeltanet; load it with transformers or vLLM"
        )
    opened = Opened(path)
    own = opened.config[CONFIG_KEY]
    if missing := sorted({"version", "recipe", "schemes", "files"} - set(own)):
        raise QDeltaNetError(f"{path}: {CONFIG_KEY} lacks {', '.join(missing)}: export the model again")
    if own["version"] != FORMAT_VERSION:
        raise QDeltaNetError(
            f"{path}: {CONFIG_KEY} is version {own['version']!r}, this qdeltanet reads {FORMAT_VERSION}: export again"
        )
    method = (opened.config.get("quantization_config") or {}).get("quant_method")
    if (path / DESCRIPTION).is_file():
        check_modelslim(path)
    elif method == COMPRESSED_TENSORS:
        check_compressed_tensors(path)
    else:
        raise QDeltaNetError(f"{path}: neither compressed-tensors nor ModelSlim (quant_method {method!r})")
    return opened


def _model(path: Path) -> Any:
    """The float model, its weights still random."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype, name = config.dtype or torch.float32, (config.architectures or ["?"])[0]
    made = getattr(transformers, name, None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise QDeltaNetError(f"{path}: architecture {name!r} is no model of transformers'")
    model = made._from_config(config, dtype=dtype).eval()
    if (path / GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _fill(model: Any, opened: Opened) -> None:
    """Raises QDeltaNetError that lists every tensor which is missing, unexpected or of another shape."""
    expected, coded = exported_tensors(model), quantized_projections(model)
    inside = {n for n in opened.headers if n.rpartition(".")[0] in coded}
    floats = set(float_tensors(model))
    problems = [f"missing tensor {n}" for n in sorted(floats - opened.headers.keys())]
    problems += [f"unexpected tensor {n}" for n in sorted(opened.headers.keys() - inside - floats)]
    problems += [f"missing projection {n}" for n in sorted(coded) if not any(k.startswith(f"{n}.") for k in inside)]
    opened.refuse(problems, "model")
    state = {name: opened.tensor(name) for name in floats}
    for name, linear in coded.items():
        state |= {f"{name}.{k}": x for k, x in _projection(opened, name, linear).items()}
    state |= _rule_scales(model, opened)
    wrong = [
        f"{n} is {x.dtype} {list(x.shape)}, expected {expected[n].dtype} {list(expected[n].shape)}"
        for n, x in sorted(state.items())
        if x.shape != expected[n].shape or x.is_floating_point() != expected[n].is_floating_point()
    ]
    opened.refuse([*wrong, *(f"missing tensor {n}" for n in sorted(expected.keys() - state.keys()))], "model")
    model.load_state_dict(state, strict=False)
    model.tie_weights()


def _projection(opened: Opened, name: str, linear: QuantLinear) -> dict[str, Tensor]:
    """codes, scale, input_scale and bias as a QuantLinear holds them."""

    def read(key: str) -> Tensor:
        return opened.tensor(f"{name}.{key}")

    scale = read("weight_scale").float().view(linear.scale.shape)
    if f"{name}.weight_packed" in opened.headers:
        codes = unpack(read("weight_packed"), linear.scheme.weight.bits, linear.in_features)
    else:
        codes = read("weight")
    found = {"codes": codes, "scale": scale}
    found |= {"input_scale": read("input_scale").float()} if linear.is_static else {}
    return found | ({"bias": read("bias")} if f"{name}.bias" in opened.headers else {})


def _rule_scales(model: Any, opened: Opened) -> dict[str, Tensor]:
    wanted = rule_scales(model)
    if not wanted:
        return {}
    found = read_tensors(opened.path / SIDE_FOLDER / SCALES)
    problems = [f"missing scale {k}" for k in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected scale {k}" for k in sorted(found.keys() - wanted.keys())]
    opened.refuse(problems, "model")
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatedDeltaNet):
            prefix = f"layers.{module.layer_idx}."
            state |= {f"{name}.scales.{k}": found[prefix + k] for k in module.scales.keys}
    return state

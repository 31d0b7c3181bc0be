"""What checkpoints of other runtimes share: their projections, the tensors that stay float, and the side folder.

No other format has a place for the delta rule's own products. Its scales travel in the folder `qdeltanet/`, which other
loaders do not open, and what they mean in the key `qdeltanet_config` at the top of config.json, which they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..core import QDeltaNetError
from ..models import quantized_layers
from ..nn import GatedDeltaNet, QuantLinear
from ..recipe import Recipe
from .description import describe_layers
from .export import FORMAT_VERSION, file_digests
from .folder import exported_tensors

CONFIG_KEY = "qdeltanet_config"
SIDE_FOLDER, SCALES = "qdeltanet", "delta_rule.safetensors"

# Projections that vLLM and vllm-ascend run as one: they read the same input, and share a scheme and a static scale.
FUSED: tuple[tuple[str, ...], ...] = (
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)


def quantized_projections(model: nn.Module) -> dict[str, QuantLinear]:
    """Every quantized projection by the name that it has in the state dict."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def float_linears(model: nn.Module) -> list[str]:
    """Linears and convolutions of a quantized model that stay in float."""
    coded = quantized_projections(model)
    kinds = (nn.Linear, nn.Conv1d)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n.removesuffix(".original") not in coded]


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The exported tensors that belong neither to a quantized projection nor to the rule's scales."""
    rules = [f"{name}.scales." for name, m in model.named_modules() if isinstance(m, GatedDeltaNet)]
    own = (*(f"{name}." for name in quantized_projections(model)), *rules)
    return {name: x for name, x in exported_tensors(model).items() if not name.startswith(own)}


def fused_groups(names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(parent, shards) of every fused module of which at least one shard is among these modules."""
    parts = [name.rpartition(".")[::2] for name in names]
    found = ((parent, shards) for parent, last in parts for shards in FUSED if last in shards)
    yield from dict.fromkeys(found)


def fused_siblings(names: Iterable[str]) -> list[list[str]]:
    """Two or more of these modules, by their names, that a runtime runs as one."""
    present = set(names)
    groups = [[f"{parent}.{s}" for s in shards] for parent, shards in fused_groups(sorted(present))]
    return [kept for group in groups if len(kept := [n for n in group if n in present]) > 1]


def fusion_problems(model: nn.Module) -> list[str]:
    """What keeps a runtime from running fused projections as one: each group with how its members differ."""
    coded = quantized_projections(model)
    problems = []
    for group in fused_siblings([*coded, *float_linears(model)]):
        kinds = {name: describe(coded[name]) if name in coded else "float" for name in group}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{name.rpartition('.')[2]} {kind}" for name, kind in kinds.items())
            problems.append(f"{_place(group)}: {listed}; give them one scheme in the recipe, or null to all")
            continue
        scales = {name: float(coded[name].input_scale) for name in group if name in coded and coded[name].is_static}
        if len(set(scales.values())) > 1:
            listed = ", ".join(f"{name.rpartition('.')[2]} {scale:g}" for name, scale in scales.items())
            problems.append(f"{_place(group)}: static input scales differ ({listed}); calibrate them together")
    return problems


def _place(group: list[str]) -> str:
    return group[0].rpartition(".")[0]


def describe(linear: QuantLinear) -> str:
    """The scheme of a projection in words."""
    scheme, fmt = linear.scheme, linear.scheme.activation.format
    grouped = "" if scheme.group is None else f" in groups of {scheme.group}"
    activation = "float" if fmt is None else f"{scheme.activation.scale} {fmt.name}"
    return f"{scheme.weight.name} weights{grouped} with {activation} activations"


def check_expressible(
    fmt: str, model: nn.Module, fits: Callable[[QuantLinear], bool], mend: str
) -> dict[str, QuantLinear]:
    """The quantized projections of a model for a format that has a place for some.

    Raises QDeltaNetError that lists every projection which does not fit, and fused ones that differ.
    """
    coded = quantized_projections(model)
    if not coded:
        raise QDeltaNetError(
            f"{fmt} holds quantized projections, and this recipe has none: use one that has (w8a8), or export "
            "the delta rule alone with --format qdeltanet, onnx or aimet"
        )
    reasons: dict[str, list[str]] = {}
    for name, linear in coded.items():
        if not fits(linear):
            reasons.setdefault(describe(linear), []).append(name)
    problems = [f"{why} ({', '.join(names)})" for why, names in reasons.items()] + fusion_problems(model)
    if problems:
        raise QDeltaNetError(f"{fmt} cannot express this model: {'; '.join(problems)}; {mend}")
    return coded


def save_side_folder(model: nn.Module, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write the rule's scales by `layers.<i>.<site>`, beside the model's files. Returns `qdeltanet_config`."""
    scales = rule_scales(model)
    content: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "schemes": describe_layers(model),
    }
    if scales:
        (folder / SIDE_FOLDER).mkdir()
        save_file(scales, folder / SIDE_FOLDER / SCALES)
    return content | {"files": file_digests(folder)}


def rule_scales(model: nn.Module) -> dict[str, Tensor]:
    """Static scales of the delta rule as calibrations call them, `layers.<i>.<site>`."""
    found: dict[str, Tensor] = {}
    for layer in quantized_layers(model).values():
        if layer.delta_net is not None:
            found |= {layer.prefix + k: v.detach().cpu().contiguous() for k, v in layer.delta_net.scales.items()}
    return found

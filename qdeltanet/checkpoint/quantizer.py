"""The transformers side of loading: `quant_method: qdeltanet`. Importing this module registers it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core import QDeltaNetError
from ..core.files import sha256_file
from ..models import quantize_model, set_execution
from ..recipe import parse_recipe
from .description import check_description
from .export import FORMAT_VERSION, METHOD
from .folder import exported_tensors, read_headers

KEYS = {
    1: {"quant_method", "version", "recipe", "files", "tensors"},
    2: {"quant_method", "version", "recipe", "schemes", "files", "tensors"},
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

FLOATS = {d for d in DTYPES.values() if d.is_floating_point}


@register_quantization_config(METHOD)
class QDeltaNetConfig(QuantizationConfigMixin):
    """`quantization_config` of an exported checkpoint: format version, recipe, file digests."""

    def __init__(self, **content: Any) -> None:
        version = content.get("version")
        if version is not None and not (isinstance(version, int) and version in KEYS):
            raise QDeltaNetError(
                f"checkpoint format {version!r}: this qdeltanet reads versions 1 to {FORMAT_VERSION}; export again, or "
                "install the version that wrote it"
            )
        keys = KEYS[version or FORMAT_VERSION]
        unknown = sorted(set(content) - keys)
        if unknown:
            raise QDeltaNetError(f"quantization_config: unknown keys {', '.join(unknown)}")
        missing = sorted(keys - {"quant_method"} - set(content))
        if missing:
            raise QDeltaNetError(f"quantization_config lacks {', '.join(missing)}: export the model again")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version, self.recipe = version, content["recipe"]
        self.files, self.tensors = content["files"], content["tensors"]
        if "schemes" in content:
            self.schemes = content["schemes"]


@register_quantizer(METHOD)
class QDeltaNetQuantizer(HfQuantizer):
    """Swaps the layers in before weights are read, and refuses files that do not fit them."""

    requires_calibration = True

    def __init__(self, quantization_config: QDeltaNetConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config

    def is_serializable(self) -> bool:
        return False  # an exported checkpoint is written by `export_checkpoint`, whole

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        quantize_model(model, parse_recipe(self.config.recipe, where="quantization_config.recipe"))
        for module in model.modules():
            if hasattr(module, "original"):
                module.original = None
        if hasattr(self.config, "schemes"):
            check_description(self.config.schemes, model, "quantization_config.schemes")
        check_files([Path(f) for f in checkpoint_files or ()], self.config.files, model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        set_execution(model, "integer")
        return model


def check_files(files: Sequence[Path], digests: dict[str, str], model: Any) -> None:
    """Compare the files with what was exported and with what the model expects; name every mismatch at once.

    A text model may read a multimodal checkpoint: its tensors are compared under the names that it gives them.
    Raises QDeltaNetError before a single tensor is loaded.
    """
    problems = [f"{name} is missing" for name in digests if name not in {f.name for f in files}]
    own_name = _own_names(model)
    headers, unreadable = read_headers(files)
    found = {name: header for key, header in headers.items() if (name := own_name(key)) is not None}
    problems += unreadable.values()
    changed = [f.name for f in files if f.name not in unreadable and digests.get(f.name) != sha256_file(f)]
    problems += [f"{name} is not the file that was exported (sha256 differs)" for name in changed]
    problems += _mismatches(found, model) if found else []
    if problems:
        raise QDeltaNetError("damaged checkpoint: " + "; ".join(problems) + "; export it again")


def _own_names(model: Any) -> Callable[[str], str | None]:
    """The name of a file's tensor in this model, as transformers will rename it; None for what the class leaves out."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    left_out = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def own_name(key: str) -> str | None:
        name, _ = rename_source_key(key, renamings, [])
        return None if any(pattern.search(name) for pattern in left_out) else name

    return own_name


def _mismatches(headers: dict[str, tuple[tuple[int, ...], str]], model: Any) -> list[str]:
    found = {name: (shape, DTYPES.get(dtype, dtype)) for name, (shape, dtype) in headers.items()}
    expected = {k: (tuple(v.shape), v.dtype) for k, v in exported_tensors(model).items()}
    problems = [f"missing tensor {k}" for k in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected tensor {k}" for k in sorted(found.keys() - expected.keys())]
    for key in sorted(expected.keys() & found.keys()):
        (shape, dtype), (own_shape, own_dtype) = expected[key], found[key]
        if shape != own_shape:
            problems.append(f"{key} has shape {list(own_shape)}, expected {list(shape)}")
        if dtype != own_dtype and not (dtype.is_floating_point and own_dtype in FLOATS):
            problems.append(f"{key} is {own_dtype}, expected {dtype}")
    return problems

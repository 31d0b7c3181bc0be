"""A model larger than memory: on the meta device, its decoder layers' weights come and go one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends import check_device
from ..core import QDeltaNetError, unknown
from .adapters import adapter_for
from .check import check_files
from .fingerprint import float_name, is_hashed, model_fingerprint
from .load import DTYPES, explain
from .partial import PartialCheckpoint, checkpoint_files


class StreamedModel:
    """A float model of which one decoder layer at a time is in memory.

    model: on the meta device but for small constant buffers; hand it to `quantize_model` and to everything that only
    looks at it. Within `layer(index)` the weights of that layer are there, and `run` sends tokens through it by the
    model's own forward: embeddings, masks and positions are the family's. dtype: as for `load_model`.
    Raises QDeltaNetError as `load_model` does.
    """

    def __init__(self, name: str, dtype: str = "float32", device: str = "cpu") -> None:
        check_device(device)
        self.name, self.device = name, device
        self.model = meta_model(name, dtype, device)
        self._checkpoint = PartialCheckpoint(name, checkpoint_files(name), self.model, device)
        self._path, self._list = _decoder_layers(self.model)
        self._embed_rows()

    def __len__(self) -> int:
        """Number of decoder layers."""
        return len(self._list)

    def fingerprint(self) -> str:
        """`model_fingerprint` of the loaded model; only its small tensors are read."""
        return model_fingerprint(self.model, self._checkpoint.load(is_hashed))

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Weights of one decoder layer in memory; scales that were filled in are forgotten with them."""
        prefix = f"{self._path}.{index}"
        layer, layers = self._list[index], list(self._list)
        loaded = self._checkpoint.load(lambda name: name.startswith(f"{prefix}."))
        for i in range(len(layers)):
            self._list[i] = layer if i == index else _Handed() if i < index else _Stop()
        before = [(m, dict(m._parameters), dict(m._buffers)) for m in layer.modules()]
        try:
            _fill(layer, prefix, loaded, self.device)
            del loaded
            yield layer
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            for i, other in enumerate(layers):
                self._list[i] = other

    def run(self, index: int, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """What reaches the next decoder layer, [B, T, D], within `layer(index)`.

        tokens: int64 [B, T]. hidden: what reaches this layer, as `run` of the layer before gave it; None for layer 0.
        """
        layer = self._list[index]
        hooks = [] if hidden is None else [layer.register_forward_pre_hook(_entering(hidden), with_kwargs=True)]
        if index + 1 == len(self):
            hooks.append(layer.register_forward_hook(_leaving))
        try:
            with torch.no_grad():
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Reached as end:
            return end.hidden
        finally:
            for hook in hooks:
                hook.remove()
        raise QDeltaNetError(f"model {self.name!r}: its forward does not pass its decoder layers one by one")

    def _embed_rows(self) -> None:
        """Embeddings are read row by row: the matrix of a large vocabulary may be larger than a layer."""
        embedding = self.model.get_input_embeddings()
        name = next(n for n, module in self.model.named_modules() if module is embedding)
        if type(embedding) is not nn.Embedding:
            raise QDeltaNetError(f"model {self.name!r}: {name} is a {type(embedding).__name__}, not an Embedding")
        embedding.forward = partial(self._checkpoint.rows, f"{name}.weight")  # type: ignore[method-assign]


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Handed(nn.Module):
    """In the place of a layer before the one that is there."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Stop(nn.Module):
    """In the place of a layer after it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Reached(_tensor(hidden_states))


def _leaving(module: nn.Module, args: Any, output: Any) -> NoReturn:
    raise _Reached(_tensor(output))


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise QDeltaNetError(f"a decoder layer gives a {type(output).__name__}: calibrate without --layerwise")
    return output


def _entering(hidden: Tensor) -> Any:
    """A hook that hands these hidden states to a layer, whatever came before."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return hook


def _fill(layer: nn.Module, prefix: str, loaded: dict[str, Tensor], device: str) -> None:
    """Put weights in place; buffers of ours are zero until a calibration fills them."""
    for path, module in layer.named_modules(prefix=prefix):
        for name, meta in list(module._parameters.items()):
            if meta is not None:
                value = loaded[float_name(f"{path}.{name}")]
                module._parameters[name] = nn.Parameter(value, requires_grad=meta.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and f"{path}.{name}" in loaded:
                module._buffers[name] = loaded[f"{path}.{name}"]
            elif buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    adapter = adapter_for(model.config)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(adapter.is_layer(m) for m in module.modules()):
            return name, module
    raise QDeltaNetError("the model has no Gated DeltaNet (linear_attention) layer to quantize")


def meta_model(name: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """The causal language model that `load_model` loads, on the meta device; its buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if Path(name).is_dir():
        check_files(Path(name))
    try:
        config = AutoConfig.from_pretrained(name)
        chosen = config.get_text_config().dtype if dtype == "auto" else getattr(torch, dtype)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen or torch.float32)
    except Exception as e:  # transformers and hub each have their own
        raise QDeltaNetError(explain("model", name, e)) from e
    if getattr(config, "quantization_config", None) is not None:
        raise QDeltaNetError(f"model {name!r} is quantized already: a calibration is made from a float model")
    model.name_or_path = name  # a text part has a config of its own
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
    return model.eval()

"""Parts of a checkpoint, loaded as transformers loads the whole: keys renamed, experts merged, dtypes cast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..core import QDeltaNetError
from .check import INDEX, SINGLE, check_loaded
from .load import explain

NOTHING: dict[str, Any] = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}


class PartialCheckpoint:
    """Weights of a checkpoint by their names in the model, chosen by name, and read anew each time.

    name: of the model, for messages. files: safetensors. model: on the meta device, before `quantize_model`; gets its
    tied weights tied. Weights that need no cast and no merging are views of the mapped file. Raises QDeltaNetError as
    `load_model`: before any weight is read where the checkpoint does not fit the model, and from `load` for NaN.
    """

    def __init__(self, name: str, files: Collection[str], model: Any, device: str = "cpu") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.name, self.device = name, device
        self._model = deepcopy(model).to("meta")
        self._names = self._model.state_dict()
        self._mapping = get_model_conversion_mapping(self._model)
        self._keys: dict[str, tuple[str, str]] = {}  # of the checkpoint -> file, name in the model
        headers = self._headers(files)
        info = self._convert(headers, "meta")
        self._compare_copies(model, info.missing_keys)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        check_loaded(name, model, info.to_dict())

    def load(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Parameters and persistent buffers whose names in the model are wanted, in the model's dtypes."""
        keys = {key: file for key, (file, target) in self._keys.items() if wanted(target)}
        with _opened(set(keys.values())) as files:
            self._convert({key: files[file].get_slice(key) for key, file in keys.items()}, self.device)
        check_loaded(self.name, self._model, NOTHING)
        loaded = {n: x.data for n, x in self._model.state_dict(keep_vars=True).items() if not x.is_meta}
        self._model.to("meta")
        return loaded

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows [*index, width] of a matrix in the model's dtype; of the mapped file only their pages are read."""
        with self._mapped(name) as weight:
            found = nn.functional.embedding(index.cpu(), weight)
        return found.to(self.device, self._names[name].dtype)

    @contextmanager
    def _mapped(self, name: str) -> Iterator[Tensor]:
        """A weight as the checkpoint has it, under this name or one that is tied to it."""
        names = [name, *(k for k, v in self._model.all_tied_weights_keys.items() if v == name)]
        places = {target: (key, file) for key, (file, target) in self._keys.items() if target in names}
        key, file = next(places[n] for n in names if n in places)
        with _opened({file}) as files:
            yield files[file].get_slice(key)[...]

    def _headers(self, files: Collection[str]) -> dict[str, Tensor]:
        """The checkpoint without its data. All that depends on it alone is found by loading this."""
        headers: dict[str, Tensor] = {}
        with _opened(set(files)) as opened:
            for path, file in opened.items():
                for key in file.keys():  # noqa: SIM118 (it is no mapping)
                    shape = file.get_slice(key).get_shape()
                    headers[key] = torch.empty(shape, dtype=self._model.dtype, device="meta")
                    self._keys[key] = (path, self._target(key))
        return headers

    def _compare_copies(self, model: Any, missing: set[str]) -> None:
        """Weights that are stored although the model ties them: equal ones count as missing, others are not tied."""
        there = {target for _, target in self._keys.values()}
        for copy, source in self._model.all_tied_weights_keys.items():
            if {copy, source} <= there:
                with self._mapped(copy) as a, self._mapped(source) as b:
                    equal = torch.equal(a, b)
                if equal:
                    missing.add(copy)
                else:
                    del model.all_tied_weights_keys[copy]

    def _target(self, key: str) -> str:
        """The name in the model; where a tensor becomes several, the first of them: they stand in one layer."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        prefix = self._model.base_model_prefix
        target = rename_source_key(key, renamings, converters, prefix, self._names)[0]
        if target not in self._names and key in self._names:
            target = rename_source_key(key, [], [], prefix, self._names)[0]
        return str(target)

    def _convert(self, state: dict[str, Any], device: str) -> Any:
        """Through transformers' own loading into the model that is otherwise kept on the meta device."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = self._model.dtype
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self._model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,  # type: ignore[arg-type]  # its own type is too narrow
        )
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(self._model, state, config)
        return info


def checkpoint_files(name: str) -> list[str]:
    """The safetensors files of a directory or hub id, downloaded where necessary. Raises QDeltaNetError for none."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    try:
        single = cached_file(name, SINGLE, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return [single]
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            return list(get_checkpoint_shard_files(name, index)[0])
    except Exception as e:  # transformers and hub each have their own
        raise QDeltaNetError(explain("model", name, e)) from e
    raise QDeltaNetError(f"model {name!r}: it has neither {SINGLE} nor {INDEX}; only safetensors are read")


@contextmanager
def _opened(files: set[str]) -> Iterator[dict[str, Any]]:
    from safetensors import safe_open

    with ExitStack() as stack:
        yield {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a progress bar per load."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()

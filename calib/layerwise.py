"""Calibration of a model larger than memory: one decoder layer's weights at a time, hidden states on disk.

Every pass of the calibration runs over one layer, then over the next. What a layer makes of the calibration set is the
input of the next one; layer by layer, that is what the whole model would compute.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._processes import current
from .._threads import threads as pinned_threads
from ..checkpoint import Calibration
from ..core import QDeltaNetError
from ..models import StreamedModel, quantize_model, quantized_layers, weights_digest
from ..recipe import Recipe
from .data import Samples
from .hidden import HiddenStates
from .passes import Layers, Made, Pass, SummingWatcher, passes
from .request import request_of
from .run import Progress, Ticker, run_pass
from .session import Resume, Session
from .state_file import read_state, write_state


def calibrate_layerwise(
    path: str,
    recipe: Recipe,
    samples: Samples,
    *,
    resume: Resume,
    model_name: str = "",
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """What `calibrate` makes of the model at `path`, to the bit, in the memory of one layer and one batch.

    path, dtype, device: as `load_model`. resume: its folder takes the hidden states (two files of samples x tokens x
    hidden size in the dtype) and what finished layers gave. The same call goes on there after an interruption, at the
    layer at which it was. `resume.remove()` once the result is written, not before: it is mapped from there.
    progress(done, total): batches, over all layers that are needed. The rest is as for `calibrate`.

    Raises QDeltaNetError as `calibrate` and `load_model` do, and where the disk is too full for the hidden states.
    """
    if batch_size < 1:
        raise QDeltaNetError(f"batch size {batch_size}: must be at least 1")
    if resume.folder is None:
        raise QDeltaNetError("a calibration layer by layer needs a folder for hidden states: resume=Resume(folder)")
    with pinned_threads(threads or torch.get_num_threads()) as count:
        model = StreamedModel(path, dtype, device)
        quantize_model(model.model, recipe)
        request = request_of(
            model_name=model_name, fingerprint=model.fingerprint(), weights=weights_digest(model.model),
            dtype=model.model.dtype, device=torch.device(device), recipe=recipe, samples=samples, batch_size=batch_size,
            threads=count,
        )  # fmt: skip
        made = LayerByLayer(model, recipe, samples.tokens, batch_size, resume).run(request, progress)
    return Calibration(recipe, made.scales, {"version": 1, **request, "layers": made.layers}, made.weights)


class LayerByLayer:
    """The passes of each layer, and the records of those that are finished."""

    def __init__(self, model: StreamedModel, recipe: Recipe, tokens: Tensor, batch_size: int, resume: Resume) -> None:
        assert resume.folder is not None
        self.model, self.tokens = model, tokens
        self.resume, self.folder = resume, resume.folder
        self.rows = torch.arange(len(tokens)).split(batch_size)
        self.plan = dict(_plan(quantized_layers(model.model), recipe))
        width = model.model.config.get_text_config().hidden_size
        self.hidden = HiddenStates(self.folder, (*tokens.shape, width), model.model.dtype)

    def run(self, request: Mapping[str, Any], progress: Progress | None) -> Made:
        """All layers that no earlier run has finished, and what was made of all of them."""
        processes = current()
        if len(set(processes.gather(platform.node()))) > 1:
            raise QDeltaNetError("--layerwise shares hidden states through files: start all processes on one machine")
        tick = Ticker(progress, sum(map(len, self.plan.values())) * len(self.rows))
        whole_passes = replace(self.resume, every=float("inf"))
        with closing(Session(whole_passes, {**request, "layerwise": True}, processes)) as session:
            start = processes.agree(self._finished(session.key) if processes.first else 0)
            tick(sum(len(own) for index, own in self.plan.items() if index < start) * len(self.rows))
            if processes.first and start < len(self.plan) > 1:
                self.hidden.reserve(start)
            processes.gather(None)
            for index in range(start, len(self.plan)):
                self._run_layer(index, session, tick)
            processes.gather(None)
            return self._made(session.key)

    def _run_layer(self, index: int, session: Session, tick: Ticker) -> None:
        """Every pass, then the record. The last pass hands on what the layer gives: it is never half done."""
        made, (*before, last) = Made(), self.plan[index]
        hands_on = index + 1 < len(self.plan)
        with self.model.layer(index) as layer:
            alone = OneLayer(self, index, layer)
            for one in before:
                run_pass(alone, one, quantized_layers(alone), made, self.rows, session, tick)
            if hands_on and session.processes.first:
                self.hidden.prepare(index + 1)
            session.processes.gather(None)
            alone.hands_on = hands_on
            unsaved = Session(Resume(), session.request, session.processes)
            run_pass(alone, last, quantized_layers(alone), made, self.rows, unsaved, tick)
        if session.processes.first:
            if hands_on:
                self.hidden.sync(index + 1)
            self._record(index, session.key, made)
        session.processes.gather(None)

    # -- records -------------------------------------------------------------------------------------------------------

    def _file(self, index: int) -> Path:
        return self.folder / f"finished-{index:05}.safetensors"

    def _finished(self, key: str) -> int:
        """How many layers are. Raises QDeltaNetError for a record that is damaged, now and not at the end."""
        there = next(i for i in range(len(self.plan) + 1) if not self._file(i).exists())
        for index in range(there):
            read_state(self._file(index), key)
        return there

    def _record(self, index: int, key: str, made: Made) -> None:
        state = {f"scales/{k}": x for k, x in made.scales.items()} | {
            f"weights/{k}": x for k, x in made.weights.items()
        }
        write_state(self._file(index), key, [], {index: {**state, "report": made.layers}})
        for path in self.folder.glob(f"{_prefix(index)}*"):
            path.unlink(missing_ok=True)

    def _made(self, key: str) -> Made:
        """From all records; tensors are views of the mapped files."""
        made = Made()
        for index in range(len(self.plan)):
            state = read_state(self._file(index), key).layers[index]
            made.layers |= state.pop("report")
            for place, tensor in state.items():
                kind, _, name = place.partition("/")
                (made.scales if kind == "scales" else made.weights)[name] = tensor
        return made


class OneLayer(nn.Module):
    """A decoder layer as a model whose inputs are numbers of samples [B].

    hands_on: whether what it gives is kept for the next layer.
    """

    def __init__(self, work: LayerByLayer, index: int, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer})
        self.index, self.hands_on = index, False
        self._work = work

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> None:
        """Named as the arguments of a model."""
        work, rows = self._work, input_ids.cpu()
        hidden = work.hidden.read(self.index, rows).to(work.model.device) if self.index else None
        given = work.model.run(self.index, work.tokens[rows], hidden)
        if self.hands_on:
            work.hidden.write(self.index + 1, rows, given)


class InLayer:
    """A pass of one layer: its state has a name of its own."""

    def __init__(self, one: Pass, index: int) -> None:
        self.name = _prefix(index) + one.name
        self.watchers, self.finish = one.watchers, one.finish


class ThroughPass:
    """Nothing is watched: the layer only hands on."""

    name = "through"

    def watchers(self, layers: Layers) -> Mapping[int, SummingWatcher]:
        return {}

    def finish(self, layers: Layers, watchers: Mapping[int, SummingWatcher], made: Made) -> None:
        """Nothing was made."""


def _prefix(index: int) -> str:
    return f"layer{index:05}."


def _plan(layers: Layers, recipe: Recipe) -> Iterator[tuple[int, list[Pass]]]:
    """The passes of every decoder layer up to the last in which something is quantized."""
    for index in range(max(layers) + 1):
        own = {index: layers[index]} if index in layers else {}
        watched: list[Pass] = [one for one in passes(recipe) if one.watchers(own)]
        yield index, [InLayer(one, index) for one in watched or [ThroughPass()]]

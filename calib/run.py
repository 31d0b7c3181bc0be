"""The calibration: run the float model over the data, watch every site, propose scales, measure what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from .._processes import current
from .._threads import threads as pinned_threads
from ..checkpoint import Calibration
from ..core import QDeltaNetError
from ..models import (
    ensure_quantized,
    execution_device,
    model_fingerprint,
    quantized_layers,
    set_execution,
    weights_digest,
)
from ..recipe import Recipe
from .data import Samples
from .passes import Layers, Made, Pass, Watcher, passes
from .request import request_of
from .session import Resume, Session

Progress = Callable[[int, int], None]


def calibrate(
    model: Any,
    recipe: Recipe,
    samples: Samples,
    *,
    model_name: str = "",
    batch_size: int = 8,
    progress: Progress | None = None,
    threads: int | None = None,
    resume: Resume | None = None,
) -> Calibration:
    """Quantize `model` in place (execution stays float) and calibrate it.

    Two passes over the samples: one proposes ranges, one measures SQNR and saturation of each site at its scale; a
    third where projections are coded by GPTQ. progress(done, total) counts batches of all processes. threads: of torch
    meanwhile, on which float sums depend (default: as many as it is set to). resume: where the state is kept from which
    the same call goes on after an interruption; `resume.remove()` once the result is written. Processes that a launcher
    started and `joined` brought together call this alike and share the batches. The result is the same to the bit
    however often it was interrupted, and for any number of processes.

    Raises QDeltaNetError for a batch size below 1, for a model that another recipe has quantized, for state of another
    request, or if another process is gone, and NonFiniteError that names layer and site where NaN or Inf appears.
    """
    if batch_size < 1:
        raise QDeltaNetError(f"batch size {batch_size}: must be at least 1")
    with pinned_threads(threads or torch.get_num_threads()) as count:
        layers = ensure_quantized(model, recipe)
        request = request_of(
            model_name=model_name, fingerprint=model_fingerprint(model), weights=weights_digest(model),
            dtype=model.dtype, device=execution_device(model), recipe=recipe, samples=samples, batch_size=batch_size,
            threads=count,
        )  # fmt: skip
        batches = samples.tokens.split(batch_size)
        planned = passes(recipe)
        tick = Ticker(progress, len(planned) * len(batches))
        made = Made()
        with closing(Session(resume or Resume(), request, current())) as session:
            for one in planned:
                run_pass(model, one, layers, made, batches, session, tick)
        calibration = Calibration(recipe, made.scales, {"version": 1, **request, "layers": made.layers}, made.weights)
        calibration.apply(model)
    return calibration


class Ticker:
    """progress(done, total), one call after the other."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, batches: int = 1) -> None:
        self.done += batches
        if self.progress is not None:
            self.progress(self.done, self.total)


def run_pass(
    model: Any,
    one: Pass,
    layers: Layers,
    made: Made,
    batches: Sequence[Tensor],
    session: Session,
    tick: Ticker,
) -> None:
    """All batches that no earlier run has done, in turns of one per process, so that all go on or fail together."""
    processes = session.processes
    watchers = one.watchers(layers)
    done = session.restore(one.name, watchers)
    if done:
        tick(len(done))
    with watching(model, watchers):
        for turn in _turns([i for i in range(len(batches)) if i not in done], processes.world):
            for index in turn[processes.rank : processes.rank + 1]:
                forward(model, batches[index])
                session.finished(one.name, watchers, index)
            processes.gather(None)  # so that all end soon after one has failed
            tick(len(turn))
    whole = session.whole(one.name, watchers, lambda: one.watchers(layers))
    one.finish(layers, whole, made)


def _turns(batches: Sequence[int], world: int) -> Iterator[Sequence[int]]:
    """One batch per process at a time; the last turn may be shorter."""
    for start in range(0, len(batches), world):
        yield batches[start : start + world]


def forward(model: Any, batch: Tensor) -> None:
    """One batch [B, T] through the model, for those who watch."""
    with torch.no_grad():
        model(input_ids=batch.to(execution_device(model)), use_cache=False)


class _Nobody:
    """Looks at nothing."""

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        pass

    def projection(self, name: str, x: Tensor) -> None:
        pass


_NOBODY = _Nobody()


@contextmanager
def watching(model: Any, watchers: Mapping[int, Watcher]) -> Iterator[None]:
    """The model runs in float and shows the inside of these layers; watchers come off whatever happens.

    The others run as if they were watched (with the decay and the rotations of their scheme), so that what reaches a
    layer is the same in every pass.
    """
    layers = quantized_layers(model)
    set_execution(model, "observe")
    for index, layer in layers.items():
        one = watchers.get(index, _NOBODY)
        layer.observe(one.site, one.projection)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.stop_observing()
        set_execution(model, "float")


def run_watched(model: Any, watchers: Mapping[int, Watcher], batches: Iterable[Tensor], tick: Ticker) -> None:
    """One float pass over batches [B, T] with watchers by layer."""
    with watching(model, watchers):
        for batch in batches:
            forward(model, batch)
            tick()

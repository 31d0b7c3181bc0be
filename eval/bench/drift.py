"""Drift over long sequences: state and output of the integer rule against float, in chunks and token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...backends import AUTO, get_backend
from ...core import Arithmetic, FloatArithmetic, IntegerArithmetic, QDeltaNetError, relative_error, rotate_state
from ...delta_rule import SITES, run_rule
from ...inverse import Plan, plan
from ...models import delta_net_layers
from ...nn import GatedDeltaNet

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Progress = Callable[[int, int], None]
Row = dict[str, Any]
MODES = ("chunks", "decode")

# How the state is held, as settings of its site; every other site as in recipe int8. `channel`: a scale per value
# channel; `step`: a scale of its own at every chunk or token; `carried`: held in INT16, read as INT8.
STATES: dict[str, tuple[str, ...]] = {
    "float": ("format=float",),
    "int16": ("format=int16",),
    "int8": (),
    "int8 feedback": ("feedback=int8",),
    "int8 channel": ("granularity=per_channel",),
    "int8 channel feedback": ("granularity=per_channel", "feedback=int8"),
    "int8 step": ("scale=dynamic",),
    "int8 step feedback": ("scale=dynamic", "feedback=int8"),
    "int8 carried": ("carry=int16",),
}


class _Recorded:
    """A wiring that remembers the inputs that it made for the rule."""

    def __init__(self, wiring: Any) -> None:
        self._wiring = wiring
        self.seen: list[Sequence[Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wiring, name)

    def inputs(self, *arguments: Any) -> Any:
        made = self._wiring.inputs(*arguments)
        self.seen.append([x.detach().float() for x in made[:5]])
        return made


def rule_inputs(model: Any, tokens: Tensor, batch_size: int = 8) -> Inputs:
    """q, k, v, g, beta of every Gated DeltaNet of a float model on tokens [N, L], as one sequence [1, N L, heads, ...].

    The windows are joined end to end, the layers stand side by side as heads: one pass of the rule runs them all.
    """
    layers = list(delta_net_layers(model).values())
    recorded = [_Recorded(layer.wiring) for layer in layers]
    for layer, wiring in zip(layers, recorded, strict=True):
        layer.wiring = wiring  # type: ignore[assignment]
    try:
        with torch.no_grad():
            for batch in tokens.split(batch_size):
                model(input_ids=batch, use_cache=False)
    finally:
        for layer, wiring in zip(layers, recorded, strict=True):
            layer.wiring = wiring._wiring
    of_layers = [[torch.cat(x).flatten(0, 1)[None] for x in zip(*w.seen, strict=True)] for w in recorded]
    q, k, v, g, beta = (torch.cat(x, dim=2) for x in zip(*of_layers, strict=True))
    return q, k, v, g, beta


def arithmetic_of(model: Any) -> tuple[IntegerArithmetic, Plan]:
    """The integer arithmetic of all Gated DeltaNets of a calibrated model side by side, and their plan.

    A scheme with float sites runs as fake quantization, which is the same numbers. Dynamic scales per tensor would
    span the layers. Raises QDeltaNetError where layers differ in their schemes.
    """
    layers = list(delta_net_layers(model).values())
    first = layers[0]
    if first.bound is None or any(x.bound != first.bound or x.scheme.plan != first.scheme.plan for x in layers):
        raise QDeltaNetError("bench drift runs all layers at once: the recipe must quantize the rule, and all alike")
    is_float = any(s.format is None for s in first.bound.sites.values())
    backend = get_backend("fake" if is_float else AUTO, "cpu")
    scales = {spec.key: _heads(layers, spec.key, spec.site) for spec in first.specs}
    return IntegerArithmetic(first.bound, scales, backend, allow_float=is_float), first.scheme.plan


def _heads(layers: Sequence[GatedDeltaNet], key: str, site: str) -> Tensor:
    """A static scale of all layers, [heads of all, R or 1, C or 1]."""
    scales = [layer.scales.as_dict()[key] for layer in layers]
    per_key_head = site in SITES and SITES[site].heads == "key"
    counts = [layer.dims.key_heads if per_key_head else layer.dims.value_heads for layer in layers]
    return torch.cat([s.expand(n, *s.shape[1:]) for s, n in zip(scales, counts, strict=True)])


def positions(tokens: int, chunk_size: int) -> list[int]:
    """Ends of chunks at which to look: powers of two times 1 and 1.5, and the end.

    >>> positions(1024, 64)
    [64, 128, 192, 256, 384, 512, 768, 1024]
    """
    found, step = {tokens}, chunk_size
    while step < tokens:
        found |= {step, step * 3 // 2}
        step *= 2
    return sorted(p for p in found if p <= tokens and p % chunk_size == 0)


@dataclass(frozen=True)
class Track:
    """One sequence to follow. inputs: of the rule, [1, T, ...]. ends: positions at which to look, the last is T."""

    inputs: Inputs
    ends: Sequence[int]

    def follow(self, arithmetic: Arithmetic, p: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Output [H, t, V] since the position before and state [H, K, V] at each position; the state runs through."""
        state, start = None, 0
        for end in self.ends:
            q, k, v, g, beta = (x[:, start:end] for x in self.inputs)
            with torch.no_grad():
                output, state = run_rule(
                    q, k, v, g, beta, state,
                    arithmetic=arithmetic, plan=p, normalise=True, chunk_size=p.chunk_size,
                )  # fmt: skip
            yield output[0].transpose(0, 1), rotate_state(state.real(), arithmetic.rotate)[0]
            start = end

    @cached_property
    def exact(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.follow(FloatArithmetic(), plan(chunk_size=64)))

    def errors(self, arithmetic: IntegerArithmetic, p: Plan, tick: Callable[[], None]) -> Iterator[Row]:
        """Relative Frobenius errors per head: median and worst of them, at each position."""
        for end, exact, found in zip(self.ends, self.exact, self.follow(arithmetic, p), strict=True):
            output, state = (relative_error(x, y) for x, y in zip(exact, found, strict=True))
            yield {
                "position": end,
                "output_median": float(output.median()),
                "output_worst": float(output.amax()),
                "state_median": float(state.median()),
                "state_worst": float(state.amax()),
                "state_clipped": arithmetic.saturated["state"],
            }
            tick()


def drift(
    models: Mapping[str, Any], tokens: Tensor, modes: Sequence[str] = MODES, progress: Progress | None = None
) -> list[Row]:
    """A row per model, mode and position: errors of state and output over all layers and heads against float.

    models: by the name of their row, quantized and calibrated; they differ only in that. tokens: [N, L], joined end to
    end; N L a multiple of the chunk size. Mode `chunks` is prefill, `decode` requantizes the state at every token.
    Raises QDeltaNetError as `arithmetic_of`, and for lengths that are no whole chunks.
    """
    chunk_size = max(arithmetic_of(model)[1].chunk_size for model in models.values())  # all are tried before the work
    if tokens.numel() % chunk_size:
        raise QDeltaNetError(f"{tokens.numel()} tokens are no whole chunks of {chunk_size}")
    track = Track(rule_inputs(next(iter(models.values())), tokens), positions(tokens.numel(), chunk_size))
    done, total = 0, len(models) * len(modes) * len(track.ends)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows: list[Row] = []
    for mode in modes:
        for name, model in models.items():
            arithmetic, whole = arithmetic_of(model)
            p = whole if mode == "chunks" else plan("identity", 1)
            rows += [{"state": name, "mode": mode, **row} for row in track.errors(arithmetic, p, tick)]
    return rows


def growth(rows: Sequence[Row], key: str) -> float:
    """Mean error at positions of the last eighth of a sequence / at those from 1/64 to 1/8; about 1 on a plateau."""
    last = rows[-1]["position"]
    late = [r[key] for r in rows if r["position"] > last / 8]
    early = [r[key] for r in rows if last / 64 < r["position"] <= last / 8]
    return (sum(late) / len(late)) / (sum(early) / len(early))


def slow_down(model: Any, factor: float) -> None:
    """Divide every log decay of a quantized model by a factor, in place: memories last that much longer.

    Raises QDeltaNetError for a family whose decay is not scaled by A_log.
    """
    if factor == 1:
        return
    for index, layer in delta_net_layers(model).items():
        log_decay = getattr(layer, "A_log", None)
        if not isinstance(log_decay, Tensor):
            raise QDeltaNetError(f"layer {index} has no A_log: its decay cannot be slowed down")
        log_decay.data.sub_(math.log(factor))

"""What the inverse meets in a model: the matrices A of its layers, and what each method would lose on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import QDeltaNetError
from ..delta_rule.laboratory import exact_inverse
from ..delta_rule.measure import Specimens, Trial
from ..inverse import INPUT, Plan, plan
from ..inverse.points import published_neumann
from ..models import delta_net_layers, quantize_model
from ..nn import GatedDeltaNet
from ..recipe import load_recipe
from .data import Samples
from .run import Ticker, run_watched

Progress = Callable[[int, int], None]
FORMATS = ("int8", "int4")
BINS = {"1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8-15": (8, 15), "16+": (16, None)}


@dataclass(frozen=True)
class Capture:
    """A of one layer, float64 [H, M, C, C]: M of the `seen` chunks, a random choice with a fixed seed.

    limit: what |A_ij| and |T_ij| stay within, the layer's largest beta.
    """

    A: Tensor
    seen: int
    limit: float


class Keeper:
    """Observer of one layer that keeps at most `keep` chunks (reservoir sampling), for all heads the same ones."""

    def __init__(self, keep: int, seed: int = 0) -> None:
        self.keep, self.seen = keep, 0
        self.kept: list[Tensor] = []
        self._make = torch.Generator().manual_seed(seed)

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        """x: [N, B, H, C, C] where the site is A; each sequence's chunks are taken in turn."""
        if site != INPUT:
            return
        for chunk in x.transpose(0, 1).flatten(0, 1):
            place = self.seen if self.seen < self.keep else int(torch.randint(self.seen + 1, (), generator=self._make))
            self.seen += 1
            if place < len(self.kept):
                self.kept[place] = chunk.to("cpu", torch.float32, copy=True)
            elif place < self.keep:
                self.kept.append(chunk.to("cpu", torch.float32, copy=True))

    def projection(self, name: str, x: Tensor) -> None:
        """Only the rule's sites are watched."""


def capture(
    model: Any,
    samples: Samples,
    *,
    layer: int | None = None,
    keep: int = 64,
    batch_size: int = 8,
    chunk_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, Capture]:
    """Run a float model over samples and keep matrices A of its Gated DeltaNet layers, by layer index.

    The layers are replaced in place and stay float. Memory: keep * H * C^2 float32 per layer. Raises QDeltaNetError for
    a layer that is none of them, keep or batch size below 1, a chunk size that is no power of two, or NaN in A.
    """
    for name, value in (("keep", keep), ("batch size", batch_size)):
        if value < 1:
            raise QDeltaNetError(f"{name} {value}: must be at least 1")
    recipe = load_recipe("float", [f"chunk_size={chunk_size}"])
    layers = delta_net_layers(model) or quantize_model(model, recipe)
    own = {index: x.scheme.plan.chunk_size for index, x in layers.items() if x.scheme.plan.chunk_size != chunk_size}
    if own:
        raise QDeltaNetError(
            f"chunk size {chunk_size}: the model is quantized with {min(own.values())}; inspect it with that"
        )
    if layer is not None and layer not in layers:
        known = ", ".join(map(str, layers))
        raise QDeltaNetError(f"layer {layer} is no Gated DeltaNet; layers are {known}")
    layers = layers if layer is None else {layer: layers[layer]}
    keepers = {index: Keeper(keep, seed) for index in layers}
    batches = samples.tokens.split(batch_size)
    run_watched(model, keepers, batches, Ticker(progress, len(batches)))
    return {index: _captured(index, layers[index], keeper) for index, keeper in keepers.items()}


def _captured(index: int, layer: GatedDeltaNet, keeper: Keeper) -> Capture:
    A = torch.stack(keeper.kept, 1).double()
    if not bool(A.isfinite().all()):
        raise QDeltaNetError(f"layer {index}: A holds NaN or infinity; check the model's weights and inputs")
    return Capture(A, keeper.seen, float(layer.dims.beta_max))


# -- what the matrices are like ----------------------------------------------------------------------------------------


def power_ranges(A: Tensor) -> dict[int, list[float]]:
    """max |entry of A^n| per head for n = 1, 2, 4 .. C / 2. A: [H, M, C, C]."""
    found, n, power = {}, 1, A.double()
    while n < A.shape[-1]:
        found[n] = power.abs().flatten(1).amax(1).tolist()
        power, n = power @ power, 2 * n
    return found


def energy_by_distance(T: Tensor) -> dict[str, list[float]]:
    """Share of the squares of T - I by i - j, per head; all 0 where T = I. T: [H, M, C, C]."""
    size = T.shape[-1]
    distance = torch.arange(size)[:, None] - torch.arange(size)
    squares = T.tril(-1).square().sum(1)
    total = squares.sum((-1, -2)).clamp(min=torch.finfo(torch.float64).tiny)
    found = {}
    for name, (low, high) in BINS.items():
        inside = (distance >= low) & (distance <= (size if high is None else high))
        found[name] = (squares * inside).sum((-1, -2)).div(total).tolist()
    return found


def loss_plans(chunk_size: int) -> dict[str, Plan]:
    """The default, the published method, and its truncated series alone."""
    published = published_neumann(chunk_size)
    return {
        "default": plan(chunk_size=chunk_size),
        "neumann": plan("neumann", chunk_size, **published),
        "truncated": plan("neumann", chunk_size, **{**published, "residual_steps": 1}),
    }


def losses(captured: Capture) -> dict[str, dict[str, list[float | None]]]:
    """Worst relative error of T per head by method and format; None where T overflows.

    Static scales as the default recipes have them, from the first half of the matrices; errors on the second half.
    """
    heads = {str(h): captured.A[h : h + 1] for h in range(captured.A.shape[0])}
    specimens = Specimens.of(heads, captured.limit)
    found: dict[str, dict[str, list[float | None]]] = {}
    for name, chosen in loss_plans(captured.A.shape[-1]).items():
        trial = Trial(chosen, specimens)
        for fmt in FORMATS:
            worst = [m.worst for m in trial.measure(fmt).values()]
            found.setdefault(name, {})[fmt] = [x if x < float("inf") else None for x in worst]
    return found


def inspect(captures: Mapping[int, Capture], progress: Progress | None = None) -> dict[str, Any]:
    """layer -> {matrices, seen, heads}, and per head {powers, energy, condition, loss} (largest over its matrices)."""
    report: dict[str, Any] = {}
    for done, (index, captured) in enumerate(captures.items(), 1):
        T = exact_inverse(captured.A)
        columns = {
            "powers": power_ranges(captured.A),
            "energy": energy_by_distance(T),
            "condition": torch.linalg.cond(T).amax(1).tolist(),
            "loss": losses(captured),
        }
        heads = [_of_head(columns, h) for h in range(captured.A.shape[0])]
        report[str(index)] = {"matrices": captured.A.shape[1], "seen": captured.seen, "heads": heads}
        if progress is not None:
            progress(done, len(captures))
    return report


def _of_head(column: Any, head: int) -> Any:
    """One head's share of nested dictionaries that end in a list over heads; keys as JSON has them."""
    if isinstance(column, dict):
        return {str(key): _of_head(value, head) for key, value in column.items()}
    return column[head]

"""A model under search: its layers take any recipe's schemes and scales in turn, and its loss is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import NonFiniteError, QDeltaNetError
from ...delta_rule import LayerScheme, scale_shape, scale_specs
from ...inverse import plan
from ...models import delta_net_layers, execution_device, quantize_model, set_execution
from ...nn import GatedDeltaNet, Scales
from ...recipe import Recipe
from ..data import Samples
from ..run import calibrate

KEPT_BYTES = 2**30  # of float logits; a larger vocabulary has them computed again each time


@dataclass(frozen=True)
class Loss:
    """Per token, in nats: kl of the quantized model's distribution from float's, and nll's increase over float.

    kl is the expected increase of nll if float were right: the logarithm of the ratio of perplexities without the noise
    of the labels. Both are infinite where the model's output is not finite. Tokens that float predicts worse than
    chance (nll above the logarithm of the vocabulary) do not count: its opinion there is not worth keeping.
    """

    kl: float
    nll: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Loss:
        """From `as_list`."""
        return cls(*(math.inf if v is None else v for v in values))

    def as_list(self) -> list[float | None]:
        """[kl, nll] as JSON has them: null for what is infinite."""
        return [v if math.isfinite(v) else None for v in (self.kl, self.nll)]


class Harness:
    """A float model with the base recipe's layers in it, whose schemes and scales are replaced at will.

    samples: the first half calibrates, the second half measures. Raises QDeltaNetError for fewer than two samples, or
    sequences without a next token.
    """

    def __init__(self, model: Any, base: Recipe, samples: Samples, batch_size: int = 8) -> None:
        if len(samples.tokens) < 2 or samples.tokens.shape[1] < 2:
            raise QDeltaNetError("search needs at least 2 samples (half of them measure) of at least 2 tokens")
        if batch_size < 1:
            raise QDeltaNetError(f"batch size {batch_size}: must be at least 1")
        self.model, self.batch_size = model, batch_size
        half = (len(samples.tokens) + 1) // 2
        self.calibrating = Samples(samples.name, samples.tokens[:half], samples.digest)
        self.batches = samples.tokens[half:].split(batch_size)
        self.layers = delta_net_layers(model) or quantize_model(model, base)
        self._kept: list[Tensor] | None = None

    @property
    def dims(self) -> dict[int, Any]:
        return {index: layer.dims for index, layer in self.layers.items()}

    def calibrated(self, recipe: Recipe) -> dict[str, Tensor]:
        """The layers take a recipe, and scales from the ordinary calibration pass, which are returned."""
        for index, layer in self.layers.items():
            set_scheme(layer, recipe.layer(index))
        return dict(calibrate(self.model, recipe, self.calibrating, batch_size=self.batch_size).scales)

    def assume(self, recipe: Recipe, scales: Mapping[str, Tensor]) -> None:
        """The layers take a recipe and the given scales (`layers.<i>.<key>`)."""
        for index, layer in self.layers.items():
            set_scheme(layer, recipe.layer(index))
            layer.scales.fill({key: scales[f"layers.{index}.{key}"] for key in layer.scales.keys})

    def comparable(self, recipe: Recipe) -> bool:
        """Whether a recipe quantizes the projections as the layers hold them, which no search changes."""
        return all(recipe.layer(i).projections == layer.scheme.projections for i, layer in self.layers.items())

    @torch.no_grad()
    def loss(self) -> Loss:
        """In fake execution of what the layers hold, on the second half of the samples.

        Raises QDeltaNetError if no token of that half counts.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        try:
            for i, batch in enumerate(self.batches):
                expected = self._float(i)
                set_execution(self.model, "fake")
                sums += _compared(expected, self._log_probabilities(batch), batch[:, 1:].to(expected.device))
        except NonFiniteError:
            return Loss(math.inf, math.inf)
        if sums[2] == 0:
            raise QDeltaNetError(
                "no token of the second half of the samples counts: float predicts all of them worse than chance, or "
                "not finitely; name text that the model knows (--dataset) or more of it (--samples)"
            )
        kl, nll = (sums[:2] / sums[2]).tolist()
        return Loss(kl, nll) if math.isfinite(kl) else Loss(math.inf, math.inf)

    def _float(self, i: int) -> Tensor:
        """log-probabilities of a batch in float."""
        if self._kept is not None:
            return self._kept[i]
        with self._exact():
            result = self._log_probabilities(self.batches[i])
            if sum(b.numel() for b in self.batches) * result.shape[-1] * 4 <= KEPT_BYTES:
                self._kept = [self._log_probabilities(b) for b in self.batches]
        return result

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Float execution, and by an exact inverse, whatever the plans of the layers are."""
        schemes = {index: layer.scheme for index, layer in self.layers.items()}
        set_execution(self.model, "float")
        try:
            for layer in self.layers.values():
                layer.scheme = replace(layer.scheme, plan=plan("block_merge", layer.scheme.plan.chunk_size))
            yield
        finally:
            for index, scheme in schemes.items():
                self.layers[index].scheme = scheme

    def _log_probabilities(self, batch: Tensor) -> Tensor:
        """float32 [B, T, vocabulary]."""
        logits: Tensor = self.model(input_ids=batch.to(execution_device(self.model)), use_cache=False).logits
        return F.log_softmax(logits.float(), -1)


def set_scheme(layer: GatedDeltaNet, scheme: LayerScheme) -> None:
    """The layer takes another scheme in place; its scales are still empty, its execution is float.

    What its projections are stays: a search changes none.
    """
    layer.scheme, layer.bound = scheme, scheme.bound(layer.dims.key_dim, layer.dims.value_dim)
    layer.specs = scale_specs(layer.bound, scheme.plan)
    layer.scales = Scales({s.key: scale_shape(s, layer.dims, scheme.plan.chunk_size) for s in layer.specs})
    layer.scales.to(execution_device(layer))
    layer.set_execution("float")


def _compared(expected: Tensor, found: Tensor, labels: Tensor) -> Tensor:
    """Sums over the tokens that count of kl and of nll's increase, and their number, float64 [3].

    expected, found: log-probabilities [B, T, vocabulary]; labels: next tokens [B, T - 1].
    """
    expected, found = expected[:, :-1], found[:, :-1]
    kl = (expected.exp() * (expected - found)).sum(-1)
    before, after = (-x.gather(-1, labels[..., None])[..., 0] for x in (expected, found))
    counted = before <= math.log(expected.shape[-1])
    sums = [kl[counted].sum(dtype=torch.float64), (after - before)[counted].sum(dtype=torch.float64), counted.sum()]
    return torch.stack([x.double().cpu() for x in sums])

"""`qdeltanet bench calibrate`: what observing costs beside the plain forward pass of transformers' own model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ...core import Granularity, grouped
from ..embedded import model_path
from ..make_model import SHAPES, make_model
from .timing import Call, Progress, quantile, timed

VOCABULARY = (
    1024  # of random models: a small one, so that the peer does not gain by an output layer that costs us nothing
)


@dataclass(frozen=True)
class Work:
    """Something that observes one batch. verify says whether what it saw is right, and by what that was judged."""

    name: str
    run: Call
    verify: Callable[[], tuple[bool, str]]


@dataclass(frozen=True)
class Cost:
    """A median in ms, that of the plain forward passes between, and their ratio: median, 10th and 90th percentile."""

    model: str
    work: str
    ms: float
    plain_ms: float
    ratio: float
    spread: tuple[float, float]
    verified: bool
    how: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs(
    model: str, plain: Call, works: Sequence[Work], rounds: int, device: str = "cpu", progress: Progress | None = None
) -> list[Cost]:
    """Verify each, then time them in turn, each beside a plain pass of its own, `rounds` times after a warm-up."""
    judged = [work.verify() for work in works]
    times: list[list[tuple[float, float]]] = [[] for _ in works]
    for n in range(rounds + 1):
        for i, work in enumerate(works):
            pair = timed(plain, device) * 1e3, timed(work.run, device) * 1e3
            if n:
                times[i].append(pair)
            if progress is not None:
                progress(n * len(works) + i + 1, (rounds + 1) * len(works))
    return [_cost(model, w.name, t, *j) for w, t, j in zip(works, times, judged, strict=True)]


def _cost(model: str, work: str, times: Sequence[tuple[float, float]], verified: bool, how: str) -> Cost:
    ratios = [ours / plain for plain, ours in times]
    return Cost(
        model=model,
        work=work,
        ms=round(quantile([ours for _, ours in times], 0.5), 3),
        plain_ms=round(quantile([plain for plain, _ in times], 0.5), 3),
        ratio=round(quantile(ratios, 0.5), 3),
        spread=(round(quantile(ratios, 0.1), 3), round(quantile(ratios, 0.9), 3)),
        verified=verified,
        how=how,
    )


class Seen:
    """The obvious observer of one layer, by which others are judged: the largest |x| at every place of a site's tensor,
    and how many elements there were.
    """

    def __init__(self) -> None:
        self.places: dict[str, Tensor] = {}
        self.compact: dict[str, bool] = {}
        self.elements: dict[str, int] = {}

    def site(self, site: str, x: Tensor, compact: bool) -> None:
        """x: [..., H, R, C], compact ones [..., H, n, b, b]."""
        own = x.shape[-4:] if compact else x.shape[-3:]
        place = x.abs().reshape(-1, *own).amax(0)
        self.places[site] = torch.maximum(self.places[site], place) if site in self.places else place
        self.compact[site] = compact
        self.elements[site] = self.elements.get(site, 0) + x.numel()

    def projection(self, name: str, x: Tensor) -> None:
        """Only the rule's sites are compared."""

    def amax(self, site: str, granularity: Granularity) -> Tensor:
        """[h, r, c], as an observer of that granularity has it."""
        return grouped(self.places[site], granularity, self.compact[site]).amax((0, -1))


@contextmanager
def model_directory(name: str, layers: int) -> Iterator[tuple[str, Path | str]]:
    """What to call the model and where it is: an embedded one, a directory or hub id as it is; a shape of
    `qdeltanet.eval.make_model` with random weights and that many decoder layers, for as long as the block lasts."""
    if name not in SHAPES:
        yield name, model_path(name)
        return
    with TemporaryDirectory(prefix="qdeltanet-") as folder:
        path = Path(folder) / name
        make_model(path, name, VOCABULARY, "float32", layers=layers)
        yield f"{name}, {layers} layers, random", path

"""The benchmark of what calibration's observing costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._cli_hardware import KeepMemory, Rounds, Threads
from ._console import Device, Json, Quiet, bar, out, table

if TYPE_CHECKING:
    from torch import Tensor

    from .calib.passes import Watcher
    from .eval.bench.calibrate import Seen, Work
    from .recipe import Recipe

KINDS = ("minmax", "percentile", "mse", "kl")


def bench_calibrate(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Embedded model, directory, hub id, or a shape of qdeltanet.eval.make_model with random weights "
            "(default: tiny-hybrid qwen3.5-0.8b)."
        ),
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Shipped name or YAML file.")] = "int8",
    layers: Annotated[int, typer.Option(min=4, help="Decoder layers of a random model.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="B, sequences.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="T, tokens per sequence.")] = 512,
    device: Device = "cpu",
    rounds: Rounds = 7,
    threads: Threads = 2,
    keep_memory: KeepMemory = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Passes of calibration beside plain float forward passes of transformers' own model over the same batch.

    Every pass is verified before it is timed: observed ranges are those of a second pass that keeps maxima in the
    obvious way. ratio: to the plain pass next to it, median and 10th to 90th percentile of the rounds.
    """
    from .backends import check_device
    from .core.files import write_text
    from .eval.bench import timing
    from .eval.bench.calibrate import model_directory
    from .workflow import versions

    check_device(device)
    kept = keep_memory and timing.keep_memory()
    rows = []
    for name in model or ("tiny-hybrid", "qwen3.5-0.8b"):
        with timing.threads(threads), model_directory(name, layers) as (label, path), bar(label, quiet) as progress:
            found = _costs(label, str(path), recipe, (batch, tokens), device, rounds, progress)
        out.print(cost_table(f"{label}, {recipe}, [{batch}, {tokens}] tokens", found))
        rows += found
    allocator = "keeps freed memory" if kept else "default"
    out.print(f"{timing.machine(device)}, {threads} threads, allocator: {allocator}", highlight=False)
    if json_file is not None:
        content = {"recipe": recipe, "batch": batch, "tokens": tokens, "rounds": rounds, "threads": threads}
        content |= {"device": device, "machine": timing.machine(device), "allocator": allocator}
        content |= {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "rows": [r.as_dict() for r in rows]}
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    for row in rows:
        if not row.verified:
            out.print(f"NOT VERIFIED: {row.model}, {row.work}: {row.how}", style="red", highlight=False, markup=False)
    if not all(row.verified for row in rows):
        raise typer.Exit(1)


def cost_table(title: str, rows: Sequence[Any]) -> Any:
    made = table(title, ("pass",), ("ms", "plain ms", "ratio", "10 to 90%"))
    for row in rows:
        spread = f"{row.spread[0]:.2f} to {row.spread[1]:.2f}"
        made.add_row(row.work, f"{row.ms:.1f}", f"{row.plain_ms:.1f}", f"{row.ratio:.2f}", spread)
    return made


def _costs(
    label: str, path: str, recipe: str, shape: tuple[int, int], device: str, rounds: int, progress: Any
) -> list[Any]:
    import torch

    from .eval.bench.calibrate import costs
    from .models import load_model, quantize_model
    from .workflow import recipe_of

    chosen, by_kind = recipe_of(recipe), {kind: recipe_of(recipe, [f"observer.kind={kind}"]) for kind in KINDS}
    peer, ours = (load_model(path, device=device) for _ in range(2))
    vocabulary = int(peer.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    own = ids.to(device)
    quantize_model(ours, chosen)

    def plain() -> None:
        with torch.no_grad():
            peer(input_ids=own, use_cache=False)

    return costs(label, plain, list(_works(ours, chosen, by_kind, ids)), rounds, device, progress)


def _works(model: Any, recipe: Recipe, by_kind: Mapping[str, Recipe], ids: Tensor) -> Iterator[Work]:
    """Of a quantized model: a pass for each kind of observer, the pass for quality, and the whole calibration.

    by_kind: the recipe with other observers.
    """
    from .calib import calibrate
    from .calib.data import Samples
    from .calib.quality import Quality
    from .calib.ranges import LayerRanges
    from .calib.run import Ticker, run_watched
    from .eval.bench.calibrate import Seen, Work
    from .models import quantized_layers

    layers = quantized_layers(model)
    rules = {index: layer.delta_net for index, layer in layers.items() if layer.delta_net is not None}
    whole = calibrate(model, recipe, Samples("random", ids, ""), batch_size=len(ids))  # puts scales in place

    def watched(make: Callable[[int], Watcher]) -> dict[int, Any]:
        watchers = {index: make(index) for index in rules}
        run_watched(model, watchers, [ids], Ticker(None, 1))
        return watchers

    seen: dict[int, Seen] = watched(lambda index: Seen())
    for kind, observing in by_kind.items():

        def ranges(observing: Recipe = observing) -> dict[int, LayerRanges]:
            return watched(lambda index: LayerRanges(layers[index], observing))

        def agree(ranges: Callable[[], dict[int, LayerRanges]] = ranges) -> tuple[bool, str]:
            return _ranges_agree(ranges(), seen)

        yield Work(f"ranges, {kind}", ranges, agree)

    def quality() -> dict[int, Quality]:
        return watched(lambda index: Quality(rules[index]))

    yield Work("quality", quality, lambda: _quality_agrees(quality(), seen))

    def all_of_it() -> Mapping[str, Tensor]:
        return calibrate(model, recipe, Samples("random", ids, ""), batch_size=len(ids)).scales

    yield Work("whole calibration", all_of_it, lambda: _equal(all_of_it(), whole.scales))


def _ranges_agree(ranges: Mapping[int, Any], seen: Mapping[int, Seen]) -> tuple[bool, str]:
    """Maxima of every observer are the obvious ones, and a histogram holds every element."""
    compared = equal = 0
    for index, watcher in ranges.items():
        for (site, granularity), observer in watcher.observers.items():
            state = observer.state()
            good = bool((state["amax"] == seen[index].amax(site, granularity).cpu()).all())
            if "counts" in state:
                good &= int(state["counts"].sum() + state["zeros"].sum()) == seen[index].elements[site]
            compared, equal = compared + 1, equal + good
    return equal == compared, f"{equal} of {compared} observers have the maxima and counts of an obvious second pass"


def _quality_agrees(quality: Mapping[int, Any], seen: Mapping[int, Seen]) -> tuple[bool, str]:
    """Ranges and counts, by head."""
    from .core import Granularity

    compared = equal = 0
    for index, watcher in quality.items():
        for site, sums in watcher.sums.items():
            top = [max(a, -b) for a, b in zip(sums.amax, sums.lowest, strict=True)]
            good = top == seen[index].amax(site, Granularity.PER_HEAD).flatten().tolist()
            good &= sums.elements * len(top) == seen[index].elements[site]
            compared, equal = compared + 1, equal + good
    return equal == compared, f"{equal} of {compared} sites have the ranges and counts of an obvious second pass"


def _equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[bool, str]:
    import torch

    equal = sum(torch.equal(found[key], scale) for key, scale in expected.items())
    return equal == len(expected) == len(found), f"{equal} of {len(expected)} scales equal those of another run"

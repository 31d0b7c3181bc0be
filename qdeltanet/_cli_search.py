"""The commands that search: for a recipe, and for the order and steps of the published inverse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._console import Device, Dtype, Json, Model, Quiet, Set, bar, out, table

if TYPE_CHECKING:
    from .calib.search import Adapted

ROWS = 12  # of the front that is printed
COLUMNS = ("cost", "KL to float", "NLL to float")

Output = Annotated[Path, typer.Option("--output", "-o", help="Recipe to write (YAML); figures go beside it.")]
Budget = Annotated[
    str,
    typer.Option(help="Largest KL divergence from float: nats per token, or with % as a ratio of perplexities (0.4%)."),
]
ProfileName = Annotated[str, typer.Option("--profile", help="Machine: ascend-910b, hexagon, h200, cpu, or a file.")]
Base = Annotated[str, typer.Option("--recipe", "-r", help="Base: what is not chosen stays as it is there.")]
Method = Annotated[list[str] | None, typer.Option("--method", help="Only this one (see `qdeltanet ls`). Repeatable.")]
Format = Annotated[
    list[str] | None, typer.Option("--format", help="Of the inverse: int8, int4 (both by default), int16. Repeatable.")
]


def search_command(
    model: Model,
    output: Output,
    budget: Budget = "0.4%",
    profile: ProfileName = "ascend-910b",
    recipe: Base = "int8",
    dataset: Annotated[str | None, typer.Option(help="Hub id[:config[:split]], local file, or recall / bytes.")] = None,
    samples: Annotated[int, typer.Option(help="Sequences: half calibrate, half measure.")] = 64,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per sequence (default: 512; 128 for tiny-recall).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 16,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    method: Method = None,
    number: Format = None,
    error: Annotated[float, typer.Option(help="Largest relative error of T, rms over matrices.")] = 0.2,
    keep: Annotated[int, typer.Option(min=1, help="Inverses per layer whose loss is measured.")] = 12,
    matrices: Annotated[int, typer.Option(min=2, help="A captured per head and layer.")] = 32,
    uniform: Annotated[bool, typer.Option("--uniform", help="One choice for all layers.")] = False,
    seed: Annotated[int, typer.Option(help="Of the matrices that are kept.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads: sums of floats, and so close choices, depend on their number.")
    ] = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    overrides: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another search's files.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Find the cheapest recipe whose loss stays within a budget: method, options and bits of each layer's inverse, and
    INT8 or INT4 for each site.

    Cost is modelled on a profile, loss measured: mean KL divergence of the next token from float's. A layer takes one
    plan for all its heads. The same command goes on where it was cut off.
    """
    from ._processes import launched
    from ._threads import threads as pinned
    from .calib.search import FORMATS, SEARCHED, Settings, search_to
    from .core import QDeltaNetError
    from .core.files import write_text
    from .eval.embedded import model_path
    from .models import load_model
    from .profile import load_profile
    from .workflow import recipe_of, samples_for

    if launched() > 1:
        raise QDeltaNetError("search is one process, whose measurements follow from one another: start it by itself")
    machine = load_profile(profile)
    methods, formats = tuple(method or SEARCHED), tuple(number or FORMATS)
    settings = Settings(methods, formats, positive("--error", error), keep, matrices, uniform, seed)
    allowed, base = budget_of(budget), recipe_of(recipe, overrides or ())
    data = samples_for(model, dataset, samples, seq_len, text_column)
    loaded = load_model(model_path(model), dtype, device)
    with pinned(threads), bar(f"searching {model}", quiet) as progress:
        result = search_to(
            output, loaded, base, data, machine, allowed, settings,
            batch_size=batch_size, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if result is None:
        out.print(f"already complete: {output}", highlight=False)
        return
    _show(result, output)
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=1, allow_nan=False) + "\n")


def budget_of(text: str) -> float:
    """nats per token; `0.5%` is the ratio of perplexities 1.005. Raises QDeltaNetError for what is neither."""
    from .core.errors import QDeltaNetError

    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    budget = math.log1p(value / 100) if text.strip().endswith("%") and value > -100 else value
    if not (budget > 0 and math.isfinite(budget)):
        raise QDeltaNetError(f"--budget {text!r}: write nats per token or a percentage above 0, e.g. 0.004 or 0.4%")
    return budget


def positive(option: str, value: float) -> float:
    """The value. Raises QDeltaNetError unless it is a positive number."""
    from .core.errors import QDeltaNetError

    if not (value > 0 and math.isfinite(value)):
        raise QDeltaNetError(f"{option} {value:g}: write a number above 0, e.g. 0.2")
    return value


def _show(result: dict[str, Any], output: Path) -> None:
    """The front, base and references, the chosen one marked; then where it was written."""
    chosen = result["chosen"]
    front = _some(result["front"], chosen)
    shown = [("chosen" if p == chosen else "", p) for p in front]
    shown += [("base", result["base"])] if result["base"] not in (p for _, p in shown) else []
    shown += [("for comparison", p) for p in result["references"]]
    made = table(f"{output.stem}: ns per token of all rules, nats per token", ("recipe", ""), COLUMNS)
    for mark, point in sorted(shown, key=lambda row: float(row[1]["cost"])):
        kl, nll = (math.inf if x is None else x for x in (point["loss"]["kl"], point["loss"]["nll"]))
        made.add_row(point["name"], mark, f"{point['cost']:.1f}", f"{kl:.5f}", f"{nll:+.5f}")
    out.print(made)
    saved = 1 - chosen["cost"] / result["base"]["cost"]
    out.print(
        f"budget {result['budget']:.5f} nats (KL); the chosen one costs {saved:.1%} less than the base; "
        f"{len(result['front']) - len(front)} more recipes were measured, see {output.stem}.pareto.json",
        highlight=False,
    )
    if result["left_out"]:
        left_out = ", ".join(result["left_out"])
        out.print(f"not compared, as their projections are not the base's: {left_out}", highlight=False)
    for layer, choice in chosen["choices"].items():
        narrow = ", ".join(choice["int4"]) or "none"
        inverse = f"as in {result['base']['name']}" if choice["inverse"] == "base" else choice["inverse"]
        out.print(f"layers {layer}: inverse {inverse}; sites in INT4: {narrow}", highlight=False, markup=False)
    assumed = [f for f, source in result["profile"]["sources"].items() if source.startswith("assumption")]
    out.print(f"profile {result['profile']['name']}; assumed in it: {', '.join(assumed) or 'nothing'}", highlight=False)
    out.print(f"recipe, front and picture written beside {output}", highlight=False)


def _some(front: list[Any], chosen: Any) -> list[Any]:
    """ROWS points of the front that no cheaper one beats, and the chosen one."""
    from .calib.search.choose import spread

    best, undominated = math.inf, []
    for p in front:  # cheapest first
        kl = math.inf if p["loss"]["kl"] is None else p["loss"]["kl"]
        if kl < best or p == chosen:
            undominated.append(p)
        best = min(best, kl)
    kept = spread(len(undominated), ROWS)
    return [p for i, p in enumerate(undominated) if i in kept or p == chosen]


def bench_neumann(
    family: Annotated[str, typer.Option(help="Of matrices A (see `qdeltanet ls`).")] = "gates_small",
    chunk_size: Annotated[int, typer.Option(help="C, a power of two.")] = 64,
    profile: ProfileName = "ascend-910b",
    error: Annotated[float, typer.Option(help="Largest relative error of T, of the worst matrix.")] = 0.05,
    number: Annotated[str, typer.Option("--format", help="Of A, T and registers, int2 to int16.")] = "int8",
    seed: Annotated[int, typer.Option(help="Of the matrices.")] = 0,
    json_file: Json = None,
) -> None:
    """Order and residual steps of the published inverse (neumann) for a chunk size, on a family of matrices.

    The cheapest pair on a profile whose worst error of T stays within --error; no model runs.
    """
    from .calib.search import adapt_neumann
    from .core.files import write_text
    from .inverse.families import Shape
    from .inverse.families import family as family_of
    from .profile import load_profile

    machine = load_profile(profile)
    A = family_of(family).matrices(Shape(4, 16, chunk_size), seed)
    found = adapt_neumann(A, machine, positive("--error", error), number)
    out.print(_grid_table(found, f"neumann on {family}, chunks of {chunk_size}, {number}: worst error of T (ns)"))
    best = found.best
    line = f"no pair keeps the worst error of T within {error:g}" if best is None else (
        f"cheapest within {error:g} on {machine.name}: order {best.order}, {best.residual_steps} residual steps "
        f"(worst error {best.worst:.3g}, {best.cost:.0f} ns per matrix, {best.depth} products deep)"
    )  # fmt: skip
    out.print(line, highlight=False)
    if json_file is not None:
        content = {"best": None if best is None else best.as_dict(), "grid": [p.as_dict() for p in found.grid]}
        write_text(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _grid_table(found: Adapted, title: str) -> Table:
    orders = tuple(f"N = {o}" for o in sorted({p.order for p in found.grid}))
    made = table(title, ("steps",), orders)
    for steps in sorted({p.residual_steps for p in found.grid}):
        made.add_row(str(steps), *(f"{p.worst:.2g} ({p.cost:.0f})" for p in found.grid if p.residual_steps == steps))
    return made

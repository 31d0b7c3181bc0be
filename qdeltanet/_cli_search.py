"""The command that searches for a recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import Device, Dtype, Json, Quiet, Set, bar, out, table
from .core.errors import QDeltaNetError

if TYPE_CHECKING:
    from .inverse import Profile

ROWS = 12  # of the front that is printed
COLUMNS = ("cost", "KL to float", "NLL to float")

Searched = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Embedded model, directory or hub id; none with --family.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Recipe to write (YAML); figures go beside it.")]
Budget = Annotated[
    str, typer.Option(help="Largest loss over float: nats per token, or with % a ratio of perplexities (0.4%).")
]
ProfileName = Annotated[str, typer.Option("--profile", help="Machine: ascend-910b, hexagon, h200, cpu, or a file.")]
Base = Annotated[str, typer.Option("--recipe", "-r", help="Base: what is not chosen stays as it is there.")]
Method = Annotated[list[str] | None, typer.Option("--method", help="Only this one (see `qdeltanet ls`). Repeatable.")]
Format = Annotated[
    list[str] | None, typer.Option("--format", help="Of the inverse: int8, int4 (both by default), int16. Repeatable.")
]
Error = Annotated[
    float | None, typer.Option(help="Largest relative error of T: rms, 0.2; with --family of the worst matrix, 0.05.")
]


def search_command(
    model: Searched = None,
    output: Output = None,
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
    error: Error = None,
    keep: Annotated[int, typer.Option(min=1, help="Inverses per layer whose loss is measured.")] = 12,
    matrices: Annotated[int, typer.Option(min=2, help="A captured per head and layer.")] = 32,
    uniform: Annotated[bool, typer.Option("--uniform", help="One choice for all layers.")] = False,
    family: Annotated[str | None, typer.Option(help="No model: neumann's order and steps on a family of A.")] = None,
    chunk_size: Annotated[int, typer.Option(help="With --family.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the matrices that are kept or made.")] = 0,
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
    from .calib.search import FORMATS, SEARCHED, Settings, search_to
    from .core.files import write_text
    from .eval.bench import timing
    from .eval.embedded import model_path
    from .models import load_model
    from .profile import load_profile
    from .workflow import recipe_of, samples_for

    machine = load_profile(profile)
    if family is not None and model is None:
        _adapt(family, chunk_size, machine, (number or ["int8"])[0], 0.05 if error is None else error, seed, json_file)
        return
    if model is None or output is None or family is not None:
        raise QDeltaNetError("search needs MODEL and --output recipe.yaml, or --family NAME without a model")
    methods, formats = tuple(method or SEARCHED), tuple(number or FORMATS)
    settings = Settings(methods, formats, 0.2 if error is None else error, keep, matrices, uniform, seed)
    allowed, base = budget_of(budget), recipe_of(recipe, overrides or ())
    data = samples_for(model, dataset, samples, seq_len, text_column)
    loaded = load_model(model_path(model), dtype, device)
    with timing.threads(threads), bar(f"searching {model}", quiet) as progress:
        result = search_to(
            output, loaded, base, data, machine, allowed, settings,
            batch_size=batch_size, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if result is None:
        out.print(f"already complete: {output}", highlight=False)
        return
    _show(result, output)
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=1) + "\n")


def budget_of(text: str) -> float:
    """nats per token; `0.5%` is the ratio of perplexities 1.005. Raises QDeltaNetError for what is neither."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    budget = math.log1p(value / 100) if text.strip().endswith("%") and value > -100 else value
    if not (budget > 0 and math.isfinite(budget)):
        raise QDeltaNetError(f"--budget {text!r}: write nats per token or a percentage above 0, e.g. 0.004 or 0.4%")
    return budget


def _show(result: dict[str, Any], output: Path) -> None:
    """The front, base and references, the chosen one marked; then where it was written."""
    chosen = result["chosen"]
    shown = [("chosen" if p == chosen else "", p) for p in _spread(result["front"], chosen)]
    shown += [("base", result["base"])] if result["base"] not in (p for _, p in shown) else []
    shown += [("for comparison", p) for p in result["references"]]
    made = table(f"{output.stem}: ns per token of all rules, nats per token", ("recipe", ""), COLUMNS)
    for mark, point in sorted(shown, key=lambda row: float(row[1]["cost"])):
        kl, nll = (float(point["loss"][k]) for k in ("kl", "nll"))
        made.add_row(point["name"], mark, f"{point['cost']:.1f}", f"{kl:.5f}", f"{nll:+.5f}")
    out.print(made)
    for layer, choice in chosen["choices"].items():
        narrow = ", ".join(choice["int4"]) or "none"
        out.print(
            f"layers {layer}: inverse {choice['inverse']}; sites in INT4: {narrow}", highlight=False, markup=False
        )
    assumed = [f for f, source in result["profile"]["sources"].items() if source.startswith("assumption")]
    out.print(f"profile {result['profile']['name']}; assumed in it: {', '.join(assumed) or 'nothing'}", highlight=False)
    out.print(f"recipe, front and picture written beside {output}", highlight=False)


def _spread(front: list[Any], chosen: Any) -> list[Any]:
    """At most ROWS points of the front, the chosen one among them."""
    kept = {round(i * (len(front) - 1) / (ROWS - 1)) for i in range(ROWS)} if len(front) > ROWS else range(len(front))
    return [p for i, p in enumerate(front) if i in kept or p == chosen]


def _adapt(
    name: str, chunk_size: int, machine: Profile, number: str, error: float, seed: int, json_file: Path | None
) -> None:
    """neumann's order and residual steps on a family of matrices."""
    from .calib.search import adapt_neumann
    from .core.files import write_text
    from .inverse.families import Shape, family

    found = adapt_neumann(family(name).matrices(Shape(4, 16, chunk_size), seed), machine, error, number)
    steps = sorted({p.residual_steps for p in found.grid})
    orders = tuple(f"N = {o}" for o in sorted({p.order for p in found.grid}))
    made = table(f"neumann on {name}, chunks of {chunk_size}, {number}: worst error of T (ns)", ("steps",), orders)
    for s in steps:
        made.add_row(str(s), *(f"{p.worst:.2g} ({p.cost:.0f})" for p in found.grid if p.residual_steps == s))
    out.print(made)
    best = found.best
    line = f"no pair keeps the worst error of T within {error:g}" if best is None else (
        f"cheapest within {error:g} on {machine.name}: order {best.order}, {best.residual_steps} residual steps "
        f"(worst error {best.worst:.3g}, {best.cost:.0f} ns per matrix, {best.depth} products deep)"
    )  # fmt: skip
    out.print(line, highlight=False)
    if json_file is not None:
        content = {"best": None if best is None else best.as_dict(), "grid": [p.as_dict() for p in found.grid]}
        write_text(json_file, json.dumps(content, indent=1) + "\n")

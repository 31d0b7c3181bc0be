"""What the commands share: consoles, option types, tables, progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Embedded model (tiny-recall, tiny-hybrid), directory, or hub id.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe value, e.g. inverse.residual_steps=4.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output directory holds.")]


def writable(path: Path | None) -> Path | None:
    """A file that could not be written is refused before the work: of every option that names one to write."""
    from .core.files import check_file

    check_file(path)
    return path


Json = Annotated[Path | None, typer.Option("--json", callback=writable, help="Also write the result to this file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results.")]
Dtype = Annotated[
    str, typer.Option(help="Of the float weights: float32, bfloat16, float16, or auto (the checkpoint's).")
]
Backend = Annotated[
    str, typer.Option(help="Where integers are multiplied: auto (the device's), or a name of `qdeltanet ls`.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda:N or npu:N.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; whole or not at all.")]


def say(quiet: bool) -> Any:
    return (lambda text: None) if quiet else (lambda text: err.print(text, highlight=False, markup=False))


@contextmanager
def bar(title: str, quiet: bool) -> Iterator[Any]:
    """A progress bar on a terminal, nothing where output is piped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """Narrow enough for 80 columns; names to the left, figures to the right."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title_justify="left")
    for name in left:
        made.add_column(name, overflow="fold", min_width=12 if name == "recipe" else None)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made

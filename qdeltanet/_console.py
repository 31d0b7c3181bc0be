"""What the commands share: consoles, option types, tables, progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

out, err = Console(), Console(stderr=True)
PLAIN_EVERY = 30.0  # seconds between lines of progress where stderr is no terminal

Model = Annotated[str, typer.Argument(help="Embedded model (tiny-recall, tiny-hybrid), directory, or hub id.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe value, e.g. inverse.residual_steps=4, or observer.kind=mse."),
]
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
    """A progress bar on a terminal; where stderr is piped a plain line at times, so that a log shows life."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if quiet or not err.is_terminal:
        yield (lambda done, total: None) if quiet else _Lines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class _Lines:
    """`title: done of total`, at most one line in PLAIN_EVERY seconds."""

    def __init__(self, title: str) -> None:
        self.title, self.due = title, time.monotonic() + PLAIN_EVERY

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self.due:
            err.print(f"{self.title}: {done} of {total}", highlight=False, markup=False)
            self.due = time.monotonic() + PLAIN_EVERY


def table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """Narrow enough for 80 columns; names to the left, figures to the right."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title_justify="left")
    for name in left:
        made.add_column(name, overflow="fold", min_width=12 if name == "recipe" else None)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made

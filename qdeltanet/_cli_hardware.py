"""The commands about machines: selftest and bench."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Backend, Device, Json, Quiet, bar, out, say, table

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory, each case verified before it is timed.")

Rounds = Annotated[int, typer.Option(min=1, help="Alternating calls of ours and the peer.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of both.")]
KeepMemory = Annotated[
    bool, typer.Option("--keep-memory", help="Let the allocator keep freed memory, for both: times no page faults.")
]
Tokens = Annotated[int, typer.Option(min=1, help="T, tokens per sequence.")]
Batch = Annotated[int, typer.Option(min=1, help="B, sequences.")]
KeyHeads = Annotated[int, typer.Option(min=1)]
ValueHeads = Annotated[int, typer.Option(min=1)]
HeadDim = Annotated[int, typer.Option(min=1, help="K = V.")]
ChunkSize = Annotated[int, typer.Option(min=2, help="C, a power of two.")]


def selftest(
    backend: Annotated[str, typer.Option(help="reference, cpu, triton or npu (see `qdeltanet ls`).")] = "cpu",
    device: Annotated[str | None, typer.Option(help="cpu, cuda:N or npu:N; default: where the backend runs.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the cases, for slow backends.")] = False,
    match: Annotated[str, typer.Option(help="Only cases whose section or name contains this.")] = "",
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Show that a backend gives reference's bits: every plan, format and requantization mode, adversarial codes.

    Exit code 0 for no mismatch, 1 for any.
    """
    from .backends import check_device, get_backend
    from .conformance import run_suite, suite
    from .core import QDeltaNetError
    from .core.files import write_text

    device = check_device(device or _device_of(backend))
    chosen = get_backend(backend, device)
    cases = [case for case in suite(quick) if match in f"{case.section}, {case.name}"]
    if not cases:
        raise QDeltaNetError(f"--match {match!r}: no case contains it; e.g. --match 'inverse, radix 2'")
    with bar(f"selftest {backend}", quiet) as progress:
        report = run_suite(chosen, get_backend("reference"), cases, device, progress)
    made = table(f"selftest {backend} on {device}", ("section",), ("cases", "elements", "mismatches"))
    for name, row in [*report.sections.items(), ("all", report.as_dict())]:
        made.add_row(name, str(row["cases"]), f"{row['elements']:,}", f"{row['mismatches']:,}")
    out.print(made)
    for failure in report.failures:
        out.print(failure, highlight=False, markup=False)
    if json_file is not None:
        write_text(json_file, json.dumps(report.as_dict(), indent=1) + "\n")
    if report.mismatches:
        raise typer.Exit(1)


def _device_of(backend: str) -> str:
    """Where a backend runs: its accelerator if there is one, else the CPU."""
    import torch

    if backend == "triton" and torch.cuda.is_available():
        return "cuda:0"
    module = getattr(torch, "npu", None)
    return "npu:0" if backend == "npu" and module is not None and module.is_available() else "cpu"


def _rule_benchmark(name: str, cases_of: Callable[[], Callable[..., Iterable[Any]]], default_rounds: int) -> Any:
    """A command over sizes of the rule. cases_of: imports what makes its cases, when the command runs."""

    def command(
        batch: Batch = 1,
        tokens: Tokens = 2048,
        key_heads: KeyHeads = 16,
        value_heads: ValueHeads = 32,
        head_dim: HeadDim = 128,
        chunk_size: ChunkSize = 64,
        backend: Backend = "auto",
        device: Device = "cpu",
        rounds: Rounds = default_rounds,
        threads: Threads = 2,
        keep_memory: KeepMemory = False,
        quiet: Quiet = False,
        json_file: Json = None,
    ) -> None:
        from .backends import check_device
        from .eval.bench.delta_rule import Size

        size = Size(batch, tokens, key_heads, value_heads, head_dim, chunk_size)
        cases = cases_of()(size, check_device(device), backend)
        _bench(f"{name}: {size}", cases, device, rounds, threads, keep_memory, quiet, json_file)

    return command


def _inverse_cases() -> Callable[..., Iterable[Any]]:
    from .eval.bench.inverse import inverse_cases

    return inverse_cases


def _delta_rule_cases() -> Callable[..., Iterable[Any]]:
    from .eval.bench.delta_rule import delta_rule_cases

    return delta_rule_cases


bench.command(
    "inverse",
    help="The triangular inverse alone: float and INT8 against LAPACK's solver and the row loop; Triton against FLA.",
    epilog="Example: qdeltanet bench inverse --json inverse.json",
)(_rule_benchmark("inverse", _inverse_cases, 15))
bench.command(
    "delta-rule",
    help="The whole chunkwise rule: float and exact integers against transformers' float and Brevitas' fake ones.",
    epilog="Example: qdeltanet bench delta-rule --tokens 2048 --json rule.json",
)(_rule_benchmark("delta rule", _delta_rule_cases, 7))


@bench.command("model", epilog="Example: qdeltanet bench model tiny-hybrid --recipe int8 --recipe int4")
def bench_model(
    model: Annotated[str, typer.Argument(help="Embedded model, directory or hub id.")] = "tiny-hybrid",
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="One per row.")] = None,
    calibration: Annotated[list[Path] | None, typer.Option(help="Calibration directory of a static recipe.")] = None,
    batch: Batch = 4,
    tokens: Tokens = 512,
    backend: Backend = "auto",
    device: Device = "cpu",
    rounds: Rounds = 7,
    threads: Threads = 2,
    keep_memory: KeepMemory = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """A whole model's forward pass in integers against the model as transformers runs it."""
    from .backends import check_device
    from .checkpoint import load_calibration
    from .eval.bench.model import model_cases
    from .workflow import evaluation_rows, recipe_of, row_name

    check_device(device)
    named = [(row_name(text), recipe_of(text)) for text in recipe or ("int8",)]
    loaded = [load_calibration(path) for path in calibration or ()]
    rows = evaluation_rows(model, named, loaded, execution="integer", backend=backend, device=device, say=say(quiet))
    asked = [(row.name, row.recipe, row.calibration) for row in rows if row.recipe is not None]
    cases = model_cases(model, asked, batch=batch, tokens=tokens, device=device, backend=backend)
    _bench(f"model {model}", cases, device, rounds, threads, keep_memory, quiet, json_file)


def _bench(
    title: str,
    cases: Iterable[Any],
    device: str,
    rounds: int,
    threads: int,
    keep_memory: bool,
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Run, print and write; exit code 1 if a case is not verified."""
    from .core.files import write_text
    from .eval.bench import Settings, run_cases, timing
    from .workflow import versions

    kept = keep_memory and timing.keep_memory()
    with timing.threads(threads), bar(title, quiet) as progress:
        rows = run_cases(list(cases), Settings(rounds, device), progress)
    conditions = {
        "machine": timing.machine(device),
        "device": device,
        "threads": threads,
        "rounds": rounds,
        "allocator": "keeps freed memory" if kept else "default",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    out.print(bench_table(title, rows))
    out.print(f"{conditions['machine']}, {threads} threads, allocator: {conditions['allocator']}", highlight=False)
    if json_file is not None:
        content = {"title": title, **conditions, "rows": [row.as_dict() for row in rows]}
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    for row in rows:
        if not row.verified:
            out.print(f"NOT VERIFIED: {row.case}, {row.ours}: {row.how}", style="red", highlight=False, markup=False)
    if not all(row.verified for row in rows):
        raise typer.Exit(1)


def bench_table(title: str, rows: list[Any]) -> Any:
    """Medians; ratio above 1 means that ours is faster."""
    made = table(title, ("case", "ours", "peer"), ("ms", "peer ms", "ratio", "MiB", "peer MiB"))
    for row in rows:
        figures = f"{row.ours_ms:.1f}", f"{row.peer_ms:.1f}", f"{row.ratio:.2f}"
        made.add_row(row.case, row.ours, row.peer, *figures, f"{row.ours_mib:.0f}", f"{row.peer_mib:.0f}")
    return made

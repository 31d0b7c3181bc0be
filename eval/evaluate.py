"""Run tasks through lm-eval for one or several recipes and compare them with float, document by document."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch

from .._processes import current, joined
from ..core import QDeltaNetError
from ..models import delta_net_layers, load_tokenizer
from .cache import Cache, calibration_digest, check_cache, digest_of, executed_digest, program_digest, tokenizer_digest
from .compare import Row, RowResult, by_task, execution_of, summary
from .embedded import model_path
from .lm import QDeltaNetLM
from .prepare import prepare_model, saturation
from .results import from_plain, to_plain
from .statistics import documents, pooled
from .task_files import LoadedTasks, load_tasks


@dataclass(frozen=True)
class Settings:
    """How every row is measured. lm-eval's own options are passed on as they are.

    limit: documents per task. batch_size: requests per forward pass, or `auto`. logits: whether rows are compared with
    the baseline's logits; both models are in memory then. include_path: a folder of the user's own task files.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    batch_size: int | str = 64
    dtype: str = "float32"
    device: str = "cpu"
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    gen_kwargs: str | None = None
    include_path: Path | None = None
    logits: bool = False


def evaluate(
    model_name: str,
    rows: Sequence[Row],
    tasks: Sequence[str],
    *,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Every row over the same documents; the first row is the baseline of the paired differences.

    Processes that a launcher started share the work, and each returns the whole result. CPU threads are the caller's to
    pin (`_threads.threads`). settings: as `Settings`. cache: a folder that keeps each row's figures under all that they
    depend on, and gives them back to the same request.

    Returns plain data, a dictionary per row: name, recipe, execution, backend, hashes, seconds, tokens_per_second,
    saturated (total), saturated_sites, and per task and metric: value, stderr, and against the baseline difference,
    difference_stderr, difference_interval (95%, bootstrap over documents), for nats_per_byte and nats_per_word the
    perplexity and its ratio to the baseline's; with logits=True per task kl, kl_interval, top1 and tokens.
    Raises QDeltaNetError for unknown tasks, tasks that cannot be loaded, and what `prepare_model` refuses.
    """
    asked = Settings(tuple(tasks), **settings)
    kept = check_cache(cache)
    loaded = load_tasks(tasks, asked.limit, asked.include_path)
    results: list[RowResult] = []
    baseline: Any = None
    with joined():
        for row in rows:
            if progress is not None:
                progress(row.name)
            runner = _Runner(model_name, row, _prepared(model_name, row, asked), asked, loaded)
            if baseline is not None:
                _check_vocabularies(baseline, runner)
            results.append(runner.result(baseline, kept))
            if baseline is None and asked.logits:
                baseline = runner
            del runner  # with its model: never more than the baseline's and one other
    return [summary(r, results[0]) for r in results]


def _prepared(model_name: str, row: Row, asked: Settings) -> Any:
    name = row.model or model_name
    model = prepare_model(name, row.recipe, row.calibration, row.execution, row.backend, asked.dtype, asked.device)
    if row.recipe is None and row.model is not None and row.execution != "float" and not delta_net_layers(model):
        raise QDeltaNetError(
            f"{name} is no checkpoint that qdeltanet exported: it would run in float, not {row.execution}; export it, "
            "or name a --recipe"
        )
    return model


def _check_vocabularies(baseline: _Runner, other: _Runner) -> None:
    own, base = (runner.model.config.get_text_config().vocab_size for runner in (other, baseline))
    if own != base:
        raise QDeltaNetError(
            f"row {other.row.name} has a vocabulary of {own} tokens, the first row one of {base}: their logits cannot "
            "be compared; --no-logits leaves that out"
        )


class _Runner:
    """One row: a prepared model, its key, its run."""

    def __init__(self, model_name: str, row: Row, model: Any, asked: Settings, loaded: LoadedTasks) -> None:
        self.row, self.model, self.asked, self.loaded = row, model, asked, loaded
        self.tokenizer = load_tokenizer(model_path(row.model or model_name))
        if asked.apply_chat_template and not self.tokenizer.chat_template:
            raise QDeltaNetError(f"{row.model or model_name} has no chat template: leave --apply-chat-template out")
        self.hashes: dict[str, str | None] = {
            **executed_digest(model),
            "recipe": None if row.recipe is None else row.recipe.fingerprint,
            "calibration": calibration_digest(row.calibration),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "tasks": digest_of(loaded.hashes),
            "program": program_digest(),
        }

    def key(self, baseline: _Runner | None) -> dict[str, Any]:
        """Everything that the figures depend on. Batches and threads are in it: sums of floats depend on them."""
        own = {f.name: str(getattr(self.asked, f.name)) for f in fields(Settings) if f.name != "include_path"}
        return {
            "hashes": self.hashes,
            "execution": execution_of(self.row),
            "backend": self.row.backend,
            "settings": own,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "lm-eval")},
            "baseline": None if baseline is None else baseline.key(None),
        }

    def result(self, baseline: _Runner | None, kept: Cache | None) -> RowResult:
        """Measured, or what the cache holds of the same request."""
        key = self.key(baseline)
        first = current().first
        found = current().agree(kept.find(key) if kept is not None and first else None)
        if found is not None:
            return from_plain(self.row, found, self.hashes)
        made = self._run(None if baseline is None else baseline.model)
        if kept is not None and first:
            kept.keep(key, to_plain(made))
        return made

    def _run(self, beside: Any) -> RowResult:
        start = time.monotonic()
        asked = self.asked
        lm = QDeltaNetLM(self.model, tokenizer=self.tokenizer, batch_size=asked.batch_size, beside=beside)
        with lm_eval_reports(True):
            results: Any = lm_eval.simple_evaluate(
                lm, tasks=list(asked.tasks), limit=asked.limit, task_manager=self.loaded.manager, bootstrap_iters=0,
                log_samples=True, num_fewshot=asked.num_fewshot, apply_chat_template=asked.apply_chat_template,
                gen_kwargs=asked.gen_kwargs,
            )  # fmt: skip
        measured = {task: documents(samples) for task, samples in results["samples"].items()}
        logits = by_task(lm.compared, measured)
        for group, tasks in self.loaded.groups.items():
            measured[group] = pooled({task: measured[task] for task in tasks})
            if all(task in logits for task in tasks):
                logits[group] = pooled({task: logits[task] for task in tasks})
        saturated: Counter[str] = sum(
            current().gather(saturation(self.model)), Counter()
        )  # each process has seen its own batches
        work: Counter[str] = sum(current().gather(lm.work), Counter())
        seconds = time.monotonic() - start
        return RowResult(self.row, measured, dict(saturated), seconds, logits, dict(work), self.hashes)


@contextmanager
def lm_eval_reports(yes: bool) -> Iterator[None]:
    """Among several processes, whether lm-eval has a result in this one, and its command line prints and writes it.

    It goes by LOCAL_RANK, which is 0 once on every machine, while all our processes have the whole result.
    """
    if current().world == 1:
        yield
        return
    from accelerate import PartialState

    PartialState()  # chooses this process's GPU by LOCAL_RANK, once
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0" if yes else "1"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        os.environ |= {} if before is None else {"LOCAL_RANK": before}

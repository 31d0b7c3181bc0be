"""The tasks, run by lm-eval's own model class, offline and from any working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeltanet.eval.embedded import model_path
from qdeltanet.eval.statistics import documents
from qdeltanet.eval.task_data import TASKS
from qdeltanet.eval.task_files import include_path, task_manager

DOCUMENTS = 8


def test_manager_knows_the_tasks() -> None:
    assert include_path().is_absolute()
    assert set(TASKS) <= set(task_manager().all_tasks)
    assert task_manager() is task_manager()


@pytest.mark.parametrize(("model", "task"), [("tiny-recall", "recall"), ("tiny-hybrid", "bytes")])
def test_lm_eval_runs_them(model: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    runner = HFLM(pretrained=model_path(model), dtype="float32", device="cpu", batch_size=DOCUMENTS)
    done = lm_eval.simple_evaluate(
        runner, tasks=[task], limit=DOCUMENTS, task_manager=task_manager(), log_samples=True, bootstrap_iters=0
    )
    assert done is not None
    measured = documents(done["samples"][task])
    assert all(metric.ids == tuple(range(DOCUMENTS)) for metric in measured.values())
    if task == "recall":
        assert measured["acc"].estimate >= 0.8
        assert 0 <= measured["nll"].estimate < 1
    else:
        assert 0.5 < measured["nats_per_byte"].estimate < 2
        assert measured["nats_per_byte"].weight.max() <= 1000

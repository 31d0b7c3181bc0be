"""Where the lm-eval tasks that ship lie, and a manager that finds them without a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .task_data import TASKS_FOLDER

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def include_path() -> Path:
    """The folder of the task files, absolute: what lm-eval's own `--include_path` wants."""
    return Path(TASKS_FOLDER)


@cache
def task_manager(include_defaults: bool = False) -> TaskManager:
    """A manager of the tasks `recall` and `bytes`, made once per process.

    The task files name functions of `qdeltanet.eval.task_data` for their documents, so that no path is relative to the
    working directory and nothing is downloaded.

    Args:
        include_defaults: whether lm-eval's own tasks are known too; that reads thousands of files, seconds of work.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path()), include_defaults=include_defaults)

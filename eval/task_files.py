"""Where the lm-eval tasks that ship lie, and how tasks are found and loaded, with one line for what goes wrong."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import QDeltaNetError, unknown
from .task_data import TASKS, TASKS_FOLDER

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def include_path() -> Path:
    """The folder of the task files, absolute: what lm-eval's own `--include_path` wants."""
    return Path(TASKS_FOLDER)


@cache
def task_manager(include_defaults: bool = False, also: Path | None = None) -> TaskManager:
    """A manager of the tasks that ship, made once per process.

    The task files name functions of `qdeltanet.eval.task_data` for their documents, so that no path is relative to the
    working directory and nothing is downloaded.

    Args:
        include_defaults: whether lm-eval's own tasks are known too; that reads thousands of files, seconds of work.
        also: a folder of the user's own task files.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(include_path()), *([] if also is None else [str(also)])]
    return TaskManager(include_path=folders, include_defaults=include_defaults)


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks whose documents are there. names: as asked, a tag by its tasks. groups: the tasks of each group.

    hashes: of each task's configuration and documents. fixed: tasks whose file says that they take no examples.
    """

    manager: TaskManager
    names: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    hashes: dict[str, str]
    fixed: tuple[str, ...]


def manager_for(tasks: Sequence[str], also: Path | None = None) -> TaskManager:
    """The manager that knows the tasks: ours and the user's, or with lm-eval's own, which take seconds to list.

    Raises QDeltaNetError for a task that none of them knows.
    """
    if not tasks:
        raise QDeltaNetError("no tasks given; e.g. --tasks recall,bytes")
    if also is not None and not also.is_dir():
        raise QDeltaNetError(f"--include-path {also}: no such directory")
    manager = task_manager(also=also)
    if set(tasks) - set(manager.all_tasks):
        manager = task_manager(True, also)
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown("task", task, [*TASKS, *manager.all_tasks])
    return manager


def load_tasks(tasks: Sequence[str], limit: int | None = None, also: Path | None = None) -> LoadedTasks:
    """Find tasks and fetch their documents, before any model is loaded. Raises QDeltaNetError with one line."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = manager_for(tasks, also)
    names: list[str] = []
    found: dict[str, Any] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        loaded: Any = _load(manager, task)
        found |= loaded["tasks"]
        groups |= {name: tuple(t.task_name for t in g.get_all_tasks()) for name, g in loaded.get("groups", {}).items()}
        names += [task] if task in (*loaded["tasks"], *groups) else loaded["tasks"]
    fixed = tuple(name for name, task in found.items() if task.get_config("num_fewshot") == 0)
    hashes = {name: _task_digest(task, limit) for name, task in found.items()}
    return LoadedTasks(manager, tuple(dict.fromkeys(names)), groups, hashes, fixed)


def _load(manager: TaskManager, task: str) -> Any:
    try:
        return manager.load([task])
    except QDeltaNetError:
        raise
    except ImportError as e:
        raise QDeltaNetError(f"task {task} needs a package ({e}): pip install 'lm-eval[{task}]' may bring it") from e
    except Exception as e:  # datasets, the hub and lm-eval each have their own
        first = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise QDeltaNetError(f"task {task} cannot be loaded: {first}{_offline_hint(e)}") from e


def _offline_hint(error: BaseException | None) -> str:
    """What to do where the network was the reason, which is somewhere in the chain of causes."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        words = f"{type(error).__name__} {error}"
        if isinstance(error, ConnectionError) or any(w in words for w in ("Offline", "offline", "Connect", "resolve")):
            offline = [n for n in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(n, "0") not in ("0", "")]
            mend = f"unset {' and '.join(offline)}" if offline else "connect"
            return f"; its data come from the hub: {mend}, or take a task that ships ({', '.join(TASKS)})"
        error = error.__cause__ or error.__context__
    return ""


def _task_digest(task: Any, limit: int | None) -> str:
    """sha256 over a task's configuration and the documents that are evaluated; functions by their source."""
    from .cache import digest_of

    config = task.dump_config()
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}  # a path
    documents = [json.dumps(doc, sort_keys=True, default=str) for doc in islice(task.eval_docs, limit)]
    shots = task.fewshot_docs() if config.get("num_fewshot") else None
    drawn = [json.dumps(doc, sort_keys=True, default=str) for doc in shots or ()]
    return digest_of([config, documents, drawn])

"""What test_processes has done by one process and by several; and processes that do not live to the end."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

from qdeltanet._processes import joined
from qdeltanet.core import QDeltaNetError

TASK = """\
task: continue
custom_dataset: !function qdeltanet.eval.task_data.byte_documents
output_type: generate_until
test_split: test
doc_to_text: "{{text[:30]}}"
doc_to_target: "{{text[30:36]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list:
  - metric: exact_match
"""


MODEL = "pretrained=tiny-hybrid,recipe=int4"


def evaluated(folder: Path) -> None:
    """Likelihoods of texts and of a single query; by several processes also generation, by lm-eval's command line."""
    from lm_eval.tasks import TaskManager

    from qdeltanet._threads import threads
    from qdeltanet.eval.__main__ import main
    from qdeltanet.eval.evaluate import Row, evaluate
    from qdeltanet.recipe import load_recipe

    rows = [Row("float", execution="float"), Row("int4", load_recipe("int4"))]
    with joined() as processes, threads(2):
        found: list[Any] = evaluate("tiny-hybrid", rows, ["bytes"], limit=7, batch_size=2, logits=True)
        found += evaluate("tiny-recall", rows, ["recall"], limit=1)
        for row in found:
            del row["seconds"], row["tokens_per_second"]
        (folder / f"found-{processes.rank}.json").write_text(json.dumps(found))
        if processes.first:
            (folder / "continue.yaml").write_text(TASK)
        processes.gather(None)
        if processes.world > 1:
            files = ["--include_path", str(folder), "--output_path", str(folder / "written"), "--log_samples"]
            asked = f"--model qdeltanet --model_args {MODEL} --tasks continue --limit 7 --batch_size 2"
            sys.argv = ["qdeltanet.eval", *asked.split(), *files]
            TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)  # thousands of files
            main()


def continued(folder: Path) -> Any:
    """The generation of `evaluated`, within this process."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from qdeltanet._threads import threads

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    asked = {"model_args": MODEL, "tasks": ["continue"], "limit": 7, "batch_size": 2, "task_manager": manager}
    with threads(None):
        return simple_evaluate("qdeltanet", **asked)


def ended(how: str) -> None:
    """The last process ends while the others wait for it."""
    with joined() as processes:
        if processes.rank == processes.world - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise QDeltaNetError("the disk is gone") if how == "refused" else KeyError("a mistake")
        processes.gather(None)


def run() -> None:
    try:
        if sys.argv[1] == "evaluated":
            evaluated(Path(sys.argv[2]))
        else:
            ended(sys.argv[1])
    except QDeltaNetError as e:
        print(f"qdeltanet: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()

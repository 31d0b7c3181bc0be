"""lm-eval's own command line with the model class `qdeltanet` and the tasks that ship:

python -m qdeltanet.eval --model qdeltanet --model_args pretrained=tiny-recall,recipe=int4 --tasks recall

torchrun and `accelerate launch` start it several times: the processes share the batches, the first prints and writes.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Register model and tasks, then hand over, with CPU threads pinned. A user's mistake is one line, exit code 2."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads stall a busy machine
    from .._processes import ONE_PROCESS, joined, only_one_started
    from .._threads import threads, usable_cores
    from ..core import QDeltaNetError

    if only_one_started():
        print(f"qdeltanet: {ONE_PROCESS}", file=sys.stderr)
    try:
        with joined() as processes, threads(processes.agree(usable_cores())):
            _hand_over(processes.first)
    except QDeltaNetError as e:
        print(f"qdeltanet: {e}", file=sys.stderr)
        sys.exit(2)


def _hand_over(reports: bool) -> None:
    if not reports:
        os.environ |= {"LMEVAL_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    from lm_eval.__main__ import cli_evaluate

    from .evaluate import lm_eval_reports  # its import registers the model class as well
    from .task_files import include_path

    known = ("run", "ls", "validate", "-h", "--help")
    if len(sys.argv) > 1 and sys.argv[1] not in known:
        sys.argv.insert(1, "run")
    if "--include_path" not in sys.argv and (len(sys.argv) == 1 or sys.argv[1] not in ("-h", "--help")):
        sys.argv += ["--include_path", str(include_path())]
    with lm_eval_reports(reports):
        cli_evaluate()


if __name__ == "__main__":
    main()

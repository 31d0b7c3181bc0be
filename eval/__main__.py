"""lm-eval's own command line with the model class `qdeltanet` and the tasks that ship:

python -m qdeltanet.eval --model qdeltanet --model_args pretrained=tiny-recall,recipe=int4 --tasks recall
"""

from __future__ import annotations

import sys


def main() -> None:
    """Register model and tasks, then hand over."""
    from lm_eval.__main__ import cli_evaluate

    from . import lm  # noqa: F401 (registers the model class)
    from .task_files import include_path

    known = ("run", "ls", "validate", "-h", "--help")
    if len(sys.argv) > 1 and sys.argv[1] not in known:
        sys.argv.insert(1, "run")
    if "--include_path" not in sys.argv and (len(sys.argv) == 1 or sys.argv[1] not in ("-h", "--help")):
        sys.argv += ["--include_path", str(include_path())]
    cli_evaluate()


if __name__ == "__main__":
    main()

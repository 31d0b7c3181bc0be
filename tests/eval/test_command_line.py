"""`python -m qdeltanet.eval`: lm-eval's own command line finds our model class and tasks."""

from __future__ import annotations

import os
import subprocess
import sys


def test_lm_evals_own_command_line() -> None:
    arguments = ["--model", "qdeltanet", "--model_args", "pretrained=tiny-recall,recipe=int4", "--tasks", "recall"]
    done = subprocess.run(
        [sys.executable, "-m", "qdeltanet.eval", *arguments, "--limit", "16"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "qdeltanet ({'pretrained': 'tiny-recall', 'recipe': 'int4'})" in done.stdout
    assert "|acc " in done.stdout.replace("recall", "")

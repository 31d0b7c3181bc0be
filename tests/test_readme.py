"""README's Python runs as it stands, and every command it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run([sys.executable, "-c", blocks[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([1, 64, " in done.stdout


def test_named_commands_and_files_exist():
    page = subprocess.run([sys.executable, "-m", "qdeltanet.cli", "--help"], capture_output=True, text=True).stdout
    for command in set(re.findall(r"`qdeltanet (\w+)", README)):
        assert command in page
    targets = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", targets, flags=re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link

"""Backend `triton` without a GPU: its kernels in Triton's interpreter, and compiled for sm_90.

Triton decides at import whether it interprets, so both happen in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qdeltanet.backends import triton as package
from qdeltanet.backends.triton import status, triton_status
from qdeltanet.core import QDeltaNetError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
INTEGER_MMA = ".s32.s8.s8"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )


@needs_triton
@pytest.mark.timeout(1200)  # a minute on an idle core; the interpreter is slow on a busy one
def test_every_element_equals_reference_in_the_interpreter() -> None:
    result = run("-m", "pytest", str(HERE / "triton_interpreted.py"), "--timeout=280", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout or "[100%]" in result.stdout


@needs_triton
@pytest.mark.timeout(900)
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Integer tensor cores, and every float operation with its own rounding."""
    result = run(str(HERE / "triton_compiled.py"), TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-4000:]
    kernels: dict[str, dict[str, int]] = json.loads(result.stdout)
    assert len(kernels) == 10
    for name, found in kernels.items():
        products = [x for x in found if "mma" in x]
        assert products, name
        if name.startswith("float"):
            assert all("bf16" in x for x in products), (name, found)
            continue
        assert all(INTEGER_MMA in x for x in products), (name, found)
        assert not any(x.startswith("fma") for x in found), (name, found)
        assert all(".rn." in x for x in found if "mma" not in x), (name, found)
        assert ("div.rn.f32" in found) == ("dynamic" in name), (name, found)
        # a fixed-point kernel has no float in it at all
        assert ("mul.rn.f32" in found) == ("per_head" in name or "finest dynamic" in name), (name, found)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "find_spec", lambda name: None)
    available, reason = triton_status.__wrapped__()
    assert not available
    assert "pip install triton" in reason
    assert package.triton_status is triton_status


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(), reason="kernels run here")
def test_without_a_gpu() -> None:
    available, reason = triton_status()
    assert not available
    assert "TRITON_INTERPRET=1" in reason
    from qdeltanet.backends.triton.backend import TritonBackend

    x = torch.ones(16, 16)
    with pytest.raises(QDeltaNetError, match="tensors are on cpu"):
        TritonBackend().matmul(x, x, 127, 127)


@needs_triton
def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import qdeltanet.backends.triton; "
    result = run("-c", code + "print(before or 'triton' not in sys.modules)")
    assert result.stdout.strip() == "True", result.stderr

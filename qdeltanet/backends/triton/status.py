"""Whether the backend can run here. Imports Triton only where it is asked."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache(maxsize=1)
def triton_status() -> tuple[bool, str]:
    """(available, reason); the answer is that of one small product, run once."""
    if find_spec("triton") is None:
        return False, "triton is not installed: pip install triton"
    try:
        import triton
    except Exception as e:  # a broken installation can raise anything
        return False, f"importing triton failed: {type(e).__name__}: {e}"
    interpreted = bool(triton.knobs.runtime.interpret)
    if not interpreted and not torch.cuda.is_available():
        return False, "no GPU here; set TRITON_INTERPRET=1 before Python starts to run its kernels, slowly, on the CPU"
    return _smoke("cpu" if interpreted else "cuda", interpreted)


def _smoke(device: str, interpreted: bool) -> tuple[bool, str]:
    """One odd-sized int8 product, compared."""
    from .matmul import int8_matmul

    left = torch.arange(-60, 60, device=device).reshape(3, 40)
    right = torch.arange(-100, 100, device=device).reshape(40, 5)
    try:
        got = int8_matmul(left, right, torch.int32).cpu()
    except Exception as e:
        return False, f"a small kernel failed: {type(e).__name__}: {e}"
    if not torch.equal(got.long(), left.cpu() @ right.cpu()):
        return False, "a small kernel gave wrong numbers: update triton or the GPU's driver"
    return True, "runs in Triton's interpreter, slowly" if interpreted else f"runs on {torch.cuda.get_device_name()}"

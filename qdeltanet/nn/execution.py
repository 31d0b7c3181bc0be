"""How quantized modules execute."""

from __future__ import annotations

from typing import Literal

import torch

from ..backends import get_backend
from ..core import Backend

Execution = Literal["float", "observe", "fake", "integer"]
EXECUTIONS: tuple[Execution, ...] = ("float", "fake", "integer")


def backend_for(execution: Execution, name: str, device: torch.device) -> Backend:
    """The backend that multiplies codes: fake execution has its own, integer execution the one asked for.

    Raises QDeltaNetError where the backend does not run here, or not on the device.
    """
    return get_backend("fake" if execution == "fake" else name, device.type)

"""Backend `triton`: int8 tensor cores, and kernels that run a whole plan on the chip.

`status` needs no Triton; everything else is imported on demand, from `qdeltanet.backends.triton.backend`.
"""

from .status import triton_status

__all__ = ["triton_status"]

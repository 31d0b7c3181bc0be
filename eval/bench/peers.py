"""Who we compare with: transformers, LAPACK's solver, Brevitas, and on accelerators flash-linear-attention and PTO."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import SiteArithmetic

Rule = Callable[..., Any]


def transformers_rule() -> Rule:
    """transformers' chunkwise rule in torch, also where a hub kernel or fla would take its place."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    rule = module.torch_chunk_gated_delta_rule
    return getattr(rule, "__wrapped__", rule)


def solve_triangular(A: Tensor) -> Callable[[], Tensor]:
    """T by LAPACK's triangular solver against the identity, from I - A made beforehand."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    system, right = eye - A, eye.expand_as(A)
    return lambda: torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def row_loop(A: Tensor) -> Tensor:
    """Forward substitution row by row, the loop that transformers keeps for exporters."""
    T = A.clone()
    for i in range(1, T.shape[-1]):
        above = T[..., :i, :i].clone()
        T[..., i, :i] += (T[..., i, :i].clone().unsqueeze(-1) * above).sum(-2)
    return T + torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)


class BrevitasArithmetic(SiteArithmetic):
    """Our float dataflow with a Brevitas `QuantIdentity` (INT8, per tensor) at every site: fake quantization."""

    def __init__(self, sites: Sequence[str], bits: int = 8) -> None:
        import brevitas.nn as qnn
        from brevitas.quant import Int8ActPerTensorFloat

        self.quantizers = {s: qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=bits) for s in sites}

    def observe(self, run: Callable[[], Any]) -> None:
        """Collect statistics in one run, then freeze."""
        run()
        for q in self.quantizers.values():
            q.eval()

    def enter(self, site: str, x: Tensor, compact: bool) -> Tensor:
        quantized: Tensor = self.quantizers[site](x)
        return quantized


def fla(path: str, name: str) -> Rule | None:
    """A function of flash-linear-attention, None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    return getattr(importlib.import_module(path), name, None)


def pto_inverse() -> Rule | None:
    """pto-kernels' triangular inverse (float16, Ascend), None where it is not installed."""
    if importlib.util.find_spec("pto_kernels") is None:
        return None
    return getattr(importlib.import_module("pto_kernels"), "pto_tri_inv_rec_unroll", None)

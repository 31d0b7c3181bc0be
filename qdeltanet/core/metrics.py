"""Signal to quantization noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB over all elements; inf for equal tensors, nan for a zero reference."""
    signal = reference.double().square().sum()
    noise = (reference.double() - approximation.double()).square().sum()
    return sqnr_from_energy(float(signal), float(noise))


def sqnr_from_energy(signal: float, noise: float) -> float:
    """10 log10(signal / noise) in dB from sums of squares."""
    if signal == 0:
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def relative_error(exact: Tensor, approximation: Tensor) -> Tensor:
    """Relative Frobenius error of each matrix [..., R, C] -> [...], in float64."""
    exact = exact.double()
    norm = torch.linalg.matrix_norm(exact).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.linalg.matrix_norm(approximation.double() - exact) / norm

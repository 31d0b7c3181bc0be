"""Float to codes and back. Codes are whole numbers; here they are held in float32, where they are exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import QDeltaNetError
from .formats import IntFormat


class _StraightThrough(torch.autograd.Function):
    """Forward: `exact`. Backward: the gradient passes to `surrogate` unchanged."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(surrogate: Tensor, exact: Tensor) -> Tensor:
    """`exact` in the forward pass, the gradient of `surrogate` in the backward pass; same shape."""
    if surrogate.requires_grad:
        result: Tensor = _StraightThrough.apply(surrogate, exact.to(surrogate.dtype))
        return result
    return exact


def round_half_even(x: Tensor, new: bool = False) -> Tensor:
    """Round to the nearest whole number, ties to even; straight-through gradient. new: x may be written to."""
    if new and not x.requires_grad:
        return x.round_()
    return straight_through(x, torch.round(x.detach()))


def saturate(x: Tensor, fmt: IntFormat) -> tuple[Tensor, int | Tensor]:
    """Clamp rounded values to the format. Returns (codes, number of saturated elements).

    On the CPU the usual case, nothing to clamp, costs one look at the extremes.
    """
    if x.device.type == "cpu" and x.numel():
        low, high = x.detach().aminmax()
        if float(low) >= fmt.qmin and float(high) <= fmt.qmax:
            return x, 0
    codes = x.clamp(fmt.qmin, fmt.qmax)
    return codes, (codes != x).sum()


def check_scale(scale: Tensor, site: str = "") -> None:
    """Raise QDeltaNetError that names the site unless every scale is finite and positive."""
    if not bool(((scale > 0) & scale.isfinite()).all()):
        where = f"site {site}: " if site else ""
        raise QDeltaNetError(f"{where}scales must be finite and greater than 0; calibrate again")


def quantize(x: Tensor, scale: Tensor, fmt: IntFormat) -> Tensor:
    """clamp(round_half_even(x / scale), -qmax, qmax), as float32 whole numbers of x's shape.

    x: any shape, float32. scale: float32 > 0, broadcastable to x. The gradient is straight-through inside the range
    and zero where the clamp cuts.

    >>> quantize(torch.tensor([0.5, 1.5, -9.0]), torch.tensor(1.0), IntFormat(4)).tolist()
    [0.0, 2.0, -7.0]
    """
    return round_half_even(x.to(torch.float32) / scale).clamp(fmt.qmin, fmt.qmax)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in float32."""
    return codes.to(torch.float32) * scale


def fake_quantize(x: Tensor, scale: Tensor, fmt: IntFormat) -> Tensor:
    """dequantize(quantize(x)): float32 in, float32 out, with the straight-through gradient."""
    return dequantize(quantize(x, scale, fmt), scale)


def coefficient_codes(x: Tensor, fraction_bits: int) -> Tensor:
    """round_half_even(x * 2^fraction_bits) for x in [0, 2], as float32 whole numbers (exact up to 22 bits)."""
    return round_half_even(x.to(torch.float32) * float(2**fraction_bits), new=True)


def power_of_two_ceil(scale: Tensor) -> Tensor:
    """The least power of two that is not below each scale.

    >>> power_of_two_ceil(torch.tensor([0.3, 0.5])).tolist()
    [0.5, 0.5]
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))

"""Weight quantization through Brevitas; the only file that imports it, and only when weights are quantized."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..core import TINY, IntFormat


def quantize_weight(weight: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor]:
    """Symmetric narrow-range codes per output channel by Brevitas' `Int8WeightPerChannelFloat`.

    weight: [out, in]. Returns (codes int8 or int16 [out, in], scale float32 [out]).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.nn import QuantLinear
        from brevitas.quant import Int8WeightPerChannelFloat

        layer = QuantLinear(
            weight.shape[1], weight.shape[0], bias=False,
            weight_quant=Int8WeightPerChannelFloat, weight_bit_width=fmt.bits,
        )  # fmt: skip
        layer.weight.data = weight.detach().float()
        with torch.no_grad():
            quantized = layer.eval().quant_weight()
    scale = quantized.scale.detach().float().reshape(-1).clamp(min=TINY)
    codes = torch.round(quantized.value.detach() / scale[:, None]).clamp(fmt.qmin, fmt.qmax)
    return codes.to(torch.int8 if fmt.bits <= 8 else torch.int16), scale

"""Weight quantization through Brevitas; the only file that imports it, and only when weights are quantized."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..core import TINY, IntFormat, QDeltaNetError, WeightMethod

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as published
BLOCK = 128  # columns whose errors are passed on together


def quantize_weight(
    weight: Tensor, fmt: IntFormat, group: int | None = None, method: WeightMethod = "rtn"
) -> tuple[Tensor, Tensor]:
    """Symmetric narrow-range codes by the scales of Brevitas' weight quantizers.

    weight: [out, in]. group: input channels that share a scale; None: all of them. method: `rtn` takes the range of
    each group (`Int8WeightPerChannelFloat`), `mse` the clip with the least square error of 20 tried
    (`Int8WeightPerChannelFloatMSE`). Returns (codes int8 or int16 [out, in], scale float32 [out] or [out, in / group]).
    """
    rows = weight.detach().float().reshape(-1, group or weight.shape[1])  # a row per scale
    scale = _scale(rows, fmt, method)
    codes = torch.round(rows / scale[:, None]).clamp(fmt.qmin, fmt.qmax)
    shape = (len(weight),) if group is None else (len(weight), -1)
    return _held(codes.view(weight.shape), fmt), scale.view(shape)


def _held(codes: Tensor, fmt: IntFormat) -> Tensor:
    return codes.to(torch.int8 if fmt.bits <= 8 else torch.int16)


def _scale(rows: Tensor, fmt: IntFormat, method: WeightMethod) -> Tensor:
    """One scale for each row of a weight, float32 [rows]."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scale: Tensor = _brevitas_linear(rows, fmt, method).quant_weight().scale
    wider = (2 ** (fmt.bits - 1) - 1) / fmt.qmax  # 1 but for INT16, whose largest code is ours
    return (scale.detach().float().reshape(-1) * wider).clamp(min=TINY)


def _brevitas_linear(weight: Tensor, fmt: IntFormat, method: WeightMethod = "rtn") -> Any:
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE

    rows, columns = weight.shape
    quantizer = Int8WeightPerChannelFloatMSE if method == "mse" else Int8WeightPerChannelFloat
    layer = QuantLinear(
        columns, rows, bias=False, weight_quant=quantizer, weight_bit_width=fmt.bits, device=weight.device
    )
    layer.weight.data = weight
    return layer.eval()


def gptq_weight(weight: Tensor, hessian: Tensor, fmt: IntFormat, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes whose outputs for the calibration inputs X change least: GPTQ (arXiv 2210.17323), by Brevitas' solver.

    weight: [out, in]. hessian: X^T X, float64 [in, in]. Returns what `quantize_weight` returns. The scale of a group is
    the least-squares one of its weights as they stand when the solver comes to it. Brevitas would drive the whole
    model by itself and average Hessians in float32 as batches come; here its solver gets the sum, and its columns are
    quantized by scales that are held: `Int8WeightPerChannelFloat` takes them anew from the weight at every step, which
    makes GPTQ a silent no-op. Raises QDeltaNetError if the Hessian cannot be inverted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.graph.gptq import GPTQ

        class Solver(GPTQ):
            """Columns in order, quantized here."""

            def get_quant_weights(self, i: int, i1: int, permutation_list: list[Tensor], *_: bool) -> Tensor:
                """The values [1, out] that column i1 + i takes."""
                current: Tensor = self.layer.weight.data
                return columns.quantized(current, i1 + i)[None]

        columns = _Columns(weight, fmt, group or weight.shape[1])
        layer = _brevitas_linear(weight.detach().to(torch.float64, copy=True), fmt)
        solver = Solver(layer, "projection", False, 1, create_weight_orig=False, num_blocks=1, device=weight.device,
                        dtype=torch.float64)  # fmt: skip
        # whole groups: the weights of a group have to be current when it begins
        solver.blocksize = BLOCK if group is None else group * max(1, BLOCK // group)
        solver.H = _invertible(hessian.to(weight.device))[None]
        with torch.no_grad():
            solver.single_layer_update(percdamp=DAMPING)
    if columns.done != weight.shape[1]:
        raise QDeltaNetError("method gptq: the inputs that were seen cannot be inverted; calibrate on more samples")
    scale = columns.scale[:, 0] if group is None else columns.scale
    return _held(columns.codes, fmt), scale


def _invertible(hessian: Tensor) -> Tensor:
    """A copy in which channels that were always zero keep their weights: they are rounded to nearest."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    return hessian


class _Columns:
    """Codes column by column. The scale of a group is held from its first column on."""

    def __init__(self, weight: Tensor, fmt: IntFormat, group: int) -> None:
        self.fmt, self.group, self.done = fmt, group, 0
        self.codes = torch.zeros(weight.shape, device=weight.device)
        self.scale = torch.ones(len(weight), weight.shape[1] // group, device=weight.device)

    def quantized(self, weight: Tensor, column: int) -> Tensor:
        """weight: [out, in] as it stands. Returns what column `column` becomes, [out] float64."""
        g, first = divmod(column, self.group)
        if first == 0:
            self.scale[:, g] = _scale(weight[:, column : column + self.group].float(), self.fmt, "mse")
        scale = self.scale[:, g].double()
        codes = torch.round(weight[:, column] / scale).clamp(self.fmt.qmin, self.fmt.qmax)
        self.codes[:, column] = codes
        self.done += 1
        return codes * scale

"""A projection in integers: weight codes with a scale per output channel or group, activation codes per token or per
tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import AUTO
from ..core import (
    BindingError,
    Granularity,
    IntFormat,
    NonFiniteError,
    ProjectionScheme,
    check_product,
    dynamic_scale,
    round_half_even,
    saturate,
)
from .execution import Execution, backend_for
from .scales import Float32Buffers


class QuantLinear(Float32Buffers):
    """y = sum over the groups g of input channels of (f32(codes(x)_g @ codes(W)_g^T) * s_x) * s_W[:, g], then + bias.

    The accumulator of a group is exact. The products and the sum are float32, the sum from the first group to the
    last, so that every backend gives the same bits. Where the scheme leaves activations in float, fake and integer
    execution both multiply them with the weights that the codes stand for.

    Buffers: `codes` int8 or int16 [out, in] (never called `weight`: a loader that skips our quantizer must fail rather
    than run float), `scale` float32 [out] or [out, groups], and `input_scale` float32 [1] where activations are
    static. `original`, the float layer, exists until the model is exported; float execution needs it.

    Raises BindingError where the groups do not divide the input channels or an accumulator could overflow.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, scheme: ProjectionScheme, original: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.group = in_features if scheme.group is None else scheme.group
        if in_features % self.group:
            raise BindingError(f"projection of {in_features} inputs: groups of {self.group} do not divide them")
        dtype = torch.int8 if scheme.weight.bits <= 8 else torch.int16
        shape = (out_features,) if scheme.group is None else (out_features, in_features // self.group)
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=dtype))
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float32))
        self.activation = scheme.activation.format
        self.is_static = self.activation is not None and scheme.activation.scale == "calibrated"
        if self.is_static:
            self.register_buffer("input_scale", torch.ones(1, dtype=torch.float32))
        if self.activation is not None:
            check_product(f"projection of {in_features} inputs", self.group, self.activation, scheme.weight, 64)
        self.register_parameter("bias", None if original is None else original.bias)
        self.original = original
        self.execution: Execution = "float"
        self.backend_name = AUTO
        self.observe: Callable[[Tensor], None] | None = None
        self.saturated = 0

    def set_execution(self, execution: Execution, backend: str = AUTO) -> None:
        """Choose how the projection executes; what was counted as clipped is forgotten."""
        self.execution, self.backend_name, self.saturated = execution, backend, 0

    @property
    def weight(self) -> Tensor:
        """The float weight, for code that only asks for its dtype or device."""
        return self.original.weight if self.original is not None else self.scale

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, float32 [out, in]."""
        grouped = self.codes.to(torch.float32).view(self.out_features, -1, self.group)
        return (grouped * self.scale.view(self.out_features, -1, 1)).view(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out] in x's dtype."""
        if self.execution in ("float", "observe"):
            if self.original is None:
                raise BindingError("this checkpoint holds integer weights only: execute it as fake or integer")
            if self.observe is not None:
                self.observe(x)
            result: Tensor = self.original(x)
            return result
        if self.activation is None:
            return F.linear(x, self.dequantized().to(x.dtype), self.bias)
        real = x.to(torch.float32)
        if not bool(torch.isfinite(real.detach().abs().amax()) if real.numel() else True):
            raise NonFiniteError("projection input")
        y = self._integers(real.reshape(-1, self.in_features), self.activation)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def _integers(self, rows: Tensor, fmt: IntFormat) -> Tensor:
        """float32 [tokens, in] -> float32 [tokens, out]."""
        dynamic = not self.is_static
        scale = dynamic_scale(rows[None, None], fmt.qmax, Granularity.PER_TOKEN)[0, 0] if dynamic else self.input_scale
        codes, saturated = saturate(round_half_even(rows / scale), fmt)
        self.saturated += int(saturated)
        backend = backend_for(self.execution, self.backend_name, rows.device)
        weight, step = self.codes.to(torch.float32).T, self.scale.view(self.out_features, -1)
        y: Tensor | None = None
        for index, start in enumerate(range(0, self.in_features, self.group)):
            part = slice(start, start + self.group)
            acc = backend.matmul(codes[:, part], weight[part], fmt.qmax, self.scheme.weight.qmax)
            term = (acc.to(torch.float32) * scale) * step[:, index]
            y = term if y is None else y + term
        assert y is not None
        return y

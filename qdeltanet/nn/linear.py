"""A projection in integers: weight codes per output channel, activation codes per token or per tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends import AUTO
from ..core import (
    BindingError,
    Granularity,
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
    """y = (f32(codes(x) @ codes(W)^T) * s_x) * s_W.

    Buffers: `codes` int8 or int16 [out, in] (never called `weight`: a loader that skips our quantizer must fail rather
    than run float), `scale` float32 [out], and `input_scale` float32 [1] where activations are static. `original`, the
    float layer, exists until the model is exported; float execution needs it.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, scheme: ProjectionScheme, original: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        dtype = torch.int8 if scheme.weight.bits <= 8 else torch.int16
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=dtype))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.is_static = scheme.activation.scale == "calibrated"
        if self.is_static:
            self.register_buffer("input_scale", torch.ones(1, dtype=torch.float32))
        self.original = original
        self.execution: Execution = "float"
        self.backend_name = AUTO
        self.observe: Callable[[Tensor], None] | None = None
        self.saturated = 0
        assert scheme.activation.format is not None
        check_product(f"projection of {in_features} inputs", in_features, scheme.activation.format, scheme.weight, 64)

    def set_execution(self, execution: Execution, backend: str = AUTO) -> None:
        """Choose how the projection executes; what was counted as clipped is forgotten."""
        self.execution, self.backend_name, self.saturated = execution, backend, 0

    @property
    def weight(self) -> Tensor:
        """The float weight, for code that only asks for its dtype or device."""
        return self.original.weight if self.original is not None else self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out] in x's dtype."""
        if self.execution in ("float", "observe"):
            if self.original is None:
                raise BindingError("this checkpoint holds integer weights only: execute it as fake or integer")
            if self.observe is not None:
                self.observe(x)
            result: Tensor = self.original(x)
            return result
        fmt = self.scheme.activation.format
        assert fmt is not None
        real = x.to(torch.float32)
        if not bool(torch.isfinite(real.detach().abs().amax()) if real.numel() else True):
            raise NonFiniteError("projection input")
        rows = real.reshape(1, 1, -1, self.in_features)
        scale = self.input_scale if self.is_static else dynamic_scale(rows, fmt.qmax, Granularity.PER_TOKEN)[0, 0]
        codes, saturated = saturate(round_half_even(rows[0, 0] / scale), fmt)
        self.saturated += int(saturated)
        backend = backend_for(self.execution, self.backend_name, x.device)
        weight = self.codes.to(torch.float32).T
        acc = backend.matmul(codes, weight, fmt.qmax, self.scheme.weight.qmax)
        y = (acc.to(torch.float32) * scale) * self.scale
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

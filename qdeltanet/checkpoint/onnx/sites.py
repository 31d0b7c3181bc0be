"""How a site stands in a graph: as a pair of QuantizeLinear and DequantizeLinear, or as a name with an encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from onnx import TensorProto
from torch import Tensor

from ...core import IntFormat
from .graph import Graph, Value
from .symbol import Symbol

# Containers of ONNX by their bits, and the codes that they hold.
CONTAINERS = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
# Of the fraction of a coefficient, in UINT16: it reaches 1, or with beta up to 2 (which becomes 2 - 2^-15) nearly 2.
COEFFICIENT_CONTAINER_BITS = 15


@dataclass(frozen=True)
class Quantizer:
    """What a site asks for. name: of the tensor that its consumers read, unique in the graph. key: of its scale, which
    tensors of several chunks share. scale: float32 [H or 1, R or 1, C or 1]."""

    name: str
    key: str
    format: IntFormat
    scale: Tensor


class Sites(Protocol):
    def site(self, x: Symbol, quantizer: Quantizer) -> Symbol:
        """What the consumers of a site read."""
        ...

    def coefficient(self, x: Symbol, name: str, fraction_bits: int) -> Symbol:
        """Decay or beta in [0, 2], rounded to a multiple of 2^-fraction_bits."""
        ...


@dataclass
class QdqSites:
    """QuantizeLinear and DequantizeLinear at every site. Tensors: `<name>.codes` between the two, `<name>` behind them,
    `<key>.scale` and `<key>.zero_point` (zeros).

    A container's codes begin one lower than ours, and hold more where a format has no container of its own; what
    may lie out there is clipped first.
    """

    def site(self, x: Symbol, quantizer: Quantizer) -> Symbol:
        fmt = quantizer.format
        container = next(b for b in CONTAINERS if b >= fmt.bits)
        x = x.binary("Max", quantizer.scale * fmt.qmin)
        x = x if fmt.qmax == 2 ** (container - 1) - 1 else x.binary("Min", quantizer.scale * fmt.qmax)
        return _pair(x, quantizer.name, quantizer.key, quantizer.scale, CONTAINERS[container])

    def coefficient(self, x: Symbol, name: str, fraction_bits: int) -> Symbol:
        if fraction_bits > COEFFICIENT_CONTAINER_BITS:  # wider than any container: rounded in float32, which is exact
            return (x * 2.0**fraction_bits).unary("Round") * 2.0**-fraction_bits
        return _pair(x, name, "coefficient", torch.full((1, 1, 1), 2.0**-fraction_bits), TensorProto.UINT16)


class Dequantized(Symbol):
    """What comes out of a pair. Moved about, it passes through another one of the same scale, which changes no code:
    compilers take an operation for an integer one where it stands between pairs, and ONNX Runtime, which would add
    them by itself, does it wrongly in some versions (with zero points from 1.28 on, without them before).
    """

    def __init__(self, graph: Graph, value: Value, name: str, key: str, scale: Tensor, container: int) -> None:
        super().__init__(graph, value)
        self.name, self.key, self.scale, self.container = name, key, scale, container
        self._moved: dict[str, Symbol] = {}

    @property
    def mT(self) -> Symbol:
        return self._again("mT", lambda: Symbol(self.graph, self.value).mT, self.scale.mT)

    def __getitem__(self, key: Any) -> Symbol:
        assert isinstance(key, int), "codes are taken chunk by chunk"
        return self._again(f"chunk{key}", lambda: Symbol(self.graph, self.value)[key], self.scale)

    def _again(self, how: str, move: Callable[[], Symbol], scale: Tensor) -> Symbol:
        if how not in self._moved:
            self._moved[how] = _pair(move(), f"{self.name}.{how}", self.key, scale, self.container)
        return self._moved[how]


def _pair(x: Symbol, name: str, key: str, scale: Tensor, container: int) -> Dequantized:
    layout, attributes = scale_layout(scale, x.shape)
    step = x.graph.constant(layout, f"{key}.scale")
    zero = x.graph.constant(torch.zeros(layout.shape), f"{key}.zero_point", container)
    codes = x.graph.add("QuantizeLinear", [x.value, step, zero], x.shape, container, **attributes)
    real = x.graph.add("DequantizeLinear", [codes, step, zero], x.shape, **attributes)
    codes.name, real.name = f"{name}.codes", name
    return Dequantized(x.graph, real, name, key, scale, container)


def scale_layout(scale: Tensor, shape: Sequence[int]) -> tuple[Tensor, dict[str, int]]:
    """A scale [H or 1, R or 1, C or 1] as QuantizeLinear takes it for a tensor of `shape`, with the attributes.

    It has one axis, or none. Where two are kept, heads and rows or columns, the axis left over is one block
    (`block_size`), and the scale is repeated over the leading axes.
    """
    first = len(shape) - scale.dim()
    kept = [first + i for i, n in enumerate(scale.shape) if n > 1]
    if not kept:
        return scale.reshape(()), {}
    if len(kept) == 1:
        return scale.flatten(), {"axis": kept[0]}
    (block,) = {len(shape) - 2, len(shape) - 1} - set(kept)
    full = [1 if i == block else n for i, n in enumerate(shape)]
    return scale.expand(full).contiguous(), {"axis": block, "block_size": shape[block]}


@dataclass
class EncodedSites:
    """A float graph whose tensors are called as the sites, and their encodings in the form of AIMET 1.0.0.

    An encoding of an activation is one scale for the tensor: where a site has more, the tensor that carries the name
    is brought to the largest of them before its quantizer and back behind it, which gives the same codes. AIMET clips
    at the whole range of the bits: one code below ours, in INT16 (whose qmax is 32639) further out on both sides.
    """

    encodings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def site(self, x: Symbol, quantizer: Quantizer) -> Symbol:
        scale = quantizer.scale
        top = scale.amax()
        single = scale.numel() == 1
        named = self._named(x if single else x * (top / scale), quantizer.name)
        self.encodings[quantizer.name] = encoding(quantizer.format.bits, float(top))
        return named if single else named * (scale / top)

    def coefficient(self, x: Symbol, name: str, fraction_bits: int) -> Symbol:
        if fraction_bits > COEFFICIENT_CONTAINER_BITS:
            return x
        named = self._named(x, name)
        self.encodings[name] = encoding(16, 2.0**-fraction_bits, symmetric=False)
        return named

    def _named(self, x: Symbol, name: str) -> Symbol:
        """What was just made, and has no name yet, has no other readers; else a quantizer would be theirs, too."""
        made = bool(x.graph.nodes) and x.value is x.graph.nodes[-1].output and x.value.name not in self.encodings
        value = x.value if made else x.graph.add("Identity", [x.value], x.shape)
        value.name = name
        return Symbol(x.graph, value)


def encoding(bits: int, scale: float | list[float], symmetric: bool = True) -> dict[str, Any]:
    """One entry without its name. AIMET counts codes from 0, so a symmetric range begins at offset -2^(bits - 1)."""
    scales = scale if isinstance(scale, list) else [scale]
    return {
        "dtype": "INT",
        "bw": bits,
        "is_sym": symmetric,
        "scale": scales,
        "offset": [-(2 ** (bits - 1)) if symmetric else 0] * len(scales),
        "enc_type": "PER_CHANNEL" if isinstance(scale, list) else "PER_TENSOR",
    }

"""A stand-in for a tensor: what the rule's own code does to it appends nodes to a graph.

It has the few methods that the float front end and the walk over chunks use; torch functions find theirs by
`__torch_function__`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...core import hadamard
from .graph import Graph, Value

HADAMARD = "hadamard"  # the rotations' matrices are called so, with their size
Other = Any  # a Symbol, a Tensor (a constant) or a number


class Symbol:
    """A float32 tensor [..., H, R, C] of the graph, of a shape that is known."""

    dtype = torch.float32
    device = torch.device("meta")  # there are no numbers to look at
    requires_grad = False

    def __init__(self, graph: Graph, value: Value) -> None:
        self.graph, self.value = graph, value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return True

    def to(self, dtype: torch.dtype) -> Symbol:
        assert dtype == torch.float32, "the rule computes in float32"
        return self

    def float(self) -> Symbol:
        return self

    def contiguous(self) -> Symbol:
        return self

    # -- elementwise ---------------------------------------------------------------------------------------------------

    def _node(self, op: str, *others: Value, shape: Sequence[int] | None = None, **attributes: Any) -> Symbol:
        shape = self.shape if shape is None else shape
        return Symbol(self.graph, self.graph.add(op, [self.value, *others], shape, **attributes))

    def _value(self, x: Other) -> Value:
        return x.value if isinstance(x, Symbol) else self.graph.constant(torch.as_tensor(x, dtype=torch.float32))

    def binary(self, op: str, other: Other) -> Symbol:
        value = self._value(other)
        return self._node(op, value, shape=torch.broadcast_shapes(self.shape, value.shape))

    def __mul__(self, other: Other) -> Symbol:
        return self.binary("Mul", other)

    def __add__(self, other: Other) -> Symbol:
        return self.binary("Add", other)

    def __sub__(self, other: Other) -> Symbol:
        return self.binary("Sub", other)

    __rmul__, __radd__ = __mul__, __add__

    def __neg__(self) -> Symbol:
        return self._node("Neg")

    def __matmul__(self, other: Other) -> Symbol:
        value = self._value(other)
        lead = torch.broadcast_shapes(self.shape[:-2], value.shape[:-2])
        return self._node("MatMul", value, shape=(*lead, self.shape[-2], value.shape[-1]))

    def unary(self, *ops: str) -> Symbol:
        x = self
        for op in ops:
            x = x._node(op)
        return x

    def tril(self, diagonal: int = 0) -> Symbol:
        """By a mask: few NPUs have Trilu. What it meets above the diagonal is finite."""
        return self * torch.ones(self.shape[-2:]).tril(diagonal)

    tril_ = tril

    # -- along an axis -------------------------------------------------------------------------------------------------

    def sum(self, dim: int, keepdim: bool) -> Symbol:
        assert keepdim, "only sums that keep their axis"
        axis = self._axis(dim)
        shape = [1 if i == axis else n for i, n in enumerate(self.shape)]
        return self._node("ReduceSum", self.graph.constant([axis]), shape=shape, keepdims=1)

    def cumsum(self, dim: int) -> Symbol:
        return self._node("CumSum", self.graph.constant(torch.tensor(self._axis(dim))))

    def repeat_interleave(self, repeats: int, dim: int) -> Symbol:
        axis = self._axis(dim)
        index = torch.arange(self.shape[axis]).repeat_interleave(repeats)
        shape = [len(index) if i == axis else n for i, n in enumerate(self.shape)]
        return self._node("Gather", self.graph.constant(index), shape=shape, axis=axis)

    def _axis(self, dim: int) -> int:
        return dim % len(self.shape)

    # -- shape ---------------------------------------------------------------------------------------------------------

    def view(self, *shape: int) -> Symbol:
        full = tuple(torch.empty(self.shape, device="meta").view(shape).shape)
        return self if full == self.shape else self._node("Reshape", self.graph.constant(list(full)), shape=full)

    def unsqueeze(self, dim: int) -> Symbol:
        axis = dim % (len(self.shape) + 1)
        return self.view(*self.shape[:axis], 1, *self.shape[axis:])

    def flatten(self, start: int, end: int) -> Symbol:
        return self.view(*torch.empty(self.shape, device="meta").flatten(start, end).shape)

    def permute(self, *order: int) -> Symbol:
        return self._node("Transpose", shape=[self.shape[i] for i in order], perm=list(order))

    def transpose(self, a: int, b: int) -> Symbol:
        order = list(range(self.dim()))
        order[a], order[b] = order[b], order[a]
        return self.permute(*order)

    @property
    def mT(self) -> Symbol:
        return self.transpose(-2, -1)

    def __getitem__(self, key: Any) -> Symbol:
        """One index drops the first axis; slices of step 1 cut any."""
        if isinstance(key, int):
            return self._node("Gather", self.graph.constant(torch.tensor(key)), shape=self.shape[1:], axis=0)
        keys = key if isinstance(key, tuple) else (key,)
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys = (*keys[:at], *[slice(None)] * (self.dim() - len(keys) + 1), *keys[at + 1 :])
        return self._cut(dict(enumerate(keys)))

    def _cut(self, slices: dict[int, slice]) -> Symbol:
        bounds = {axis: part.indices(self.shape[axis]) for axis, part in slices.items()}
        bounds = {axis: b for axis, b in bounds.items() if b[1] - b[0] != self.shape[axis]}
        if not bounds:
            return self
        starts, stops = ([b[i] for b in bounds.values()] for i in (0, 1))
        shape = [bounds[i][1] - bounds[i][0] if i in bounds else n for i, n in enumerate(self.shape)]
        return self._node("Slice", *map(self.graph.constant, (starts, stops, list(bounds))), shape=shape)

    def new_zeros(self, *shape: int, dtype: torch.dtype) -> Symbol:
        return Symbol(self.graph, self.graph.constant(torch.zeros(shape, dtype=dtype)))

    def new_empty(self, *shape: int, dtype: torch.dtype) -> Pieces:
        return Pieces({}, shape[1])

    # -- torch functions -----------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.pad:
            assert not any(args[1]), "the graph takes whole chunks"
            return args[0]
        if func.__name__ not in FUNCTIONS:
            raise NotImplementedError(f"{func.__name__} has no place in an exported graph")
        return FUNCTIONS[func.__name__](*args)


class Pieces:
    """A tensor [B, N, C, H, V] that is written chunk by chunk, `x[:, n] = part`."""

    def __init__(self, parts: dict[int, Symbol], chunks: int, start: int = 0) -> None:
        self.parts, self.chunks, self.start = parts, chunks, start

    def __getitem__(self, key: tuple[slice, slice]) -> Pieces:
        return Pieces(self.parts, self.chunks, self.start + (key[1].start or 0))

    def __setitem__(self, key: tuple[slice, int], part: Symbol) -> None:
        self.parts[self.start + key[1]] = part

    def flatten(self, start: int, end: int) -> Symbol:
        """[B, N * C, H, V]."""
        assert (start, end) == (1, 2)
        parts = [self.parts[n] for n in range(self.chunks)]
        first = parts[0]
        if len(parts) == 1:
            return first
        shape = (first.shape[0], first.shape[1] * len(parts), *first.shape[2:])
        return first._node("Concat", *(p.value for p in parts[1:]), shape=shape, axis=1)


def _rotated(x: Symbol) -> Symbol:
    """One product with the matrix itself: log2 d stages of additions would be as many small nodes."""
    matrix = x.graph.constant(hadamard(torch.eye(x.shape[-1])), f"{HADAMARD}.{x.shape[-1]}")
    return x @ Symbol(x.graph, matrix)


def _per_head(operation: Any, x: Symbol, y: Symbol) -> Symbol:
    """Heads of x repeated as y has them: one more axis would be more than five, which few NPUs take."""
    times = y.shape[-3] // x.shape[-3]
    return operation(x if times == 1 else x.repeat_interleave(times, dim=-3), y)


def _swapped(op: str) -> Any:
    return lambda x, y: x.binary(op, y) if isinstance(x, Symbol) else y.binary(op, x)


FUNCTIONS: dict[str, Any] = {
    "exp": lambda x: x.unary("Exp"),
    "rsqrt": lambda x: x.unary("Sqrt", "Reciprocal"),
    "mul": _swapped("Mul"),
    "add": _swapped("Add"),
    "hadamard": _rotated,
    "per_head": _per_head,
}

"""An ONNX graph that is being written: nodes, constants by their content, and names that may come later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET = 21  # the first with INT16, UINT16 and INT4 in QuantizeLinear
IR_VERSION = 10  # what came with it


@dataclass(eq=False)
class Value:
    """A tensor of the graph; it is known by its name, which may be given after the node that makes it."""

    name: str
    shape: tuple[int, ...]
    elem_type: int = TensorProto.FLOAT


@dataclass
class Node:
    op: str
    inputs: tuple[Value, ...]
    output: Value
    attributes: Mapping[str, Any]


@dataclass
class Graph:
    """Every shape is fixed: kernels for NPUs want it so."""

    inputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[tuple[Any, ...], Value] = field(default_factory=dict)
    tensors: dict[int, TensorProto] = field(default_factory=dict)

    def input(self, name: str, shape: Sequence[int]) -> Value:
        self.inputs.append(Value(name, tuple(shape)))
        return self.inputs[-1]

    def add(
        self,
        op: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        elem_type: int = TensorProto.FLOAT,
        **attributes: Any,
    ) -> Value:
        """Append a node; its output is named after the operation until it is renamed."""
        output = Value(f"{op}_{len(self.nodes)}", tuple(shape), elem_type)
        self.nodes.append(Node(op, tuple(inputs), output, attributes))
        return output

    def constant(self, x: Tensor | Sequence[int], name: str | None = None, elem_type: int | None = None) -> Value:
        """An initializer; the same content is held once. name: numbered without one, or from the second content on.
        elem_type: else float32 or int64."""
        content = torch.as_tensor(x).detach().cpu()
        array = content.float().numpy() if content.is_floating_point() else content.long().numpy()
        kind = elem_type or (TensorProto.FLOAT if content.is_floating_point() else TensorProto.INT64)
        key = (name, kind, array.shape, array.tobytes())
        if key not in self.constants:
            taken = sum(key[0] == name for key in self.constants) if name else 0
            unique = name + (f".{taken}" if taken else "") if name else f"constant_{len(self.constants)}"
            value = Value(unique, tuple(array.shape), kind)
            self.constants[key], self.tensors[id(value)] = value, _tensor(value, array)
        return self.constants[key]

    def model(self, name: str, outputs: Mapping[str, Value], metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The checked model, with the type and shape of every tensor. outputs: what they are to be called."""
        named = [self.add("Identity", [x], x.shape) for x in outputs.values()]
        for value, output in zip(named, outputs, strict=True):
            value.name = output
        nodes = self._needed(named)
        used = {id(x) for node in nodes for x in node.inputs}
        graph = helper.make_graph(
            [_node(i, node) for i, node in enumerate(nodes)],
            name,
            [_info(x) for x in self.inputs],
            [_info(x) for x in named],
            [self.tensors[id(x)] for x in self.constants.values() if id(x) in used],
            value_info=[_info(node.output) for node in nodes if node.output not in named],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qdeltanet"
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model

    def _needed(self, outputs: Sequence[Value]) -> list[Node]:
        """Nodes that an output depends on: a decode step has no use for A."""
        wanted, kept = {id(x) for x in outputs}, []
        for node in reversed(self.nodes):
            if id(node.output) in wanted:
                wanted |= {id(x) for x in node.inputs}
                kept.append(node)
        return kept[::-1]


def _tensor(value: Value, array: np.ndarray[Any, Any]) -> TensorProto:
    if value.elem_type in (TensorProto.FLOAT, TensorProto.INT64):
        return numpy_helper.from_array(array, value.name)
    return helper.make_tensor(value.name, value.elem_type, array.shape, array.flatten().tolist())


def _node(number: int, node: Node) -> onnx.NodeProto:
    names = [x.name for x in node.inputs]
    return helper.make_node(node.op, names, [node.output.name], name=f"{node.op}_{number}", **node.attributes)


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, value.elem_type, value.shape)

"""Sequences of tensors, which are Python lists here, and optional values, which may be None."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import sequence as functions
from effic.backends.torch.operators.arguments import scalar, tensor


def construct(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.construct, *node.inputs)


def at(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.at, tensor(node, 0), scalar(node, graph, 1))


def insert(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.insert, tensor(node, 0), tensor(node, 1), scalar(node, graph, 2))


def erase(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.erase, tensor(node, 0), scalar(node, graph, 1))


def length(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.length, tensor(node, 0), graph.device())


def concatenate(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    new_axis = bool(node.attributes.get("new_axis", 0))
    return graph.call(functions.concatenate, tensor(node, 0), int(node.attributes["axis"]), new_axis)


def split(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    parts = graph.sizes(node, 1)
    rank = node.rank(1)
    if rank == 0:
        # A scalar is the size of every part, a vector has the size of each.
        parts = scalar(node, graph, 1)  # type: ignore[assignment]
    elif rank is None and parts is not None:
        node.refuse("has a split whose rank is not known")
    axis, keep = int(node.attributes.get("axis", 0)), bool(node.attributes.get("keepdims", 1))
    return graph.call(functions.split, tensor(node, 0), parts, axis, keep)


def optional(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.same, node.input(0))


def has_element(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.has_element, node.input(0), graph.device())


def get_element(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    value = node.value(0)
    if value is not None and isinstance(value.type, ir.OptionalType):
        return graph.call(functions.element, tensor(node, 0))
    return tensor(node, 0)

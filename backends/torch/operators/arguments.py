"""How converters read numbers out of inputs and attributes."""

from __future__ import annotations

import operator

import onnx_ir as ir
import torch
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.types import torch_dtype

Number = int | float | fx.Node


def scalar(node: OperatorNode, graph: GraphBuilder, index: int) -> Number | None:
    """An input of one number as a Python number (an fx node that makes one), None when it is left out."""
    found = graph.sizes(node, index)
    if found is None:
        return None
    if isinstance(found, fx.Node):
        return graph.call(operator.getitem, found, 0)
    return found[0]


def tensor(node: OperatorNode, index: int) -> fx.Node:
    """An input that has to be there."""
    found = node.input(index)
    if found is None:
        node.refuse(f"lacks its input {index}")
    return found


def rank(node: OperatorNode, index: int) -> int:
    """The rank of an input that has to be known."""
    found = node.rank(index)
    if found is None:
        node.refuse(f"has an input {index} whose rank is not known; infer shapes first")
    return found


def unpack(graph: GraphBuilder, made: fx.Node, node: OperatorNode) -> tuple[fx.Node | None, ...]:
    """The parts of a tuple that outputs of the node are read from."""
    return tuple(
        graph.call(operator.getitem, made, i) if used else None for i, used in enumerate(node.outputs_used)
    )


def attribute_dtype(node: OperatorNode, name: str) -> torch.dtype | None:
    """An attribute that names an element type, as torch's."""
    code = node.attributes.get(name)
    return torch_dtype(ir.DataType(code)) if code else None

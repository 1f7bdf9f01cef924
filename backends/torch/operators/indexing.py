"""Gathering, scattering, searching and padding."""

from __future__ import annotations

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import indexing as functions
from effic.backends.torch.operators.arguments import attribute_dtype, rank, scalar, tensor, unpack


def gather(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axis = int(node.attributes.get("axis", 0))
    index = graph.sizes(node, 1)
    if node.rank(1) == 0 and isinstance(index, list):
        return graph.call(torch.select, tensor(node, 0), axis, index[0])
    return graph.call(functions.gather, tensor(node, 0), tensor(node, 1), axis)


def gather_elements(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axis = int(node.attributes.get("axis", 0))
    return graph.call(functions.gather_elements, tensor(node, 0), tensor(node, 1), axis)


def gather_nd(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    batch = int(node.attributes.get("batch_dims", 0))
    return graph.call(functions.gather_nd, tensor(node, 0), tensor(node, 1), batch)


def _reduction(node: OperatorNode) -> str:
    return str(node.attributes.get("reduction", "none"))


def scatter_elements(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    inputs = [tensor(node, i) for i in range(3)]
    axis = int(node.attributes.get("axis", 0))
    return graph.call(functions.scatter_elements, *inputs, axis, _reduction(node))


def scatter_nd(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.scatter_nd, *(tensor(node, i) for i in range(3)), _reduction(node))


def nonzero(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.nonzero, tensor(node, 0))


def top_k(node: OperatorNode, graph: GraphBuilder) -> tuple[fx.Node | None, ...]:
    k = node.attributes["k"] if node.opset < 10 else scalar(node, graph, 1)
    axis, largest = int(node.attributes.get("axis", -1)), bool(node.attributes.get("largest", 1))
    return unpack(graph, graph.call(functions.top_k, tensor(node, 0), k, axis, largest), node)


def one_hot(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    depth = scalar(node, graph, 1)
    if not isinstance(depth, fx.Node):
        depth = int(depth or 0)
    else:
        depth = graph.call(int, depth)
    axis = int(node.attributes.get("axis", -1))
    return graph.call(functions.one_hot, tensor(node, 0), depth, tensor(node, 2), axis)


def unique(node: OperatorNode, graph: GraphBuilder) -> tuple[fx.Node | None, ...]:
    in_order = not node.attributes.get("sorted", 1)
    made = graph.call(functions.unique, tensor(node, 0), node.attributes.get("axis"), in_order)
    return unpack(graph, made, node)


def trilu(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    k = scalar(node, graph, 1)
    function = torch.triu if node.attributes.get("upper", 1) else torch.tril
    return graph.call(function, tensor(node, 0), 0 if k is None else k)


def eye_like(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    k = int(node.attributes.get("k", 0))
    return graph.call(functions.eye_like, tensor(node, 0), k, attribute_dtype(node, "dtype"))


def compress(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.compress, tensor(node, 0), tensor(node, 1), node.attributes.get("axis"))


def reverse_sequence(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    batch, time = int(node.attributes.get("batch_axis", 1)), int(node.attributes.get("time_axis", 0))
    return graph.call(functions.reverse_sequence, tensor(node, 0), tensor(node, 1), batch, time)


def center_crop_pad(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axes = node.attributes.get("axes") or list(range(rank(node, 0)))
    return graph.call(functions.center_crop_pad, tensor(node, 0), graph.sizes(node, 1), axes)


def pad(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x, size, mode = tensor(node, 0), rank(node, 0), str(node.attributes.get("mode", "constant"))
    axes: list[int | fx.Node] | fx.Node | None = list(range(size))
    value: object = 0
    if node.opset < 11:
        pads: list[int | fx.Node] | fx.Node = list(node.attributes["pads" if node.opset > 1 else "paddings"])
        value = node.attributes.get("value", 0.0)
    else:
        pads = graph.sizes(node, 1) or []
        if node.value(3) is not None:
            axes = graph.sizes(node, 3)
        if node.value(2) is not None and mode == "constant":
            found = node.constant(2)
            value = tensor(node, 2) if found is None else found.reshape(-1)[0].item()
    if isinstance(pads, fx.Node) or not isinstance(axes, list):
        return graph.call(functions.pad_by_list, x, pads, axes, mode, value)
    known = [int(axis) % size for axis in axes if not isinstance(axis, fx.Node)]
    if len(known) != len(axes):
        return graph.call(functions.pad_by_list, x, pads, axes, mode, value)
    starts, ends = pads[: len(known)], pads[len(known) :]
    if mode == "constant" and not isinstance(value, fx.Node) and node.dtype(0) != ir.DataType.BOOL:
        pairs = dict(zip(known, zip(starts, ends, strict=True), strict=True))
        first = min((axis for axis in known if pairs[axis] != (0, 0)), default=size)
        flat = [amount for axis in range(size - 1, first - 1, -1) for amount in pairs.get(axis, (0, 0))]
        return graph.call(F.pad, x, flat, value=value)
    return graph.call(functions.pad, x, starts, ends, known, mode, value)


def non_max_suppression(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    limit, overlap = scalar(node, graph, 2), scalar(node, graph, 3)
    return graph.call(
        functions.non_max_suppression,
        tensor(node, 0),
        tensor(node, 1),
        0 if limit is None else limit,
        0.0 if overlap is None else overlap,
        scalar(node, graph, 4),
        bool(node.attributes.get("center_point_box", 0)),
    )

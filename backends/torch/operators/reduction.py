"""Sums, extrema, running sums, softmax."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import reduction as functions

_REDUCE: dict[str, Callable[..., Any]] = {
    "ReduceL1": functions.norm1,
    "ReduceL2": functions.norm2,
    "ReduceLogSum": functions.log_sum,
    "ReduceLogSumExp": functions.log_sum_exp,
    "ReduceMax": functions.largest,
    "ReduceMean": functions.mean,
    "ReduceMin": functions.smallest,
    "ReduceProd": functions.product,
    "ReduceSum": functions.total,
    "ReduceSumSquare": functions.sum_square,
}
_SOFTMAX: dict[str, Callable[..., Any]] = {
    "Softmax": F.softmax,
    "LogSoftmax": F.log_softmax,
    "Hardmax": functions.hardmax,
}


def reduce(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x, keep = node.inputs[0], bool(node.attributes.get("keepdims", 1))
    assert x is not None
    axes: Any = None
    if node.opset < (13 if node.op_type == "ReduceSum" else 18):
        axes = node.attributes.get("axes")
    elif node.input(1) is not None:
        axes = graph.sizes(node, 1)
    if not isinstance(axes, fx.Node) and not axes:
        axes = None
        if node.attributes.get("noop_with_empty_axes", 0):
            # The reduction of each element by itself.
            return {"ReduceL1": graph.call(torch.abs, x)}.get(node.op_type, _each(node, graph, x))
    if isinstance(axes, fx.Node) and node.attributes.get("noop_with_empty_axes", 0):
        node.refuse("computes its axes, and does nothing when there are none; make them a constant")
    plain = {"ReduceMean": torch.mean, "ReduceSum": torch.sum}.get(node.op_type)
    if plain is not None and isinstance(axes, list) and axes and _floats(node) and node.rank(0):
        return graph.call(plain, x, list(axes), keepdim=keep)
    return graph.call(_REDUCE[node.op_type], x, axes, keep)


def _floats(node: OperatorNode) -> bool:
    dtype = node.dtype(0)
    return dtype is not None and dtype.is_floating_point()


def _each(node: OperatorNode, graph: GraphBuilder, x: fx.Node) -> fx.Node:
    function = {"ReduceSumSquare": torch.square, "ReduceL2": torch.abs, "ReduceLogSum": torch.log}.get(
        node.op_type
    )
    return x if function is None else graph.call(function, x)


def arg_extremum(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.arg_extremum,
        node.inputs[0],
        int(node.attributes.get("axis", 0)),
        bool(node.attributes.get("keepdims", 1)),
        node.op_type == "ArgMax",
        bool(node.attributes.get("select_last_index", 0)),
    )


def running(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axis = graph.sizes(node, 1)
    place = axis[0] if isinstance(axis, list) else graph.call(operator.getitem, axis, 0)
    exclusive, backwards = bool(node.attributes.get("exclusive", 0)), bool(node.attributes.get("reverse", 0))
    multiply = node.op_type == "CumProd"
    if not exclusive and not backwards and not multiply and _floats(node):
        return graph.call(torch.cumsum, node.inputs[0], place)
    return graph.call(functions.running, node.inputs[0], place, exclusive, backwards, multiply)


def softmax(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    function = _SOFTMAX[node.op_type]
    if node.opset >= 13:
        return graph.call(function, node.inputs[0], int(node.attributes.get("axis", -1)))
    axis, rank = int(node.attributes.get("axis", 1)), node.rank(0)
    if rank is not None and axis in (rank - 1, -1):
        return graph.call(function, node.inputs[0], -1)
    flat = {
        "Softmax": functions.flat_softmax,
        "LogSoftmax": functions.flat_log_softmax,
        "Hardmax": functions.flat_hardmax,
    }[node.op_type]
    return graph.call(flat, node.inputs[0], axis)

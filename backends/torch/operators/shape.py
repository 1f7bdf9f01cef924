"""Shapes and views."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import shape as functions
from effic.backends.torch.types import torch_dtype


def shape(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    """Of a tensor of unknown rank; :mod:`effic.backends.torch.sizes` has the others."""
    return graph.call(
        functions.shape_of, node.inputs[0], node.attributes.get("start", 0), node.attributes.get("end")
    )


def size(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.size_of, node.inputs[0])


def reshape(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x = node.inputs[0]
    assert x is not None
    target = node.attributes["shape"] if node.opset < 5 else graph.sizes(node, 1)
    allow_zero = bool(node.attributes.get("allowzero", 0))
    if not isinstance(target, list):
        return graph.call(functions.reshape, x, target, allow_zero)
    rank = node.rank(0)
    if not allow_zero:
        if rank is not None and any(_is(dim, 0) for dim in target[rank:]):
            node.refuse("copies a dimension that its input does not have")
        target = [graph.method("size", x, i) if _is(dim, 0) else dim for i, dim in enumerate(target)]
    return graph.call(torch.reshape, x, target)


def _is(dim: Any, number: int) -> bool:
    return not isinstance(dim, fx.Node) and dim == number


def expand(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x, target, rank = node.inputs[0], graph.sizes(node, 1), node.rank(0)
    assert x is not None
    static = isinstance(target, list) and not any(isinstance(dim, fx.Node) for dim in target)
    if static and rank is not None and rank <= len(target):  # type: ignore[arg-type]
        before = len(target) - rank  # type: ignore[arg-type]
        dims = [-1 if i >= before and dim == 1 else dim for i, dim in enumerate(target)]  # type: ignore[arg-type]
        return graph.method("expand", x, dims)
    return graph.call(functions.expand, x, target)


def tile(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    if node.opset < 6:
        tiles, axis = node.constant(1), node.constant(2)
        rank = node.rank(0)
        if tiles is None or axis is None or rank is None:
            node.refuse("is of opset 1 and computes how often it repeats")
        repeats: Any = [1] * rank
        repeats[int(axis.reshape(-1)[0])] = int(tiles.reshape(-1)[0])
    else:
        repeats = graph.sizes(node, 1)
    return graph.call(torch.tile, node.inputs[0], repeats)


def transpose(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x, perm, rank = node.inputs[0], node.attributes.get("perm"), node.rank(0)
    if perm is None and rank is not None:
        perm = list(range(rank))[::-1]
    if perm is None:
        return graph.call(functions.reverse_axes, x)
    return graph.call(torch.permute, x, list(perm))


def _axes(node: OperatorNode, graph: GraphBuilder) -> list[Any] | fx.Node | None:
    """Axes from the attribute or, since opset 13, from the second input."""
    if node.opset < 13:
        found = node.attributes.get("axes")
        return None if found is None else [int(axis) for axis in found]
    return graph.sizes(node, 1)


def squeeze(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axes = _axes(node, graph)
    if axes is None:
        return graph.call(torch.squeeze, node.inputs[0])
    if isinstance(axes, list) and len(axes) == 1:
        return graph.call(torch.squeeze, node.inputs[0], axes[0])
    return graph.call(torch.squeeze, node.inputs[0], axes)


def unsqueeze(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axes = _axes(node, graph)
    if isinstance(axes, list) and len(axes) == 1:
        return graph.call(torch.unsqueeze, node.inputs[0], axes[0])
    return graph.call(functions.unsqueeze, node.inputs[0], axes)


def flatten(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axis, rank = int(node.attributes.get("axis", 1)), node.rank(0)
    if axis == 1 and rank is not None and rank >= 2:
        return graph.call(torch.flatten, node.inputs[0], 1)
    return graph.call(functions.flatten, node.inputs[0], axis)


def concat(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(torch.cat, list(node.inputs), dim=int(node.attributes.get("axis", 1)))


def split(node: OperatorNode, graph: GraphBuilder) -> tuple[fx.Node, ...]:
    axis, parts = int(node.attributes.get("axis", 0)), len(node.node.outputs)
    lengths: Any = node.attributes.get("split") if node.opset < 13 else graph.sizes(node, 1)
    if lengths is None:
        pieces = graph.call(functions.split_evenly, node.inputs[0], parts, axis)
    else:
        pieces = graph.call(torch.split, node.inputs[0], lengths, dim=axis)
    return tuple(graph.call(operator.getitem, pieces, i) for i in range(parts))


def slice_(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x, rank = node.inputs[0], node.rank(0)
    starts: Any
    ends: Any
    axes: Any
    steps: Any
    if node.opset < 10:
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        axes, steps = node.attributes.get("axes"), None
    else:
        starts, ends, axes, steps = (graph.sizes(node, i) for i in (1, 2, 3, 4))
    if isinstance(starts, list) and axes is None:
        axes = list(range(len(starts)))
    known = all(isinstance(part, list) for part in (starts, ends, axes)) and (
        steps is None or isinstance(steps, list)
    )
    forward = known and all(isinstance(item, int) and item > 0 for item in steps or [])
    if rank is None or not forward or not all(isinstance(axis, int) for axis in axes):
        return graph.call(functions.slices, x, starts, ends, axes, steps)
    at = [slice(None)] * rank
    for i, axis in enumerate(axes):
        at[axis] = slice(starts[i], ends[i], None if steps is None or steps[i] == 1 else steps[i])
    while at and at[-1] == slice(None):
        at.pop()
    return graph.call(operator.getitem, x, tuple(at)) if at else graph.call(torch.clone, x)


def constant_of_shape(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    value = node.attributes.get("value", np.zeros(1, np.float32))
    dtype = torch_dtype(ir.DataType.from_numpy(value.dtype))
    return graph.call(
        torch.full, graph.sizes(node, 0), value.reshape(-1)[0].item(), dtype=dtype, device=graph.device()
    )


def range_(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    values = [node.value(i) for i in range(3)]
    bounds = [None if value is None else graph.size_array(value) for value in values]
    dtype = node.dtype(0) or node.output_dtype()
    if dtype is None or any(bound is None for bound in bounds):
        return graph.call(functions.arange, *node.inputs)
    numbers = [bound.reshape(-1)[0] for bound in bounds if bound is not None]
    return graph.call(torch.arange, *numbers, dtype=torch_dtype(dtype), device=graph.device())

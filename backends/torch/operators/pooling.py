"""Pooling over windows and over everything, and the norm over neighbouring channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode, Results
from effic.backends.torch.functions import pooling as functions
from effic.backends.torch.operators.arguments import rank, tensor, unpack
from effic.backends.torch.operators.convolution import Windows, windows

_AVERAGE: dict[int, Callable[..., Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _general(node: OperatorNode, w: Windows) -> dict[str, Any]:
    return {
        "kernel": w.kernel, "strides": w.strides, "dilations": w.dilations, "pads": w.pads,
        "auto_pad": w.auto_pad, "ceil_mode": bool(node.attributes.get("ceil_mode", 0)),
    }  # fmt: skip


def _torch_padding(w: Windows) -> tuple[int, ...] | None:
    """The padding torch's pooling takes: the same at both ends, at most half the kernel."""
    padding = w.symmetric
    if padding is None or any(2 * p > k for p, k in zip(padding, w.kernel, strict=True)):
        return None
    return tuple(padding)


def average_pool(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    w = windows(node)
    padding = _torch_padding(w)
    counted = bool(node.attributes.get("count_include_pad", 0))
    options = _general(node, w)
    if padding is not None and len(w.kernel) in _AVERAGE and set(w.dilations) == {1}:
        return graph.call(
            _AVERAGE[len(w.kernel)],
            tensor(node, 0),
            tuple(w.kernel),
            stride=tuple(w.strides),
            padding=padding,
            ceil_mode=options["ceil_mode"],
            count_include_pad=counted,
        )
    return graph.call(functions.average_pool, tensor(node, 0), **options, count_include_pad=counted)


def max_pool(node: OperatorNode, graph: GraphBuilder) -> Results:
    w = windows(node)
    padding = _torch_padding(w)
    options = _general(node, w)
    indexed = len(node.outputs_used) > 1 and node.outputs_used[1]
    if padding is not None and not indexed and len(w.kernel) in _MAX and node.dtype(0) in _FLOATS:
        return graph.call(
            _MAX[len(w.kernel)],
            tensor(node, 0),
            tuple(w.kernel),
            stride=tuple(w.strides),
            padding=padding,
            dilation=tuple(w.dilations),
            ceil_mode=options["ceil_mode"],
        )
    order = int(node.attributes.get("storage_order", 0))
    made = graph.call(functions.max_pool, tensor(node, 0), **options, storage_order=order)
    return unpack(graph, made, node) if indexed else graph.call(operator.getitem, made, 0)


def lp_pool(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    options = _general(node, windows(node))
    return graph.call(functions.lp_pool, tensor(node, 0), **options, p=node.attributes.get("p", 2))


def max_unpool(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    w = windows(node)
    return graph.call(
        functions.max_unpool,
        tensor(node, 0),
        tensor(node, 1),
        kernel=w.kernel,
        strides=w.strides,
        pads=w.pads,
        output_shape=graph.sizes(node, 2),
    )


def global_pool(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x, axes = tensor(node, 0), tuple(range(2, rank(node, 0)))
    if not axes:
        return graph.call(torch.abs, x) if node.op_type == "GlobalLpPool" else x
    if node.op_type == "GlobalAveragePool":
        return graph.call(torch.mean, x, dim=axes, keepdim=True)
    if node.op_type == "GlobalMaxPool":
        return graph.call(torch.amax, x, dim=axes, keepdim=True)
    order = node.attributes.get("p", 2)
    return graph.call(torch.linalg.vector_norm, x, ord=order, dim=axes, keepdim=True)


def local_response_norm(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.local_response_norm,
        tensor(node, 0),
        int(node.attributes["size"]),
        node.attributes.get("alpha", 1e-4),
        node.attributes.get("beta", 0.75),
        node.attributes.get("bias", 1.0),
    )

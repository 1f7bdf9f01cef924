"""Normalizations."""

from __future__ import annotations

import operator

import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode, Results
from effic.backends.torch.functions import normalization as functions


def batch(node: OperatorNode, graph: GraphBuilder) -> Results:
    x, scale, bias, mean, variance = node.inputs[:5]
    epsilon, momentum = node.attributes.get("epsilon", 1e-5), node.attributes.get("momentum", 0.9)
    if node.opset < 9 and not node.attributes.get("spatial", 1):
        node.refuse("has statistics per element (spatial=0)")
    training = bool(node.attributes.get("training_mode", 0)) or any(node.outputs_used[1:])
    if training:
        if node.opset < 14:
            node.refuse("is in training mode as opset 13 and older have it; convert the model to opset 14")
        made = graph.call(functions.batch_norm_training, x, scale, bias, mean, variance, epsilon, momentum)
        return tuple(graph.call(operator.getitem, made, i) for i in range(len(node.node.outputs)))
    # torch has no derivative for statistics, which some models compute (a norm without running ones).
    if not (node.is_fixed(3) and node.is_fixed(4)) or not node.dtype(0) == node.dtype(3) == node.dtype(1):
        return graph.call(functions.batch_norm, x, scale, bias, mean, variance, epsilon)
    return graph.call(F.batch_norm, x, mean, variance, scale, bias, training=False, eps=epsilon)


def layer(node: OperatorNode, graph: GraphBuilder) -> Results:
    x, scale, bias = node.inputs[0], node.inputs[1], node.input(2)
    axis, epsilon = int(node.attributes.get("axis", -1)), node.attributes.get("epsilon", 1e-5)
    stash = node.attributes.get("stash_type", 1) == 1
    args = (x, scale, bias, axis, epsilon, stash)
    if any(node.outputs_used[1:]):
        made = graph.call(functions.layer_norm, *args)
        return tuple(graph.call(operator.getitem, made, i) for i in range(len(node.node.outputs)))
    rank, shape = node.rank(0), node.shape(1)
    whole = rank is not None and shape is not None and None not in shape and len(shape) == rank - axis % rank
    covers = whole and shape == (node.shape(0) or ())[-len(shape or ()) :]
    # torch computes in float32 inside, which is what stash_type 1 asks for.
    if covers and node.dtype(0) == node.dtype(1):
        return graph.call(F.layer_norm, x, list(shape or ()), scale, bias, epsilon)
    return graph.call(functions.layer_norm_only, *args)


def rms(node: OperatorNode, graph: GraphBuilder) -> Results:
    """RMSNormalization, and ONNX Runtime's SimplifiedLayerNormalization."""
    if any(node.outputs_used[1:]):
        node.refuse("hands out its deviation")
    return graph.call(
        functions.rms_norm,
        node.inputs[0],
        node.inputs[1],
        int(node.attributes.get("axis", -1)),
        node.attributes.get("epsilon", 1e-5),
        node.attributes.get("stash_type", 1) == 1,
    )


def group(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.group_norm,
        *node.inputs[:1],
        int(node.attributes["num_groups"]),
        *node.inputs[1:3],
        node.attributes.get("epsilon", 1e-5),
        node.opset < 21,
        node.attributes.get("stash_type", 1) == 1,
    )


def instance(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.instance_norm, *node.inputs[:3], node.attributes.get("epsilon", 1e-5))


def mean_variance(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.mean_variance, node.inputs[0], list(node.attributes.get("axes", [0, 2, 3])))


def lp(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axis, p = int(node.attributes.get("axis", -1)), int(node.attributes.get("p", 2))
    return graph.call(functions.lp_norm, node.inputs[0], axis, p)


def skip(node: OperatorNode, graph: GraphBuilder) -> Results:
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    outputs = len(node.node.outputs)
    if any(node.outputs_used[1:3]):
        node.refuse("hands out its mean or deviation")
    x, other, scale = node.inputs[:3]
    beta = None if simplified else node.input(3)
    bias = node.input(3 if simplified else 4)
    epsilon = node.attributes.get("epsilon", 1e-12)
    made = graph.call(functions.skip_norm, x, other, scale, beta, bias, epsilon, simplified)
    first = graph.call(operator.getitem, made, 0)
    last = graph.call(operator.getitem, made, 1) if outputs > 3 else None
    return (first, None, None, last)[:outputs]

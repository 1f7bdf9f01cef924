"""Random numbers. See :mod:`effic.backends.torch.functions.random` about seeds."""

from __future__ import annotations

import torch
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import random as functions
from effic.backends.torch.operators.arguments import attribute_dtype, tensor


def uniform(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    low, high = node.attributes.get("low", 0.0), node.attributes.get("high", 1.0)
    dtype = attribute_dtype(node, "dtype")
    if node.op_type == "RandomUniformLike":
        return graph.call(functions.uniform_like, tensor(node, 0), low, high, dtype)
    shape = list(node.attributes["shape"])
    return graph.call(functions.uniform, shape, low, high, dtype or torch.float32, graph.device())


def normal(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    mean, scale = node.attributes.get("mean", 0.0), node.attributes.get("scale", 1.0)
    dtype = attribute_dtype(node, "dtype")
    if node.op_type == "RandomNormalLike":
        return graph.call(functions.normal_like, tensor(node, 0), mean, scale, dtype)
    shape = list(node.attributes["shape"])
    return graph.call(functions.normal, shape, mean, scale, dtype or torch.float32, graph.device())


def bernoulli(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.bernoulli, tensor(node, 0), attribute_dtype(node, "dtype"))


def multinomial(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    dtype = attribute_dtype(node, "dtype") or torch.int32
    return graph.call(functions.multinomial, tensor(node, 0), node.attributes.get("sample_size", 1), dtype)

"""Fourier transforms, windows, mel filters."""

from __future__ import annotations

import torch
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import audio as functions
from effic.backends.torch.operators.arguments import attribute_dtype, scalar, tensor


def dft(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    axis = scalar(node, graph, 2)
    if axis is None:
        # An attribute up to opset 19.
        axis = int(node.attributes.get("axis", 1 if node.opset < 20 else -2))
    return graph.call(
        functions.dft,
        tensor(node, 0),
        scalar(node, graph, 1),
        axis,
        bool(node.attributes.get("inverse", 0)),
        bool(node.attributes.get("onesided", 0)),
    )


def stft(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.stft,
        tensor(node, 0),
        scalar(node, graph, 1),
        node.input(2),
        scalar(node, graph, 3),
        bool(node.attributes.get("onesided", 1)),
    )


def window(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.window,
        node.op_type,
        scalar(node, graph, 0),
        bool(node.attributes.get("periodic", 1)),
        attribute_dtype(node, "output_datatype") or torch.float32,
        graph.device(),
    )


def mel_weights(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    dtype = attribute_dtype(node, "output_datatype") or torch.float32
    return graph.call(
        functions.mel_weights, *(scalar(node, graph, i) for i in range(5)), dtype, graph.device()
    )

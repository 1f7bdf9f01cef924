"""MatMul, Gemm, Einsum, Det."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import linear as functions


def matmul(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(torch.matmul, node.inputs[0], node.inputs[1])


def gemm(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    a, b, c = node.inputs[0], node.inputs[1], node.input(2)
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    trans_a, trans_b = bool(node.attributes.get("transA", 0)), bool(node.attributes.get("transB", 0))
    plain = alpha == 1.0 and (c is None or (beta == 1.0 and node.rank(2) == 1)) and not trans_a
    if plain and trans_b:
        return graph.call(F.linear, a, b, c)
    if plain and c is not None:
        return graph.call(torch.addmm, c, a, b)
    return graph.call(functions.gemm, a, b, c, alpha, beta, trans_a, trans_b)


def einsum(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(torch.einsum, node.attributes["equation"].replace(" ", ""), *node.inputs)


def det(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(torch.linalg.det, node.inputs[0])

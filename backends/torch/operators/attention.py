"""Attention and RotaryEmbedding."""

from __future__ import annotations

import operator

import onnx_ir as ir
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode, Results
from effic.backends.torch.functions import attention as functions
from effic.backends.torch.types import torch_dtype


def attention(node: OperatorNode, graph: GraphBuilder) -> Results:
    get = node.attributes.get
    precision = get("softmax_precision")
    wide = None if precision is None else torch_dtype(ir.DataType(precision))
    if (
        wide is not None
        and node.dtype(0) is not None
        and wide == torch_dtype(node.dtype(0) or ir.DataType.FLOAT)
    ):
        wide = None
    count = len(node.node.outputs)
    scores = int(get("qk_matmul_output_mode", 0)) if count > 3 and node.outputs_used[3] else None
    made = graph.call(
        functions.attention,
        *[node.input(i) for i in range(7)],
        bool(get("is_causal", 0)),
        get("q_num_heads"),
        get("kv_num_heads"),
        get("scale"),
        float(get("softcap", 0.0)),
        wide,
        (int(get("left_window_size", -1)), int(get("right_window_size", -1))),
        scores,
    )
    return tuple(graph.call(operator.getitem, made, i) for i in range(count))


def rotary(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    get = node.attributes.get
    return graph.call(
        functions.rotary,
        *[node.input(i) for i in range(4)],
        bool(get("interleaved", 0)),
        int(get("rotary_embedding_dim", 0)),
        int(get("num_heads", 0)),
    )

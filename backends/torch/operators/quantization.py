"""Quantization, dequantization and products of codes."""

from __future__ import annotations

import onnx_ir as ir
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import quantization as functions
from effic.backends.torch.operators.arguments import attribute_dtype, tensor, unpack
from effic.backends.torch.types import torch_dtype


def bounds(node: OperatorNode, dtype: ir.DataType | None) -> tuple[int, int]:
    """The smallest and the largest code of an integer type."""
    if dtype is None or not dtype.is_integer():
        node.refuse("makes codes of a type that is not known or no integer")
    bits = dtype.bitwidth
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype.is_signed() else (0, (1 << bits) - 1)


def _axis(node: OperatorNode) -> int:
    return int(node.attributes.get("axis", 1))


def quantize_linear(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    code = node.attributes.get("output_dtype", 0)
    dtype = ir.DataType(code) if code else (node.dtype(2) if node.input(2) is not None else ir.DataType.UINT8)
    block = int(node.attributes.get("block_size", 0))
    if dtype is None:
        node.refuse("makes codes of a type that is not known")
    target = torch_dtype(dtype)
    x, scale = tensor(node, 0), tensor(node, 1)
    if dtype.is_floating_point():
        # The zero point of an 8-bit float is zero.
        saturate = bool(node.attributes.get("saturate", 1))
        return graph.call(
            functions.quantize_float8,
            x,
            scale,
            axis=_axis(node),
            block=block,
            dtype=target,
            saturate=saturate,
        )
    low, high = bounds(node, dtype)
    return graph.call(
        functions.quantize,
        x,
        scale,
        node.input(2),
        axis=_axis(node),
        block=block,
        low=low,
        high=high,
        dtype=target,
    )


def dequantize_linear(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.dequantize,
        tensor(node, 0),
        tensor(node, 1),
        node.input(2),
        axis=_axis(node),
        block=int(node.attributes.get("block_size", 0)),
        dtype=attribute_dtype(node, "output_dtype"),
    )


def dynamic_quantize_linear(node: OperatorNode, graph: GraphBuilder) -> tuple[fx.Node | None, ...]:
    return unpack(graph, graph.call(functions.quantize_dynamically, tensor(node, 0)), node)


def matmul_integer(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(
        functions.matmul_integer, tensor(node, 0), tensor(node, 1), node.input(2), node.input(3)
    )


def qlinear_matmul(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    low, high = bounds(node, node.dtype(7))
    return graph.call(functions.qlinear_matmul, *(tensor(node, i) for i in range(8)), low, high)


def matmul_nbits(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    """com.microsoft::MatMulNBits. Every ``accuracy_level`` is computed in the type of the activations."""
    bits = int(node.attributes.get("bits", 4))
    if bits not in (2, 4, 8):
        node.refuse(f"has weights of {bits} bits; 2, 4 and 8 are known")
    if node.input(4) is not None:
        node.refuse("has a group index, which is not known here")
    weight = graph.call(
        functions.decode_blocks,
        tensor(node, 1),
        tensor(node, 2),
        node.input(3),
        rows=int(node.attributes["N"]),
        columns=int(node.attributes["K"]),
        bits=bits,
        block=int(node.attributes["block_size"]),
    )
    return graph.call(F.linear, tensor(node, 0), weight, node.input(5))


def gather_block_quantized(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    """com.microsoft::GatherBlockQuantized; codes in uint8 tensors are packed along the last axis."""
    bits = int(node.attributes.get("bits", 4))
    dtype = node.dtype(0)
    codes, zero_points = tensor(node, 0), node.input(3)
    default = 0
    if dtype == ir.DataType.UINT8:
        codes = graph.call(functions.unpack, codes, bits)
        default = 1 << (bits - 1)
        if zero_points is not None:
            zero_points = graph.call(functions.unpack, zero_points, bits)
    rank = node.rank(0)
    if rank is None:
        node.refuse("has codes whose rank is not known")
    return graph.call(
        functions.gather_decoded,
        codes,
        tensor(node, 1),
        tensor(node, 2),
        zero_points,
        gather_axis=int(node.attributes.get("gather_axis", 0)),
        quantize_axis=int(node.attributes.get("quantize_axis", rank - 1)),
        block=int(node.attributes.get("block_size", 128)),
        default_zero=default,
    )

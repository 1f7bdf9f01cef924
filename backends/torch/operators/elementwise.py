"""Arithmetic, comparisons, logic, activations, casts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import elementwise as functions
from effic.backends.torch.types import torch_dtype

_WIDENED = (ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64)
_FLOAT8 = (
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
)

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": functions.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": functions.divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": functions.prelu,
    "Pow": functions.power,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_VARIADIC: dict[str, Callable[..., Any]] = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}


def _apply(node: OperatorNode, graph: GraphBuilder, function: Callable[..., Any], *args: Any) -> fx.Node:
    """``function``, by way of int64 for the unsigned types torch does not compute in."""
    dtype = node.dtype(0)
    if dtype not in _WIDENED:
        return graph.call(function, *args)
    wide = [graph.method("to", arg, torch.int64) if isinstance(arg, fx.Node) else arg for arg in args]
    result = graph.call(function, *wide)
    if node.output_dtype() == ir.DataType.BOOL:
        return result
    return graph.method("to", result, torch_dtype(dtype))


def unary(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return _apply(node, graph, _UNARY[node.op_type], node.inputs[0])


def binary(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    function = _BINARY[node.op_type]
    if node.op_type in ("Equal", "Add") and node.dtype(0) == ir.DataType.STRING:
        node.refuse("has strings as inputs")
    a, b = node.inputs[0], node.inputs[1]
    if node.op_type == "Div" and (dtype := node.dtype(0)) is not None and dtype.is_floating_point():
        function = torch.div
    # Before opset 7 the second operand was placed at an axis of the first.
    if node.opset < 7 and node.attributes.get("broadcast") and "axis" in node.attributes:
        ranks = node.rank(0), node.rank(1)
        if ranks[0] is None or ranks[1] is None:
            node.refuse("places its second input at an axis, and the ranks are not known")
        after = ranks[0] - ranks[1] - int(node.attributes["axis"]) % max(ranks[0], 1)
        for _ in range(after):
            b = graph.call(torch.unsqueeze, b, -1)
    return _apply(node, graph, function, a, b)


def variadic(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    function, tensors = _VARIADIC[node.op_type], node.inputs
    result = tensors[0]
    assert result is not None
    for other in tensors[1:]:
        result = _apply(node, graph, function, result, other)
    return result


def mean(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(functions.mean, node.inputs)


def mod(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    function = torch.fmod if node.attributes.get("fmod", 0) else torch.remainder
    return _apply(node, graph, function, node.inputs[0], node.inputs[1])


def bit_shift(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    left = node.attributes["direction"] == "LEFT"
    return graph.call(functions.shift, node.inputs[0], node.inputs[1], left)


def where(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return graph.call(torch.where, *node.inputs)


def clip(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    if node.opset < 11:
        low = node.attributes.get("min", float(np.finfo(np.float32).min))
        high = node.attributes.get("max", float(np.finfo(np.float32).max))
        return graph.call(torch.clamp, node.inputs[0], low, high)
    bounds: list[Any] = []
    for index in (1, 2):
        known = node.constant(index)
        bounds.append(None if known is None else known.reshape(-1)[0].item())
        if node.input(index) is not None and known is None:
            return graph.call(functions.clip, node.inputs[0], node.input(1), node.input(2))
    if bounds == [None, None]:
        return graph.call(torch.clone, node.inputs[0])
    return _apply(node, graph, torch.clamp, node.inputs[0], *bounds)


def activation(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    """Activations with numbers of their own."""
    x, get = node.inputs[0], node.attributes.get
    match node.op_type:
        case "LeakyRelu":
            return graph.call(F.leaky_relu, x, get("alpha", 0.01))
        case "Elu":
            return graph.call(F.elu, x, get("alpha", 1.0))
        case "Celu":
            return graph.call(F.celu, x, get("alpha", 1.0))
        case "Selu":
            return graph.call(
                functions.selu,
                x,
                get("alpha", 1.67326319217681884765625),
                get("gamma", 1.05070102214813232421875),
            )
        case "HardSigmoid":
            return graph.call(functions.hard_sigmoid, x, get("alpha", 0.2), get("beta", 0.5))
        case "ThresholdedRelu":
            return graph.call(functions.thresholded, x, get("alpha", 1.0))
        case "Shrink":
            return graph.call(functions.shrink, x, get("bias", 0.0), get("lambd", 0.5))
        case "Swish":
            return graph.call(functions.swish, x, get("alpha", 1.0))
        case "Gelu":
            return graph.call(F.gelu, x, approximate=get("approximate", "none"))
    raise AssertionError(node.op_type)


def is_inf(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    negative = bool(node.attributes.get("detect_negative", 1))
    positive = bool(node.attributes.get("detect_positive", 1))
    return graph.call(functions.is_inf, node.inputs[0], negative, positive)


def cast(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    return _cast(node, graph, ir.DataType(node.attributes["to"]))


def cast_like(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    target = node.dtype(1)
    if target is None:
        return graph.call(functions.cast_like, node.inputs[0], node.inputs[1])
    return _cast(node, graph, target)


def _cast(node: OperatorNode, graph: GraphBuilder, target: ir.DataType) -> fx.Node:
    if ir.DataType.STRING in (target, node.dtype(0)):
        node.refuse("casts strings")
    dtype = torch_dtype(target)
    if target in _FLOAT8:
        saturate = bool(node.attributes.get("saturate", 1))
        return graph.call(functions.cast_float8, node.inputs[0], dtype, saturate)
    bits = target.bitwidth if target.is_integer() and target.bitwidth < 8 else 0
    source = node.dtype(0)
    if not bits and source is not None and (target.is_floating_point() or source == ir.DataType.BOOL):
        return graph.method("to", node.inputs[0], dtype)  # type: ignore[arg-type]
    return graph.call(functions.cast, node.inputs[0], dtype, bits)


def identity(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    assert node.inputs[0] is not None
    return node.inputs[0]


def dropout(node: OperatorNode, graph: GraphBuilder) -> tuple[fx.Node | None, ...]:
    """Passes everything on; drops only where the node itself says that it trains."""
    x = node.inputs[0]
    if node.opset >= 12 and node.input(2) is not None:
        flag, ratio = node.constant(2), node.constant(1)
        if flag is None or bool(flag.reshape(-1)[0]):
            rate = (
                0.5
                if node.input(1) is None
                else node.inputs[1]
                if ratio is None
                else ratio.reshape(-1)[0].item()
            )
            training = node.inputs[2] if flag is None else True
            made = graph.call(functions.dropout, x, rate, training)
            return tuple(graph.call(operator.getitem, made, i) for i in range(len(node.node.outputs)))
    mask_used = len(node.outputs_used) > 1 and node.outputs_used[1]
    mask = graph.call(torch.ones_like, x, dtype=torch.bool) if mask_used else None
    return x, mask


def fast_gelu(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    """``com.microsoft`` FastGelu, Gelu, BiasGelu and QuickGelu."""
    x = node.inputs[0]
    if node.op_type == "QuickGelu":
        return graph.call(functions.swish, x, node.attributes.get("alpha", 1.702))
    if node.input(1) is not None:
        x = graph.call(torch.add, x, node.inputs[1])
    return graph.call(F.gelu, x, approximate="tanh" if node.op_type == "FastGelu" else "none")


def constant(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    """A Constant of strings or of a sparse tensor (all others are read where they are used)."""
    sparse = node.node.attributes.get("sparse_value")
    if sparse is None:
        node.refuse("holds strings, which torch cannot")
    node.refuse("holds a sparse tensor; write it as a dense one")

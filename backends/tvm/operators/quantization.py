"""Quantized activations, exactly as ONNX defines them: integers are multiplied as int32.

Weights in codes that a product reads are no business of these; see
:mod:`effic.backends.tvm.operators.encoded`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of, relax_dtype, shape_of
from effic.backends.tvm.operators.importer import by_importer


def dequantize_linear(lowering: Lowering, node: ir.Node) -> None:
    """DequantizeLinear of activations: ``(x - zero_point) * scale``, per tensor, channel or block."""
    x, scale = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    zero = lowering.optional(node, 2)
    scale, zero = (_spread(lowering, node, x, one) for one in (scale, zero))
    kind = "float64" if dtype_of(x) == "int32" else "float32"
    number = lowering.emit(relax.op.astype(x, kind))
    if zero is not None:
        number = lowering.emit(relax.op.subtract(number, relax.op.astype(zero, kind)))
    y = lowering.emit(relax.op.multiply(number, relax.op.astype(scale, kind)))
    wanted = node.outputs[0].dtype
    lowering.set(
        node.outputs[0], relax.op.astype(y, relax_dtype(wanted) if wanted is not None else dtype_of(scale))
    )


def quantize_linear(lowering: Lowering, node: ir.Node) -> None:
    """QuantizeLinear: ``saturate(round(x / scale) + zero_point)``, ties to even."""
    x, scale = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    zero = lowering.optional(node, 2)
    named = node.attributes.get_int("output_dtype", 0)
    dtype = dtype_of(zero) if zero is not None else relax_dtype(ir.DataType(named)) if named else "uint8"
    scale, zero = (_spread(lowering, node, x, one) for one in (scale, zero))
    if node.attributes.get_int("precision", 0):
        by_importer(lowering, node)
        return
    quotient = lowering.emit(relax.op.divide(x, relax.op.astype(scale, dtype_of(x))))
    lowering.set(node.outputs[0], _saturated(lowering, quotient, zero, dtype))


def q_linear_matmul(lowering: Lowering, node: ir.Node) -> None:
    """QLinearMatMul: a product of integers, scaled and rounded once."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (lowering.tensor(v) for v in node.inputs)
    left = _integers(lowering, a, _along(lowering, a_zero, a, len(shape_of(a)) - 2))
    right = _integers(lowering, b, _along(lowering, b_zero, b, len(shape_of(b)) - 1))
    product = lowering.emit(relax.op.matmul(left, right))
    rank = len(shape_of(product))
    factor = lowering.emit(
        relax.op.multiply(
            relax.op.astype(_along(lowering, a_scale, product, rank - 2), "float32"),
            relax.op.astype(_along(lowering, b_scale, product, rank - 1), "float32"),
        )
    )
    factor = lowering.emit(relax.op.divide(factor, relax.op.astype(y_scale, "float32")))
    scaled = lowering.emit(relax.op.multiply(relax.op.astype(product, "float32"), factor))
    lowering.set(node.outputs[0], _saturated(lowering, scaled, y_zero, dtype_of(y_zero)))


def matmul_integer(lowering: Lowering, node: ir.Node) -> None:
    """MatMulInteger: ``(a - a_zero) @ (b - b_zero)`` in int32."""
    a, b = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    a_zero, b_zero = lowering.optional(node, 2), lowering.optional(node, 3)
    left = _integers(lowering, a, _along(lowering, a_zero, a, len(shape_of(a)) - 2))
    right = _integers(lowering, b, _along(lowering, b_zero, b, len(shape_of(b)) - 1))
    lowering.set(node.outputs[0], relax.op.matmul(left, right))


def conv_integer(lowering: Lowering, node: ir.Node) -> None:
    """ConvInteger: a convolution of int32; padding is with the zero point, so with zeros here."""
    x, w = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    zeros = lowering.optional(node, 2), lowering.optional(node, 3)
    lowering.set(node.outputs[0], _convolution(lowering, node, x, w, zeros))


def q_linear_conv(lowering: Lowering, node: ir.Node) -> None:
    """QLinearConv: a convolution of integers with an int32 bias, scaled and rounded once."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (lowering.tensor(v) for v in node.inputs[:8])
    bias = lowering.optional(node, 8)
    product = _convolution(lowering, node, x, w, (x_zero, w_zero))
    if bias is not None:
        product = lowering.emit(relax.op.add(product, _along(lowering, bias, product, 1)))
    scale = _along(lowering, w_scale, product, 1)
    factor = lowering.emit(relax.op.divide(relax.op.multiply(x_scale, scale), y_scale))
    scaled = lowering.emit(relax.op.multiply(relax.op.astype(product, "float32"), factor))
    lowering.set(node.outputs[0], _saturated(lowering, scaled, y_zero, dtype_of(y_zero)))


def _convolution(
    lowering: Lowering, node: ir.Node, x: Any, w: Any, zeros: tuple[Any | None, Any | None]
) -> Any:
    rank = len(shape_of(w)) - 2
    if rank != 2:
        lowering.refuse(node, f"convolves {rank} axes of integers; two are lowered")
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        lowering.refuse(node, "leaves its padding to auto_pad")

    def numbers(name: str, default: list[int]) -> list[int]:
        found = node.attributes.get(name)
        return default if found is None else [int(n) for n in found.as_ints()]

    left = _integers(lowering, x, zeros[0])
    right = _integers(lowering, w, _along(lowering, zeros[1], w, 0))
    top, first, bottom, last = numbers("pads", [0] * 4)
    return lowering.emit(
        relax.op.nn.conv2d(
            left,
            right,
            strides=numbers("strides", [1, 1]),
            padding=[top, first, bottom, last],
            dilation=numbers("dilations", [1, 1]),
            groups=node.attributes.get_int("group", 1),
            out_dtype="int32",
        )
    )


def _integers(lowering: Lowering, x: Any, zero: Any | None) -> Any:
    wide = lowering.emit(relax.op.astype(x, "int32"))
    if zero is None:
        return wide
    return lowering.emit(relax.op.subtract(wide, relax.op.astype(zero, "int32")))


def _saturated(lowering: Lowering, x: Any, zero: Any | None, dtype: str) -> Any:
    """``x`` rounded to even, moved by the zero point, and kept in the range of an integer type."""
    limits = np.iinfo(dtype)
    y = lowering.emit(relax.op.astype(relax.op.round(x), "float32"))
    if zero is not None:
        y = lowering.emit(relax.op.add(y, relax.op.astype(zero, "float32")))
    return lowering.emit(relax.op.astype(relax.op.clip(y, float(limits.min), float(limits.max)), dtype))


def _along(lowering: Lowering, values: Any | None, like: Any, axis: int) -> Any | None:
    """A vector laid along an axis of another tensor; numbers of no axes, and full tensors, stay."""
    if values is None:
        return None
    shape, rank = shape_of(values), len(shape_of(like))
    if len(shape) != 1 or rank <= 1:
        return values
    if shape[0] == 1:
        return lowering.emit(relax.op.reshape(values, ()))
    return lowering.emit(relax.op.reshape(values, tuple(shape[0] if i == axis else 1 for i in range(rank))))


def _spread(lowering: Lowering, node: ir.Node, x: Any, values: Any | None) -> Any | None:
    """Scales or zero points so that they go with every element of x."""
    if values is None or not shape_of(values):
        return values
    shape = shape_of(x)
    axis = node.attributes.get_int("axis", 1)
    axis += len(shape) if axis < 0 else 0
    block = node.attributes.get_int("block_size", 0)
    if not block:
        return _along(lowering, values, x, axis)
    repeated = lowering.emit(relax.op.repeat(values, block, axis))
    if shape_of(repeated)[axis] == shape[axis]:
        return repeated
    return lowering.emit(relax.op.strided_slice(repeated, [axis], [0], [shape[axis]]))

"""Normalization: forms that TVM's own operators do not take as they are."""

from __future__ import annotations

import math

import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, shape_of


def rms_normalization(lowering: Lowering, node: ir.Node) -> None:
    """RMSNormalization over the last axes, as a matrix: one row per vector that is normalized."""
    x, scale = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    shape = shape_of(x)
    axis = node.attributes.get_int("axis", -1)
    axis += len(shape) if axis < 0 else 0
    if not all(isinstance(d, int) for d in shape[axis:]):
        lowering.refuse(node, "normalizes over an axis whose size is left open; pin it with shapes")
    if shape_of(scale) != shape[axis:]:
        scale = lowering.emit(relax.op.broadcast_to(scale, shape[axis:]))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    length = math.prod(shape[axis:])
    if axis == len(shape) - 1 and axis > 0:
        lowering.set(node.outputs[0], relax.op.nn.rms_norm(x, scale, axes=[-1], epsilon=epsilon))
        return
    rows = math.prod(shape[:axis]) if all(isinstance(d, int) for d in shape) else -1
    flat = lowering.emit(relax.op.reshape(x, (rows, length)))
    weight = lowering.emit(relax.op.reshape(scale, (length,)))
    y = lowering.emit(relax.op.nn.rms_norm(flat, weight, axes=[-1], epsilon=epsilon))
    lowering.set(node.outputs[0], relax.op.reshape(y, shape))

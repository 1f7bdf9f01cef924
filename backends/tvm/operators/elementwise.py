"""Element by element: what TVM's importer has wrong, or for floats only."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of
from effic.backends.tvm.operators.importer import by_importer


def is_inf(lowering: Lowering, node: ir.Node) -> None:
    """IsInf, with its attributes for one sign alone."""
    x = lowering.tensor(node.inputs[0])
    dtype = dtype_of(x)
    found: Any = None
    for name, bound in (("detect_positive", np.inf), ("detect_negative", -np.inf)):
        if node.attributes.get_int(name, 1):
            one = lowering.emit(relax.op.equal(x, relax.const(bound, dtype)))
            found = one if found is None else lowering.emit(relax.op.logical_or(found, one))
    if found is None:
        found = lowering.emit(relax.op.not_equal(x, x))
        found = lowering.emit(relax.op.logical_and(found, relax.op.logical_not(found)))
    lowering.set(node.outputs[0], found)


def mod(lowering: Lowering, node: ir.Node) -> None:
    """Mod; ``fmod`` has the sign of the dividend, and is the dividend where the divisor is infinite."""
    x, y = (lowering.tensor(value) for value in node.inputs)
    dtype = dtype_of(x)
    if not dtype.startswith("float") or not node.attributes.get_int("fmod", 0):
        by_importer(lowering, node)
        return
    emit = lowering.emit
    quotient = emit(relax.op.trunc(relax.op.divide(x, y)))
    rest = emit(relax.op.subtract(x, relax.op.multiply(quotient, y)))
    infinite = emit(relax.op.equal(relax.op.abs(y), relax.const(np.inf, dtype)))
    finite = emit(relax.op.less(relax.op.abs(x), relax.const(np.inf, dtype)))
    lowering.set(node.outputs[0], relax.op.where(emit(relax.op.logical_and(infinite, finite)), x, rest))


def pow_(lowering: Lowering, node: ir.Node) -> None:
    """Pow; integers are raised as doubles."""
    x, y = (lowering.tensor(value) for value in node.inputs)
    dtype, other = dtype_of(x), dtype_of(y)
    emit, wide = lowering.emit, "float64"
    if dtype.startswith("float"):
        known = lowering.array(node.inputs[1])
        if known is not None and known.size == 1 and float(known.reshape(-1)[0]) == 2 and known.ndim == 0:
            # The commonest power by far, and a multiplication instead of a call.
            lowering.set(node.outputs[0], relax.op.multiply(x, x))
            return
        y = y if other == dtype else emit(relax.op.astype(y, dtype))
        lowering.set(node.outputs[0], relax.op.power(x, y))
        return
    powers = emit(relax.op.power(relax.op.astype(x, wide), relax.op.astype(y, wide)))
    lowering.set(node.outputs[0], relax.op.astype(emit(relax.op.trunc(powers)), dtype))


def bit_shift(lowering: Lowering, node: ir.Node) -> None:
    """BitShift of unsigned numbers by less than their width."""
    by = lowering.array(node.inputs[1])
    x = lowering.tensor(node.inputs[0])
    bits = np.dtype(dtype_of(x)).itemsize * 8
    if not dtype_of(x).startswith("u"):
        lowering.refuse(node, "shifts signed numbers")
    if by is None or by.size == 0 or int(by.max()) >= bits:
        lowering.refuse(node, f"shifts by a number that is computed, or not below {bits}")
    direction = node.attributes.get_string("direction", "LEFT")
    shift = relax.op.left_shift if direction == "LEFT" else relax.op.right_shift
    lowering.set(node.outputs[0], shift(x, lowering.tensor(node.inputs[1])))


def cast_like(lowering: Lowering, node: ir.Node) -> None:
    """CastLike: a Cast to the type of the second input."""
    x, like = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    lowering.set(node.outputs[0], x if dtype_of(x) == dtype_of(like) else relax.op.astype(x, dtype_of(like)))


def dropout(lowering: Lowering, node: ir.Node) -> None:
    """Dropout when a model is run: what goes in comes out, and the mask is all true."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    on = lowering.array(training) if training is not None else np.array(False)
    if on is None or bool(on.reshape(-1)[0]):
        lowering.refuse(node, "drops at random, as in training")
    x = lowering.tensor(node.inputs[0])
    if node.outputs[0].uses() or node.outputs[0].is_graph_output():
        lowering.set(node.outputs[0], x)
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        lowering.set(node.outputs[1], relax.op.ones_like(x, "bool"))

"""Element by element: what TVM's importer has wrong, or for floats only."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of
from effic.backends.tvm.operators.importer import by_importer


def equal(lowering: Lowering, node: ir.Node) -> None:
    """Equal; truth values are compared as bytes, as LLVM is given a comparison of floats for them."""
    if dtype_of(lowering.tensor(node.inputs[0])) != "bool":
        by_importer(lowering, node)
        return
    x, y = (lowering.emit(relax.op.astype(lowering.tensor(value), "int8")) for value in node.inputs)
    lowering.set(node.outputs[0], relax.op.equal(x, y))


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


def sign(lowering: Lowering, node: ir.Node) -> None:
    """Sign; that of NaN is NaN."""
    x = lowering.tensor(node.inputs[0])
    found = lowering.emit(relax.op.sign(x))
    if dtype_of(x).startswith("float"):
        found = relax.op.where(lowering.emit(relax.op.isnan(x)), x, found)
    lowering.set(node.outputs[0], found)


def thresholded_relu(lowering: Lowering, node: ir.Node) -> None:
    """ThresholdedRelu: zero for whatever is not above the threshold, NaN and infinities too."""
    x = lowering.tensor(node.inputs[0])
    dtype = dtype_of(x)
    above = lowering.emit(relax.op.greater(x, relax.const(node.attributes.get_float("alpha", 1.0), dtype)))
    lowering.set(node.outputs[0], relax.op.where(above, x, relax.const(0, dtype)))


def cosh(lowering: Lowering, node: ir.Node) -> None:
    """Cosh, for which LLVM has no instruction: ``e + 1 / 4e`` with ``e = exp(|x|) / 2``."""
    half, quarter = _half_exp(lowering, lowering.tensor(node.inputs[0]))
    lowering.set(node.outputs[0], relax.op.add(half, quarter))


def sinh(lowering: Lowering, node: ir.Node) -> None:
    """Sinh: as :func:`cosh`; near zero by ``2t / (1 - t * t)`` with ``t = tanh(x / 2)``, which cancels nothing."""
    x = lowering.tensor(node.inputs[0])
    dtype, emit = dtype_of(x), lowering.emit
    half, quarter = _half_exp(lowering, x)
    size = emit(relax.op.subtract(half, quarter))
    far = emit(relax.op.where(relax.op.less(x, relax.const(0, dtype)), relax.op.negative(size), size))
    t = emit(relax.op.tanh(emit(relax.op.multiply(x, relax.const(0.5, dtype)))))
    rest = emit(relax.op.subtract(relax.const(1, dtype), relax.op.multiply(t, t)))
    near = emit(relax.op.divide(relax.op.add(t, t), rest))
    small = emit(relax.op.less(relax.op.abs(x), relax.const(1, dtype)))
    lowering.set(node.outputs[0], relax.op.where(small, near, far))


def _half_exp(lowering: Lowering, x: Any) -> tuple[Any, Any]:
    """``e = exp(|x|) / 2`` without overflow before the result's, and ``1 / 4e``."""
    dtype, emit = dtype_of(x), lowering.emit
    half = emit(relax.op.exp(emit(relax.op.subtract(relax.op.abs(x), relax.const(np.log(2.0), dtype)))))
    return half, emit(relax.op.divide(relax.const(0.25, dtype), half))


def mod(lowering: Lowering, node: ir.Node) -> None:
    """Mod; ``fmod`` has the sign of the dividend, and is the dividend where the divisor is infinite."""
    x, y = (lowering.tensor(value) for value in node.inputs)
    dtype = dtype_of(x)
    if not dtype.startswith("float"):
        by_importer(lowering, node)
        return
    emit = lowering.emit
    quotient = emit(relax.op.trunc(relax.op.divide(x, y)))
    rest = emit(relax.op.subtract(x, relax.op.multiply(quotient, y)))
    infinite = emit(relax.op.equal(relax.op.abs(y), relax.const(np.inf, dtype)))
    finite = emit(relax.op.less(relax.op.abs(x), relax.const(np.inf, dtype)))
    rest = emit(relax.op.where(emit(relax.op.logical_and(infinite, finite)), x, rest))
    if not node.attributes.get_int("fmod", 0):
        # The sign of the divisor.
        zero = relax.const(0, dtype)
        other = emit(relax.op.less(emit(relax.op.multiply(relax.op.sign(rest), relax.op.sign(y))), zero))
        rest = emit(relax.op.where(other, emit(relax.op.add(rest, y)), rest))
    lowering.set(node.outputs[0], rest)


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

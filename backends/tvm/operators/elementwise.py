"""Element by element: what TVM's importer has wrong, or for floats only."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, topi
from tvm.tirx import op

from effic.backends.tvm.lowering import Lowering, dtype_of, relax_dtype, why_no_type
from effic.backends.tvm.operators.importer import by_importer
from effic.backends.tvm.private_api import convert_by_importer


def equal(lowering: Lowering, node: ir.Node) -> None:
    """Equal; truth values are compared as bytes, as LLVM is given a comparison of floats for them."""
    if dtype_of(lowering.tensor(node.inputs[0])) != "bool":
        by_importer(lowering, node)
        return
    x, y = (lowering.emit(relax.op.astype(lowering.tensor(value), "int8")) for value in node.inputs)
    lowering.set(node.outputs[0], relax.op.equal(x, y))


def not_(lowering: Lowering, node: ir.Node) -> None:
    """Not; TVM makes ``a > b`` of ``not a <= b``, and NaN is neither."""
    x = lowering.tensor(node.inputs[0])
    lowering.set(node.outputs[0], relax.op.logical_xor(x, relax.const(np.array(True))))


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
    if dtype_of(x).startswith("uint"):
        # TVM's own compares with -1.
        lowering.set(node.outputs[0], relax.op.minimum(x, relax.const(1, dtype_of(x))))
        return
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
    dtype, emit = dtype_of(x), lowering.emit
    if not dtype.startswith("float"):
        by_importer(lowering, node)
        return
    # C's fmod, which is exact: a quotient that is rounded to a whole number leaves a rest with the wrong sign.
    rest = emit(lowering.bb.call_te(_remainder, x, y, primfunc_name_hint="fmod"))
    infinite = emit(relax.op.equal(relax.op.abs(y), relax.const(np.inf, dtype)))
    finite = emit(relax.op.less(relax.op.abs(x), relax.const(np.inf, dtype)))
    rest = emit(relax.op.where(emit(relax.op.logical_and(infinite, finite)), x, rest))
    if not node.attributes.get_int("fmod", 0):
        # The sign of the divisor.
        zero = relax.const(0, dtype)
        other = emit(relax.op.less(emit(relax.op.multiply(relax.op.sign(rest), relax.op.sign(y))), zero))
        rest = emit(relax.op.where(other, emit(relax.op.add(rest, y)), rest))
    lowering.set(node.outputs[0], rest)


def _remainder(x: Any, y: Any) -> Any:
    return topi.mod(x, y)


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
    """BitShift; by the width and more, every bit is shifted out."""
    x, by = (lowering.tensor(value) for value in node.inputs)
    dtype, emit = dtype_of(x), lowering.emit
    bits = np.dtype(dtype).itemsize * 8
    left = node.attributes.get_string("direction", "LEFT") == "LEFT"
    # Processors shift by the remainder.
    within = emit(relax.op.minimum(by, relax.const(bits - 1, dtype)))
    found = emit((relax.op.left_shift if left else relax.op.right_shift)(x, within))
    if left or dtype.startswith("u"):
        inside = emit(relax.op.less(by, relax.const(bits, dtype)))
        found = relax.op.where(inside, found, relax.const(0, dtype))
    lowering.set(node.outputs[0], found)


def bit_cast(lowering: Lowering, node: ir.Node) -> None:
    """BitCast: the same bits as another type of the same width."""
    to = ir.DataType(node.attributes.get_int("to", 0))
    if reason := why_no_type(to):
        lowering.refuse(node, f"makes a tensor that {reason}")
    x, dtype = lowering.tensor(node.inputs[0]), relax_dtype(to)
    if "bool" in (dtype, dtype_of(x)) and dtype != dtype_of(x):
        lowering.refuse(node, "takes truth values for numbers")

    def same_bits(x: Any) -> Any:
        return te.compute(x.shape, lambda *at: op.reinterpret(dtype, x(*at)))

    lowering.set(node.outputs[0], lowering.bb.call_te(same_bits, x, primfunc_name_hint="bit_cast"))


def several(lowering: Lowering, node: ir.Node) -> None:
    """Max, Min, Sum, Mean: two by two. TVM's importer puts all numbers in one tensor first."""
    values = [lowering.tensor(value) for value in node.inputs]
    join = {"Max": relax.op.maximum, "Min": relax.op.minimum}.get(node.op_type, relax.op.add)
    found = values[0]
    for value in values[1:]:
        found = lowering.emit(join(found, value))
    if node.op_type == "Mean":
        found = relax.op.divide(found, relax.const(len(values), dtype_of(found)))
    lowering.set(node.outputs[0], found)


def in_fp32(lowering: Lowering, node: ir.Node) -> None:
    """Functions of one number that TVM has in no half precision, or loses digits of: computed in fp32."""
    x = lowering.tensor(node.inputs[0])
    if dtype_of(x) != "float16":
        by_importer(lowering, node)
        return
    wide = lowering.emit(relax.op.astype(x, "float32"))
    (found,) = convert_by_importer(lowering.bb, node, [wide], node.version or lowering.opset)
    lowering.set(node.outputs[0], relax.op.astype(lowering.emit(found), "float16"))


def elu(lowering: Lowering, node: ir.Node) -> None:
    """Elu and Selu of any type of float: ``gamma * (x > 0 ? x : alpha * (exp(x) - 1))``.

    Celu, with ``exp(x / alpha)``, is among them because its definition makes a vector of a single number.
    """
    x = lowering.tensor(node.inputs[0])
    dtype, emit, own = dtype_of(x), lowering.emit, node.op_type == "Selu"
    alpha = node.attributes.get_float("alpha", 1.67326319217681884765625 if own else 1.0)
    gamma = node.attributes.get_float("gamma", 1.05070102214813232421875 if own else 1.0)
    power = relax.op.divide(x, relax.const(alpha, dtype)) if node.op_type == "Celu" else x
    below = emit(relax.op.subtract(relax.op.exp(power), relax.const(1, dtype)))
    below = emit(relax.op.multiply(below, relax.const(alpha, dtype)))
    found = emit(relax.op.where(relax.op.greater(x, relax.const(0, dtype)), x, below))
    lowering.set(
        node.outputs[0], found if gamma == 1 else relax.op.multiply(found, relax.const(gamma, dtype))
    )


def cast_like(lowering: Lowering, node: ir.Node) -> None:
    """CastLike: a Cast to the type of the second input, of which nothing else is read."""
    x, like = lowering.tensor(node.inputs[0]), node.inputs[1]
    kind = None if like is None else like.dtype
    if kind is None or why_no_type(kind):
        lowering.refuse(node, f"casts to {'an unknown type' if kind is None else kind.name}")
    dtype = relax_dtype(kind)
    lowering.set(node.outputs[0], x if dtype_of(x) == dtype else relax.op.astype(x, dtype))


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

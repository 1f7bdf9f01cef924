"""What goes along one axis: running products, lengths, sequences turned round, caches written to."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of


def cum_prod(lowering: Lowering, node: ir.Node) -> None:
    """CumProd along a constant axis, also backwards and without the number itself."""
    x, given = lowering.tensor(node.inputs[0]), lowering.array(node.inputs[1])
    if given is None:
        lowering.refuse(node, "takes its axis from the inputs' values")
    axis, back = int(given.reshape(-1)[0]), bool(node.attributes.get_int("reverse", 0))
    axis += len(shape_of(x)) if axis < 0 else 0
    if back:
        x = lowering.emit(relax.op.flip(x, axis))
    exclusive = bool(node.attributes.get_int("exclusive", 0))
    y = lowering.emit(relax.op.cumprod(x, axis, exclusive=exclusive))
    lowering.set(node.outputs[0], relax.op.flip(y, axis) if back else y)


def lp_normalization(lowering: Lowering, node: ir.Node) -> None:
    """LpNormalization: by the sum of what is positive, or by the length; of zeros, zeros."""
    x = lowering.tensor(node.inputs[0])
    axis, emit = node.attributes.get_int("axis", -1), lowering.emit
    if node.attributes.get_int("p", 2) == 1:
        norm = emit(relax.op.sum(emit(relax.op.abs(x)), axis, True))
    else:
        norm = emit(relax.op.sqrt(emit(relax.op.sum(emit(relax.op.multiply(x, x)), axis, True))))
    zero = relax.const(0, dtype_of(x))
    found = emit(relax.op.divide(x, norm))
    lowering.set(node.outputs[0], relax.op.where(emit(relax.op.equal(norm, zero)), zero, found))


def reverse_sequence(lowering: Lowering, node: ir.Node) -> None:
    """ReverseSequence: the first entries of each sequence backwards, the others where they are."""
    x, lengths = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    time, batch = node.attributes.get_int("time_axis", 0), node.attributes.get_int("batch_axis", 1)
    emit = lowering.emit
    at = _places(lowering, node, x, time)
    lengths = emit(relax.op.astype(lengths, "int64"))
    lengths = emit(relax.op.reshape(lengths, [-1 if i == batch else 1 for i in range(len(shape_of(x)))]))
    turned = emit(relax.op.subtract(emit(relax.op.subtract(lengths, at)), relax.const(1, "int64")))
    taken = emit(relax.op.where(emit(relax.op.less(at, lengths)), turned, at))
    lowering.set(node.outputs[0], _picked(lowering, x, taken, shape_of(x), time))


def tensor_scatter(lowering: Lowering, node: ir.Node) -> None:
    """TensorScatter: entries of a cache replaced from a place on that is each sequence's own."""
    cache, update = lowering.tensor(node.inputs[0]), lowering.tensor(node.inputs[1])
    start, emit = lowering.optional(node, 2), lowering.emit
    shape = shape_of(cache)
    axis = node.attributes.get_int("axis", -2)
    axis += len(shape) if axis < 0 else 0
    size, count = shape[axis], shape_of(update)[axis]
    at = _places(lowering, node, cache, axis)
    if start is not None:
        start = emit(relax.op.reshape(start, [-1, *[1] * (len(shape) - 1)]))
        at = emit(relax.op.subtract(at, emit(relax.op.astype(start, "int64"))))
    zero = relax.const(0, "int64")
    if node.attributes.get_string("mode", "linear") == "circular":
        # A start is in the cache, so one turn is enough.
        below = emit(relax.op.less(at, zero))
        at = emit(relax.op.where(below, emit(relax.op.add(at, relax.const(size, "int64"))), at))
    inside = emit(relax.op.less(at, relax.const(count, "int64")))
    inside = emit(relax.op.logical_and(inside, emit(relax.op.greater_equal(at, zero))))
    taken = emit(relax.op.minimum(emit(relax.op.maximum(at, zero)), relax.const(count - 1, "int64")))
    lowering.set(
        node.outputs[0], relax.op.where(inside, _picked(lowering, update, taken, shape, axis), cache)
    )


def _places(lowering: Lowering, node: ir.Node, x: Any, axis: int) -> Any:
    """0, 1, 2 … along an axis, the others of size one: int64."""
    shape = shape_of(x)
    if not all(isinstance(size, int) for size in shape):
        lowering.refuse(node, "works on a tensor of a size that is left open; pin it with shapes")
    count = np.arange(shape[axis], dtype=np.int64)
    # The type is told: TVM makes int32 of int64.
    return relax.const(count.reshape([-1 if i == axis else 1 for i in range(len(shape))]), "int64")


def _picked(lowering: Lowering, x: Any, at: Any, shape: tuple[Any, ...], axis: int) -> Any:
    full = lowering.emit(relax.op.broadcast_to(at, shape))
    return lowering.emit(relax.op.gather_elements(x, full, axis))

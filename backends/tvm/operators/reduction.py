"""Reductions that TVM's importer has wrong, or lets through and TVM cannot compile."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of
from effic.backends.tvm.operators.importer import by_importer


def extreme(lowering: Lowering, node: ir.Node) -> None:
    """ReduceMax and ReduceMin; truth values are reduced as bytes."""
    x = lowering.tensor(node.inputs[0])
    if dtype_of(x) != "bool":
        by_importer(lowering, node)
        return
    axes = _axes(lowering, node)
    if axes == [] and node.attributes.get_int("noop_with_empty_axes", False):
        lowering.set(node.outputs[0], x)
        return
    reduce = relax.op.max if node.op_type == "ReduceMax" else relax.op.min
    keep = bool(node.attributes.get_int("keepdims", 1))
    number = lowering.emit(relax.op.astype(x, "int8"))
    found = lowering.emit(reduce(number, axis=axes or list(range(len(shape_of(x)))), keepdims=keep))
    lowering.set(node.outputs[0], relax.op.astype(found, "bool"))


def of_no_axes(lowering: Lowering, node: ir.Node) -> None:
    """ReduceL1, ReduceL2, ReduceSumSquare, ReduceLogSum: without axes each number is still made positive,
    squared, or its logarithm taken."""
    if _axes(lowering, node) or not node.attributes.get_int("noop_with_empty_axes", False):
        by_importer(lowering, node)
        return
    x = lowering.tensor(node.inputs[0])
    if node.op_type == "ReduceSumSquare":
        lowering.set(node.outputs[0], relax.op.multiply(x, x))
    else:
        alone = relax.op.log if node.op_type == "ReduceLogSum" else relax.op.abs
        lowering.set(node.outputs[0], alone(x))


def mean(lowering: Lowering, node: ir.Node) -> None:
    """ReduceMean; that of integers is rounded towards zero, as ONNX Runtime has it."""
    x = lowering.tensor(node.inputs[0])
    dtype = dtype_of(x)
    if dtype.startswith("float"):
        by_importer(lowering, node)
        return
    axes = _axes(lowering, node)
    if not axes and node.attributes.get_int("noop_with_empty_axes", False):
        lowering.set(node.outputs[0], x)
        return
    wide = lowering.emit(relax.op.astype(x, "float64"))
    keep = bool(node.attributes.get_int("keepdims", 1))
    lowering.set(
        node.outputs[0], relax.op.astype(lowering.emit(relax.op.mean(wide, axes or None, keep)), dtype)
    )


def log_sum_exp(lowering: Lowering, node: ir.Node) -> None:
    """ReduceLogSumExp: ``m + log(sum(exp(x - m)))``, m the largest number where that is finite."""
    x = lowering.tensor(node.inputs[0])
    dtype, emit = dtype_of(x), lowering.emit
    axes = _axes(lowering, node)
    if not dtype.startswith("float") or (not axes and node.attributes.get_int("noop_with_empty_axes", False)):
        by_importer(lowering, node)
        return
    most = emit(relax.op.max(x, axes or None, True))
    finite = emit(relax.op.less(relax.op.abs(most), relax.const(np.inf, dtype)))
    most = emit(relax.op.where(finite, most, relax.const(0, dtype)))
    powers = emit(relax.op.exp(emit(relax.op.subtract(x, most))))
    found = emit(relax.op.add(relax.op.log(emit(relax.op.sum(powers, axes or None, True))), most))
    if not node.attributes.get_int("keepdims", 1):
        found = relax.op.squeeze(found, axes or None)
    lowering.set(node.outputs[0], found)


def where_extreme(lowering: Lowering, node: ir.Node) -> None:
    """ArgMax and ArgMin: where the extreme stands, or a NaN, first or last. TVM's own starts from the outermost
    finite number, and has -1 where nothing is beyond it."""
    x = lowering.tensor(node.inputs[0])
    shape, emit = shape_of(x), lowering.emit
    axis = node.attributes.get_int("axis", 0)
    axis += len(shape) if axis < 0 else 0
    size = shape[axis]
    if not isinstance(size, int):
        by_importer(lowering, node)
        return
    last = bool(node.attributes.get_int("select_last_index", 0))
    reduce = relax.op.max if node.op_type == "ArgMax" else relax.op.min
    found = emit(relax.op.equal(x, emit(reduce(x, axis, True))))
    if dtype_of(x).startswith("float"):
        found = emit(relax.op.logical_or(found, emit(relax.op.isnan(x))))
    lie = [size if i == axis else 1 for i in range(len(shape))]
    places = emit(relax.op.reshape(relax.op.arange(0, size, 1, "int64"), lie))
    places = emit(relax.op.where(found, places, relax.const(-1 if last else size, "int64")))
    keep = bool(node.attributes.get_int("keepdims", 1))
    lowering.set(node.outputs[0], (relax.op.max if last else relax.op.min)(places, axis, keep))


def _axes(lowering: Lowering, node: ir.Node) -> list[int]:
    if "axes" in node.attributes:
        return [int(axis) for axis in node.attributes["axes"].as_ints()]
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None:
        return []
    array = lowering.array(value)
    if array is None:
        lowering.refuse(node, "takes its axes from the inputs' values")
    return [int(axis) for axis in array.reshape(-1)]

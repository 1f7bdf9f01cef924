"""Reductions that TVM's importer has wrong, or lets through and TVM cannot compile."""

from __future__ import annotations

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
    if _axes(lowering, node) or not node.attributes.get_int("noop_with_empty_axes", 0):
        by_importer(lowering, node)
        return
    x = lowering.tensor(node.inputs[0])
    if node.op_type == "ReduceSumSquare":
        lowering.set(node.outputs[0], relax.op.multiply(x, x))
    else:
        alone = relax.op.log if node.op_type == "ReduceLogSum" else relax.op.abs
        lowering.set(node.outputs[0], alone(x))


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

"""Ordinary operators: by the converters of TVM's ONNX importer, whose results are looked at."""

from __future__ import annotations

import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of, is_read, relax_dtype, shape_of, why_no_type
from effic.backends.tvm.private_api import convert_by_importer

# Operators whose converters in the importer take a shape as it is, not only as a tensor.
_READ_SIZES = {
    "Cast", "CastLike", "Concat", "ConstantOfShape", "Equal", "Expand", "Gather", "Reshape", "Resize",
    "Shape", "Slice", "Squeeze", "Where",
}  # fmt: skip


def by_importer(lowering: Lowering, node: ir.Node) -> None:
    """Lower one node by the importer's converter."""
    for value in node.outputs:
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            lowering.refuse(node, "makes a sequence or an optional value")
    reads_sizes = node.op_type in _READ_SIZES
    inputs = [
        None if v is None else lowering.value(v) if reads_sizes else lowering.tensor(v) for v in node.inputs
    ]
    results = convert_by_importer(lowering.bb, node, inputs, node.version or lowering.opset)
    read = [is_read(value) for value in node.outputs]
    if any(read[len(results) :]):
        lowering.refuse(node, f"has {len(read)} outputs, of which TVM's converter makes {len(results)}")
    for value, result, used in zip(node.outputs, results, read, strict=False):
        if used:
            lowering.set(value, result)
            if reason := _misfit(lowering, value):
                lowering.refuse(node, reason)


def _misfit(lowering: Lowering, value: ir.Value) -> str | None:
    """How what the importer made of a value differs from what ONNX says it is, a phrase."""
    made = lowering.value(value)
    if isinstance(made.ty, relax.ShapeType):
        return None
    if (
        value.dtype is not None
        and why_no_type(value.dtype) is None
        and dtype_of(made) != relax_dtype(value.dtype)
    ):
        return f"yields {dtype_of(made)} by TVM's converter instead of {relax_dtype(value.dtype)}"
    shape = shape_of(made)
    if value.shape is None or (value.is_graph_output() and not value.shape.is_static()):
        return None
    wanted = list(value.shape)
    fits = len(shape) == len(wanted) and all(
        not isinstance(want, int) or not isinstance(have, int) or want == have
        for want, have in zip(wanted, shape, strict=True)
    )
    return None if fits else f"yields the shape {list(shape)} by TVM's converter instead of {wanted}"

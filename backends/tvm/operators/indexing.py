"""Slices and look-ups. TVM's own converters take neither omitted axes nor indices out of range."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.ort.scenes import encoded_input
from effic.backends.tvm.lowering import Lowering, dtype_of, relax_dtype, shape_of
from effic.backends.tvm.operators.encoded import as_matrix, gather_rows
from effic.backends.tvm.operators.importer import by_importer

_FAR = (1 << 31) - 1


def slice_(lowering: Lowering, node: ir.Node) -> None:
    """Slice with constant bounds, also backwards."""
    x = lowering.value(node.inputs[0])
    if isinstance(x.ty, relax.ShapeType):
        by_importer(lowering, node)
        return
    shape = shape_of(x)
    starts, ends, axes, steps = _bounds(lowering, node)
    axes = [axis + len(shape) if axis < 0 else axis for axis in axes]
    begins, stops, strides, backwards = [], [], [], []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = shape[axis]
        if not isinstance(size, int):
            if start < 0 or step != 1 or -_FAR < end < _FAR:
                lowering.refuse(node, f"cuts axis {axis}, whose size is left open; pin it with shapes")
            begins.append(start)
            stops.append(_FAR)
            strides.append(1)
            continue
        taken = range(size)[slice(start, end, step)]
        if not len(taken):
            lowering.refuse(node, "has an empty result")
        if step < 0:
            backwards.append(axis)
            taken = taken[::-1]
        begins.append(taken.start)
        stops.append(taken[-1] + 1)
        strides.append(taken.step)
    y = lowering.emit(relax.op.strided_slice(x, axes, begins, stops, strides))
    for axis in backwards:
        y = lowering.emit(relax.op.flip(y, axis))
    lowering.set(node.outputs[0], y)


def _bounds(lowering: Lowering, node: ir.Node) -> tuple[list[int], list[int], list[int], list[int]]:
    """Starts, ends, axes and steps, which were attributes before opset 10."""

    def given(index: int, name: str) -> list[int] | None:
        if name in node.attributes:
            return [int(number) for number in node.attributes[name].as_ints()]
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        array = lowering.array(value)
        if array is None:
            lowering.refuse(node, f"takes its {name} from the inputs' values")
        return [int(number) for number in array.reshape(-1)]

    starts, ends = given(1, "starts"), given(2, "ends")
    if starts is None or ends is None:
        lowering.refuse(node, "has no starts or ends")
    axes, steps = given(3, "axes"), given(4, "steps")
    return starts, ends, axes or list(range(len(starts))), steps or [1] * len(starts)


def gather(lowering: Lowering, node: ir.Node) -> None:
    """Gather: a constant index is a slice; an encoded table is decoded row by row."""
    table, ids = node.inputs[0], node.inputs[1]
    axis = node.attributes.get_int("axis", 0)
    weight = encoded_input(table)
    if weight is not None and not weight.transposed and axis == 0 and as_matrix(weight.encoding):
        encoding = weight.encoding
        if encoding.outliers is None and lowering.array(ids) is None:
            rows = gather_rows(lowering, weight.value, encoding, weight.name, lowering.tensor(ids))
            lowering.set(node.outputs[0], rows)
            return
    x = lowering.value(table)
    if isinstance(x.ty, relax.ShapeType):
        by_importer(lowering, node)
        return
    shape = shape_of(x)
    axis += len(shape) if axis < 0 else 0
    known, size = lowering.array(ids), shape[axis]
    if not isinstance(size, int):
        lowering.refuse(node, f"picks along axis {axis}, whose size is left open; pin it with shapes")
    if known is None:
        lowering.set(node.outputs[0], take(lowering, x, lowering.tensor(ids), axis, size))
        return
    if known.size and (known.min() < -size or known.max() >= size):
        lowering.refuse(node, f"picks past the end of axis {axis}, which has {size} entries")
    known = np.where(known < 0, known + size, known).astype(np.int64)
    if known.size == 1:
        at = int(known.reshape(-1)[0])
        y = lowering.emit(relax.op.strided_slice(x, [axis], [at], [at + 1]))
        result = (*shape[:axis], *known.shape, *shape[axis + 1 :])
        lowering.set(node.outputs[0], lowering.emit(relax.op.reshape(y, result)))
        return
    indices = relax.const(known)
    lowering.set(node.outputs[0], relax.op.take(x, indices, axis, mode="clip"))


def take(lowering: Lowering, x: object, ids: object, axis: int, size: int) -> object:
    """Entries along an axis; an index below zero counts from the end, one out of range reads the nearest."""
    dtype = dtype_of(ids)
    if not dtype.startswith("uint"):
        below = lowering.emit(relax.op.less(ids, relax.const(0, dtype)))
        ids = lowering.emit(relax.op.where(below, relax.op.add(ids, relax.const(size, dtype)), ids))
    return lowering.emit(relax.op.take(x, ids, axis, mode="clip"))


def one_hot(lowering: Lowering, node: ir.Node) -> None:
    """OneHot of constant depth; an index out of range is off everywhere."""
    given = lowering.array(node.inputs[1])
    if given is None:
        lowering.refuse(node, "takes its depth from the inputs' values")
    depth = int(given.reshape(-1)[0])
    if depth < 1:
        lowering.refuse(node, f"has a depth of {depth}")
    ids = lowering.emit(relax.op.astype(lowering.tensor(node.inputs[0]), "int64"))
    rank = len(shape_of(ids)) + 1
    axis = node.attributes.get_int("axis", -1) % rank
    wrapped = relax.op.where(
        relax.op.less(ids, relax.const(0, "int64")), relax.op.add(ids, relax.const(depth, "int64")), ids
    )
    ids = lowering.emit(relax.op.expand_dims(lowering.emit(wrapped), axis))
    # Counted where it runs: a constant of any depth that a model names would have to fit into memory.
    places = lowering.emit(relax.op.arange(depth, dtype="int64"))
    places = lowering.emit(relax.op.reshape(places, [depth if i == axis else 1 for i in range(rank)]))
    hot = lowering.emit(relax.op.equal(ids, places))
    values = lowering.tensor(node.inputs[2])
    off, on = (lowering.emit(relax.op.strided_slice(values, [0], [i], [i + 1])) for i in (0, 1))
    lowering.set(node.outputs[0], relax.op.where(hot, on, off))


def split(lowering: Lowering, node: ir.Node) -> None:
    """Split; of pieces without elements, which nothing reads, the others are slices."""
    shapes = [value.shape for value in node.outputs]
    if not any(shape is not None and 0 in shape for shape in shapes):
        by_importer(lowering, node)
        return
    x = lowering.tensor(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape_of(x))
    start = 0
    for value, shape in zip(node.outputs, shapes, strict=True):
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            lowering.refuse(node, f"cuts axis {axis} at places that are not known")
        if size:
            lowering.set(value, relax.op.strided_slice(x, [axis], [start], [start + size]))
        start += size


def eye_like(lowering: Lowering, node: ir.Node) -> None:
    """EyeLike, whose type may be another than its input's, which TVM's own takes instead."""
    x, output = lowering.tensor(node.inputs[0]), node.outputs[0]
    dtype = dtype_of(x) if output.dtype is None else relax_dtype(output.dtype)
    rows, columns = shape_of(x)
    lowering.set(output, relax.op.eye(rows, columns, node.attributes.get_int("k", 0), dtype))

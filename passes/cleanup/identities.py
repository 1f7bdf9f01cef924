"""When an operator returns its input: one rule per operator.

A rule answers with the value the node's first output equals, with the reason it cannot be used
although it looked like it (a phrase), or with None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from effic.ir.model import constant_tensor
from effic.ir.tensors import borrow
from effic.passes.cleanup.scopes import Scope, int_attribute, ints_attribute
from effic.passes.cleanup.shapes import Dims, Shapes

Same = ir.Value | str | None
Rule = Callable[[ir.Node, Scope, Shapes], Same]

# A neutral operand is a scalar or a vector; larger constants are weights and not worth reading.
NEUTRAL_ELEMENTS = 1 << 16
# Shape, axes and index arguments.
ARGUMENT_ELEMENTS = 1 << 10
# Exporters write "to the end" as one of these.
TO_THE_END = (1 << 31) - 1


def ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers of a small constant, flattened, or None."""
    tensor = constant_tensor(value)
    if (
        tensor is None
        or tensor.size > ARGUMENT_ELEMENTS
        or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32)
    ):
        return None
    return tuple(int(i) for i in tensor.numpy().reshape(-1))


def argument(node: ir.Node, index: int, attribute: str) -> tuple[int, ...] | None:
    """Integers that older opsets hold in an attribute and newer ones in an input."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        return ints(node.inputs[index])
    return ints_attribute(node, attribute)


def has_argument(node: ir.Node, index: int, attribute: str) -> bool:
    """Whether the argument is given at all."""
    return (len(node.inputs) > index and node.inputs[index] is not None) or attribute in node.attributes


def same_dims(a: Dims | None, b: Dims | None) -> bool:
    """Whether two shapes are known to be equal (named sizes included)."""
    return a is not None and a == b and None not in a


def _identity(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    return node.inputs[0]


def _dropout(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    if scope.opset < 7:
        # Before opset 7 an attribute says whether it drops.
        if int_attribute(node, "is_test", 0) != 1:
            return "kept: is_test is not set, it drops at random"
    elif scope.opset >= 12 and len(node.inputs) > 2 and node.inputs[2] is not None:
        mode = constant_tensor(node.inputs[2])
        if mode is None:
            return "kept: whether it is in training mode is decided at run time"
        if bool(mode.numpy().reshape(-1)[0]):
            return "kept: it is in training mode"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "kept: its mask is read"
    return node.inputs[0]


def _cast(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    to = int_attribute(node, "to", 0)
    if not to:
        return None
    return node.inputs[0] if shapes.dtype(node.inputs[0]) == ir.DataType(to) else None


def _cast_like(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    dtype = shapes.dtype(node.inputs[0])
    return node.inputs[0] if dtype is not None and dtype == shapes.dtype(node.inputs[1]) else None


def _transpose(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    perm = ints_attribute(node, "perm")
    if perm is not None:
        return node.inputs[0] if perm == tuple(range(len(perm))) else None
    if "perm" in node.attributes:
        return None
    dims = shapes.dims(node.inputs[0])
    return node.inputs[0] if dims is not None and len(dims) < 2 else None


def _reshape(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    source = node.inputs[0]
    if source is None:
        return None
    target = argument(node, 1, "shape")
    before = shapes.dims(source)
    if target is not None and before is not None and len(target) == len(before):
        copies_zero = int_attribute(node, "allowzero", 0) == 0
        kept = sum(
            (want == 0 and copies_zero) or (want == have and want > 0)
            for want, have in zip(target, before, strict=True)
        )
        # With all other sizes kept, a single -1 can only be the remaining size.
        if kept == len(target) or (kept == len(target) - 1 and -1 in target):
            return source
    return source if same_dims(before, shapes.dims(node.outputs[0])) else None


def _same_shape(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    """For operators that only change the shape, or only repeat: same shape, same value."""
    return node.inputs[0] if same_dims(shapes.dims(node.inputs[0]), shapes.dims(node.outputs[0])) else None


def _expand(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    target = ints(node.inputs[1])
    dims = shapes.dims(node.inputs[0])
    if target is not None and dims is not None and len(target) <= len(dims):
        inner = dims[len(dims) - len(target) :]
        if all(want in (1, have) for want, have in zip(target, inner, strict=True)):
            return node.inputs[0]
    return _same_shape(node, scope, shapes)


def _tile(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    repeats = ints(node.inputs[1]) if scope.opset >= 6 else None
    return node.inputs[0] if repeats and all(count == 1 for count in repeats) else None


def _flatten(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    dims = shapes.dims(node.inputs[0])
    axis = int_attribute(node, "axis", 1)
    return node.inputs[0] if dims is not None and len(dims) == 2 and axis in (1, -1) else None


def _squeeze(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    if has_argument(node, 1, "axes"):
        return node.inputs[0] if argument(node, 1, "axes") == () else None
    return _same_shape(node, scope, shapes)


def _pad(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    pads = argument(node, 1, "pads")
    return node.inputs[0] if pads and not any(pads) else None


def _slice(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    starts, ends = argument(node, 1, "starts"), argument(node, 2, "ends")
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
    if not starts or not ends or any(starts) or steps is None or any(step != 1 for step in steps):
        return None
    if all(end >= TO_THE_END for end in ends):
        return node.inputs[0]
    dims = shapes.dims(node.inputs[0])
    axes = argument(node, 3, "axes") if has_argument(node, 3, "axes") else tuple(range(len(starts)))
    if dims is None or axes is None:
        return None
    for axis, end in zip(axes, ends, strict=True):
        size = dims[axis]
        if end < TO_THE_END and not (isinstance(size, int) and end >= size):
            return None
    return node.inputs[0]


def _of_one(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _split(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _neutral(element: int, *, either_side: bool) -> Rule:
    def rule(node: ir.Node, scope: Scope, shapes: Shapes) -> Same:
        for side in (1, 0) if either_side else (1,):
            operand, other = node.inputs[side], node.inputs[1 - side]
            tensor = constant_tensor(operand)
            if tensor is None or other is None or not _all_equal(tensor, element):
                continue
            shape = tuple(tensor.shape.numpy())
            if _broadcast_free(shape, shapes.dims(other)):
                return other
            if shapes.dims(other) is None:
                return f"kept: the shape of '{other.name}' is not known, the constant may broadcast it"
            return f"kept: the constant of shape {list(shape)} broadcasts '{other.name}'"
        return None

    return rule


def _all_equal(tensor: ir.TensorProtocol, element: int) -> bool:
    if tensor.size == 0 or tensor.size > NEUTRAL_ELEMENTS or tensor.dtype == ir.DataType.STRING:
        return False
    with borrow(tensor) as array:
        flat = array.reshape(-1)
        # The first element rules nearly every constant out.
        return bool(flat[0] == element) and bool(np.all(flat == element))


def _broadcast_free(constant: Sequence[int], dims: Dims | None) -> bool:
    """Whether an operand of this shape leaves the shape of the other as it is."""
    if len(constant) == 0:
        return True
    if dims is None or len(constant) > len(dims):
        return False
    inner = dims[len(dims) - len(constant) :]
    return all(size in (1, have) for size, have in zip(constant, inner, strict=True))


RULES: dict[str, Rule] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Tile": _tile,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _of_one,
    "Sum": _of_one,
    "Max": _of_one,
    "Min": _of_one,
    "Mean": _of_one,
    "Split": _split,
    "Add": _neutral(0, either_side=True),
    "Sub": _neutral(0, either_side=False),
    "Mul": _neutral(1, either_side=True),
    "Div": _neutral(1, either_side=False),
    "Pow": _neutral(1, either_side=False),
}
"""Rule per standard operator."""

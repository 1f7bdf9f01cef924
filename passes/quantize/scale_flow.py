"""How a factor per channel travels through a graph: which elements of a later value carry whose factor.

A producer multiplies its output channels by factors. Operators that are homogeneous (``f(s·x) = s·f(x)``)
or only move elements hand the factors on. What an element carries is written down as a *map*: an
integer array, aligned with the last axes of the value like a NumPy broadcast, whose entries are
numbers of the producer's channels. The output of a linear layer with 6 channels has the map
``[0 1 2 3 4 5]``; split into 2 heads it is ``[[0 1 2] [3 4 5]]``, and so on. An axis of length 1 in
the map means that the factor does not change along that axis.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model, constant_array, constant_tensor, describe
from effic.ir.shapes import static_shapes
from effic.passes.fuse.reading import FLOATS, is_pass_through

# Sizes for dynamic dimensions, unlike each other and unlike the sizes of heads and channels, so that
# axes are not mistaken for each other: first axis, others, and others of images.
_FIRST, _OTHER, _PIXELS = 3, 7, 224

# Homogeneous for factors above zero only.
POSITIVE = frozenset({"Relu", "LeakyRelu", "PRelu", "Abs", "MaxPool", "GlobalMaxPool"})


class Blocked(Exception):
    """A factor cannot pass; the text is the reason, as a phrase about the value that carries it."""


class Shapes:
    """Shapes of a model's values, inferred when the first one is asked for."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._sizes = _sizes(model)
        self._known: dict[str, tuple[int, ...]] | None = None

    def of(self, value: ir.Value | None) -> tuple[int, ...]:
        """A shape, dynamic dimensions at some size.

        Raises:
            Blocked: it is not known.
        """
        if value is None:
            raise Blocked("has a shape that is not known")
        declared = [
            dim if isinstance(dim, int) else self._sizes.get(str(dim.value)) for dim in value.shape or ()
        ]
        if value.shape is not None and None not in declared:
            return tuple(size for size in declared if size is not None)
        if self._known is None:
            self._known = static_shapes(self.model, self._sizes)
        found = self._known.get(value.name or "") if value.graph is self.model.graph else None
        if found is None:
            raise Blocked(f"has a shape that is not known at '{value.name}'")
        return found


def _sizes(model: Model) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value:
                image = value.shape is not None and len(value.shape) > 3
                sizes.setdefault(str(dim.value), _FIRST if axis == 0 else _PIXELS if image else _OTHER)
    return sizes


def carry(
    node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes
) -> list[tuple[ir.Value, np.ndarray]]:
    """What becomes of the factors that ``node`` meets at its input ``index``.

    For an Add or Sub with a constant the constant must be scaled along; the caller sees to that.

    Args:
        node: the operator.
        index: which of its inputs carries factors.
        channels: map of that input.
        model: the model, for its opset.
        shapes: of its values.

    Returns:
        The outputs that carry factors, with their maps.

    Raises:
        Blocked: the operator is not homogeneous, or where the factors end up is not known.
    """
    rule = RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
    if rule is None:
        raise Blocked(f"is read by {describe(node)}, which no factor passes")
    try:
        return rule(node, index, channels, model, shapes)
    except Blocked as reason:
        raise Blocked(f"is read by {describe(node)}: it {reason}") from None


def is_carrier(node: ir.Node) -> bool:
    """Whether factors may come through ``node`` at all."""
    return node.domain in ONNX_DOMAINS and node.op_type in RULES


_Outputs = list[tuple[ir.Value, np.ndarray]]


def _same(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    if index:
        raise Blocked("is a parameter there")
    return [(node.outputs[0], channels)]


def _dropout(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    if index or not is_pass_through(node, model):
        raise Blocked("is dropped at random")
    return [(node.outputs[0], channels)]


def _cast(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    if ir.DataType(_int(node, "to", 0)) not in FLOATS:
        raise Blocked("is rounded to another type")
    return [(node.outputs[0], channels)]


def _product(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    if node.op_type == "Div" and index == 1:
        raise Blocked("is the divisor")
    return [(node.outputs[0], channels)]


def _sum(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    tensor = constant_tensor(node.inputs[1 - index])
    if tensor is None or tensor.dtype not in FLOATS:
        raise Blocked("is added to what is not scaled")
    return [(node.outputs[0], channels)]


def _matmul(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    # Factors along the axis that is summed over do not come out again.
    axis = -1 if index == 0 else -2
    if channels.ndim >= -axis and channels.shape[axis] > 1:
        raise Blocked("is summed over its channels")
    return [(node.outputs[0], channels)]


def _pool(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    spatial = len(shapes.of(node.inputs[0])) - 2
    if any(size > 1 for size in channels.shape[channels.ndim - spatial :]):
        raise Blocked("is pooled over its channels")
    return [(node.outputs[0], channels)]


def _reduce(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    rank = len(shapes.of(node.inputs[0]))
    given = node.inputs[1] if len(node.inputs) > 1 else None
    array = constant_array(given)
    if index or (given is not None and array is None):
        raise Blocked("is reduced along axes computed at run time")
    axes = _ints(node, "axes") if array is None else tuple(int(a) for a in array)
    axes = tuple(sorted(a % rank for a in axes)) if axes else tuple(range(rank))
    channels = _full(channels, rank)
    if any(channels.shape[axis] > 1 for axis in axes):
        raise Blocked("is reduced over its channels")
    return [(node.outputs[0], channels if _int(node, "keepdims", 1) else channels.squeeze(axes))]


def _transpose(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    perm = _ints(node, "perm")
    if perm is None:
        perm = tuple(reversed(range(len(shapes.of(node.inputs[0])))))
    return [(node.outputs[0], _full(channels, len(perm)).transpose(perm))]


def _reshape(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    if index:
        raise Blocked("is a parameter there")
    before, after = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    return [(node.outputs[0], reshaped(channels, before, after))]


def reshaped(channels: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray:
    """The map of a value of shape ``before`` once it is reshaped to ``after``.

    Raises:
        Blocked: the shapes do not fit each other.
    """
    channels = _full(channels, len(before))
    wide: list[int] = []
    narrow: list[int] = []
    for first, second in _axis_groups(before, after):
        sizes = channels.shape[first]
        if all(size == 1 for size in sizes):
            wide += sizes
            narrow += [1] * (second.stop - second.start)
        else:
            wide += before[first]
            narrow += after[second]
    try:
        return np.broadcast_to(channels, wide).reshape(narrow)
    except ValueError:
        raise Blocked("has channels that do not fit its shape") from None


def _axis_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Runs of axes that a reshape turns into each other, from the left and as short as possible."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second, a, b = i, j, 1, 1
        if i < len(before):
            a, i = before[i], i + 1
        if j < len(after):
            b, j = after[j], j + 1
        while a != b:
            if a < b and i < len(before):
                a, i = a * before[i], i + 1
            elif b < a and j < len(after):
                b, j = b * after[j], j + 1
            else:
                raise Blocked("is reshaped to another number of elements")
        groups.append((slice(first, i), slice(second, j)))
    return groups


def _expand(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    # Copies carry the factor of the original, which is what a map's axis of length one says.
    return _same(node, index, channels, model, shapes)


def _split(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    if index:
        raise Blocked("is a parameter there")
    axis = _int(node, "axis", 0)
    if axis >= 0:
        axis -= len(shapes.of(node.inputs[0]))
    if channels.ndim < -axis or channels.shape[axis] == 1:
        return [(output, channels) for output in node.outputs]
    sizes: np.ndarray | tuple[int, ...] | None = constant_array(
        node.inputs[1] if len(node.inputs) > 1 else None
    )
    sizes = _ints(node, "split") if sizes is None else sizes
    if sizes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise Blocked("is split at places computed at run time")
    length, count = channels.shape[axis], len(node.outputs)
    part = -(-length // count)
    ends = np.cumsum([part] * count if sizes is None else sizes)[:-1]
    return list(zip(node.outputs, np.split(channels, ends, axis), strict=True))


def _slice(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    arrays = [constant_array(value) for value in node.inputs[1:]]
    if index or not arrays:
        raise Blocked("is sliced as operator sets before 10 did")
    rank = len(shapes.of(node.inputs[0]))
    starts, ends, axes, steps = (*arrays, None, None, None, None)[:4]
    given = [value is not None for value in node.inputs[1:]]
    if (len(given) > 2 and given[2] and axes is None) or (axes is None and starts is None):
        raise Blocked("is sliced along axes computed at run time")
    count = len(starts) if starts is not None else len(axes) if axes is not None else 0
    for place in range(count):
        axis = int(axes[place]) if axes is not None else place
        axis -= rank if axis >= 0 else 0
        if channels.ndim < -axis or channels.shape[axis] == 1:
            continue
        if starts is None or ends is None or (len(given) > 3 and given[3] and steps is None):
            raise Blocked("is sliced at places computed at run time")
        step = int(steps[place]) if steps is not None else 1
        where = [slice(None)] * channels.ndim
        start, stop = int(starts[place]), int(ends[place])
        # ONNX writes "to the very front" as a large negative end, which Python takes as that.
        where[axis] = slice(start, None if step < 0 and stop < -channels.shape[axis] else stop, step)
        channels = channels[tuple(where)]
    return [(node.outputs[0], channels)]


def _clip(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    raise Blocked("is clipped at a fixed value there")


def _norm(node: ir.Node, index: int, channels: np.ndarray, model: Model, shapes: Shapes) -> _Outputs:
    raise Blocked("is shifted there; fold the norm first (fuse-conv-bn)")


def _full(channels: np.ndarray, rank: int) -> np.ndarray:
    """The map with all axes of the value."""
    if channels.ndim > rank:
        raise Blocked("has fewer axes than its factors")
    return channels.reshape((1,) * (rank - channels.ndim) + channels.shape)


def _int(node: ir.Node, name: str, default: int) -> int:
    attr = node.attributes.get(name)
    if attr is not None and attr.is_ref():
        raise Blocked(f"is treated as the function's caller says ('{name}')")
    return default if attr is None else attr.as_int()


def _ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    attr = node.attributes.get(name)
    if attr is not None and attr.is_ref():
        raise Blocked(f"is treated as the function's caller says ('{name}')")
    return None if attr is None else tuple(attr.as_ints())


RULES: dict[str, Callable[[ir.Node, int, np.ndarray, Model, Shapes], _Outputs]] = {
    **dict.fromkeys(("Identity", "Neg", "Abs", "Relu", "LeakyRelu", "PRelu"), _same),
    "Dropout": _dropout,
    "Cast": _cast,
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("Add", "Sub"), _sum),
    "MatMul": _matmul,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum"), _reduce),
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Expand": _expand,
    "Split": _split,
    "Slice": _slice,
    "Clip": _clip,
    "BatchNormalization": _norm,
}
"""What each operator does with factors; an operator that is not listed blocks them."""

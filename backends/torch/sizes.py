"""Arithmetic on sizes while the graph is built, so that they never become tensors.

Covers what exporters put between ``Shape`` and ``Reshape``, ``Expand``, ``Slice``, ``Range``. Floats are
left to tensors: Python's arithmetic rounds otherwise than float32.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from effic.backends.torch.builder import MAX_SIZES, GraphBuilder
from effic.backends.torch.functions import shape as functions
from effic.ir.model import ONNX_DOMAINS

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)

Sizes = np.ndarray
Rule = Callable[[ir.Node, GraphBuilder, list[Sizes]], "Sizes | list[Sizes] | None"]


def propagate(node: ir.Node, graph: GraphBuilder) -> bool:
    """Bind the node's outputs to size arrays, where they are sizes.

    Returns:
        Whether they were; if not, the node's converter has to be called.
    """
    if node.domain not in ONNX_DOMAINS or not node.outputs:
        return False
    if node.op_type in ("Shape", "Size"):
        return _shape(node, graph)
    rule = _RULES.get(node.op_type)
    if rule is None or not node.inputs or not graph.any_sizes(node.inputs):
        return False
    arrays = [np.empty(0, object) if value is None else graph.size_array(value) for value in node.inputs]
    if any(array is None for array in arrays):
        return False
    known = [array for array in arrays if array is not None]
    if any(isinstance(item, float) for array in known for item in array.flat):
        return False
    made = rule(node, graph, known)
    if made is None:
        return False
    results = made if isinstance(made, list) else [made]
    if sum(array.size for array in results) > MAX_SIZES:
        return False
    for out, array in zip(node.outputs, results, strict=True):
        if out.dtype is None:
            out.type = ir.TensorType(ir.DataType.INT64)
        graph.bind_sizes(out, array)
    return True


def objects(items: Any) -> Sizes:
    """An object array of rank 0 or 1 (one item, or a list of them)."""
    if isinstance(items, list):
        array = np.empty(len(items), object)
        array[:] = items
        return array
    array = np.empty((), object)
    array[()] = items
    return array


def _shape(node: ir.Node, graph: GraphBuilder) -> bool:
    value = node.inputs[0]
    if value is None or value.shape is None or isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
        return False
    rank = len(value.shape)
    if value.is_initializer() or graph.size_rank(value) is not None:
        known = graph.size_rank(value)
        dims: list[Any] = [int(d) for d in value.shape] if known is None else list(known)  # type: ignore[arg-type]
    else:
        tensor = graph.tensor(value)
        dims = [graph.method("size", tensor, axis) for axis in range(rank)]
    if node.op_type == "Shape":
        start, end = _int(node, "start", 0), _int(node, "end", rank)
        graph.bind_sizes(node.outputs[0], objects(dims[slice(start, end)]))
    else:
        graph.bind_sizes(node.outputs[0], objects(functools.reduce(_on(graph, operator.mul), dims, 1)))
    return True


def _int(node: ir.Node, name: str, default: int) -> int:
    attr = node.attributes.get(name)
    return default if attr is None else int(attr.value)


def _on(graph: GraphBuilder, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` at once on plain numbers, as a call in the graph on others."""

    def apply(*items: Any) -> Any:
        if any(isinstance(item, fx.Node) for item in items):
            if function is operator.mul and 1 in [i for i in items if not isinstance(i, fx.Node)]:
                return next(item for item in items if isinstance(item, fx.Node))
            return graph.call(function, *items)
        return function(*items)

    return apply


def _elementwise(function: Callable[..., Any]) -> Rule:
    def rule(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes:
        apply = _on(graph, function)
        wide = np.broadcast_arrays(*arrays)
        result = np.empty(wide[0].shape, object)
        for place in np.ndindex(result.shape):
            result[place] = apply(*(array[place] for array in wide))
        return result

    return rule


def _variadic(function: Callable[[Any, Any], Any]) -> Rule:
    pair = _elementwise(function)

    def rule(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes:
        result = arrays[0]
        for array in arrays[1:]:
            result = pair(node, graph, [result, array])  # type: ignore[assignment]
        return result

    return rule


def _reduce(function: Callable[[Any, Any], Any], start: Any) -> Rule:
    def rule(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
        if arrays[0].ndim > 1 or (start is None and arrays[0].size == 0):
            return None
        if len(arrays) > 1 and arrays[1].size == 0 and _int(node, "noop_with_empty_axes", 0):
            return None
        items = list(arrays[0].reshape(-1))
        if start is not None:
            items.insert(0, start)
        total = functools.reduce(_on(graph, function), items)
        keep = _int(node, "keepdims", 1) and arrays[0].ndim
        return objects([total]) if keep else objects(total)

    return rule


def _static(array: Sizes) -> np.ndarray | None:
    if any(isinstance(item, fx.Node) for item in array.flat):
        return None
    return np.array(array.tolist(), np.int64).reshape(array.shape)


def _gather(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    data, index = arrays[0], _static(arrays[1])
    if index is None or data.ndim != 1 or _int(node, "axis", 0) not in (0, -1):
        return None
    result = np.empty(index.shape, object)
    for place, at in np.ndenumerate(index):
        if not -data.size <= at < data.size:
            return None
        result[place] = data[at]
    return result


def _slice(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    data = arrays[0]
    if data.ndim != 1:
        return None
    if len(arrays) == 1:  # opset 1 to 9: bounds are attributes
        if list(node.attributes["axes"].value if "axes" in node.attributes else [0]) != [0]:
            return None
        bounds = [np.array(node.attributes[name].value) for name in ("starts", "ends")]
        return data[slice(int(bounds[0][0]), int(bounds[1][0]))]
    given = [_static(array) for array in arrays[1:]]
    if any(array is None for array in given):
        return None
    starts, ends, *rest = [array for array in given if array is not None]
    step = int(rest[1][0]) if len(rest) > 1 and rest[1].size else 1
    if starts.size != 1:
        return None
    start, stop = int(starts.flat[0]), int(ends.flat[0])
    if step < 0 and stop < -data.size:
        return data[slice(start, None, step)]
    return data[slice(start, stop, step)]


def _concat(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    return np.concatenate(arrays) if all(array.ndim == 1 for array in arrays) else None


def _to_rank(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    """Squeeze, Unsqueeze and Reshape of up to one axis."""
    data = arrays[0]
    if node.op_type == "Reshape":
        shape = _static(arrays[1])
        if shape is None or 0 in shape:
            return None
        return data.reshape([int(dim) for dim in shape])
    axes: list[int] | None = None
    if len(arrays) > 1 and node.inputs[1] is not None:
        found = _static(arrays[1])
        if found is None:
            return None
        axes = [int(a) for a in found.reshape(-1)]
    elif "axes" in node.attributes:
        axes = list(node.attributes["axes"].value)
    if node.op_type == "Squeeze":
        return np.squeeze(data, None if axes is None else tuple(axes)).astype(object)
    return None if axes is None else np.expand_dims(data, tuple(axes))


def _cast(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    target = ir.DataType(node.attributes["to"].value)
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    if target == ir.DataType.BOOL and source != target:
        return _elementwise(functions.truth)(node, graph, arrays)  # type: ignore[return-value]
    if target not in _INTEGERS:
        return None
    if source == ir.DataType.BOOL and target != source:
        return _elementwise(int)(node, graph, arrays)  # type: ignore[return-value]
    return arrays[0]


def _constant_of_shape(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    shape = _static(arrays[0])
    attr = node.attributes.get("value")
    if attr is None or shape is None or math.prod(shape.tolist()) > MAX_SIZES:
        return None
    tensor = attr.as_tensor()
    if tensor.dtype not in _INTEGERS:
        return None
    result = np.empty([int(d) for d in shape], object)
    result[...] = tensor.numpy().reshape(-1)[0].item()
    return result


def _range(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> Sizes | None:
    bounds = [_static(array) for array in arrays]
    if any(bound is None for bound in bounds):
        return None
    values = range(*(int(bound) for bound in bounds if bound is not None))
    return objects(list(values)) if len(values) <= MAX_SIZES else None


def _split(node: ir.Node, graph: GraphBuilder, arrays: list[Sizes]) -> list[Sizes] | None:
    data = arrays[0]
    if data.ndim != 1:
        return None
    if len(arrays) > 1 and node.inputs[1] is not None:
        sizes = _static(arrays[1])
        lengths = None if sizes is None else sizes.tolist()
    elif "split" in node.attributes:
        lengths = list(node.attributes["split"].value)
    else:
        part = -(-data.size // len(node.outputs))
        lengths = [part] * (len(node.outputs) - 1)
        lengths.append(data.size - sum(lengths))
    if lengths is None or len(lengths) != len(node.outputs):
        return None
    return list(np.split(data, np.cumsum(lengths)[:-1]))


_RULES: dict[str, Rule] = {
    "Abs": _elementwise(abs),
    "Add": _elementwise(operator.add),
    "And": _elementwise(functions.both),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(functions.truncated_division),
    "Equal": _elementwise(operator.eq),
    "Gather": _gather,
    "Greater": _elementwise(operator.gt),
    "GreaterOrEqual": _elementwise(operator.ge),
    "Identity": lambda node, graph, arrays: arrays[0],
    "Less": _elementwise(operator.lt),
    "LessOrEqual": _elementwise(operator.le),
    "Max": _variadic(functions.larger),
    "Min": _variadic(functions.smaller),
    "Mul": _elementwise(operator.mul),
    "Neg": _elementwise(operator.neg),
    "Not": _elementwise(operator.not_),
    "Or": _elementwise(functions.either),
    "Range": _range,
    "ReduceMax": _reduce(functions.larger, None),
    "ReduceMin": _reduce(functions.smaller, None),
    "ReduceProd": _reduce(operator.mul, 1),
    "ReduceSum": _reduce(operator.add, 0),
    "Reshape": _to_rank,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _to_rank,
    "Sub": _elementwise(operator.sub),
    "Unsqueeze": _to_rank,
    "Where": _elementwise(functions.choose),
}

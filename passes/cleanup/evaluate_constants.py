"""Compute nodes whose inputs are all constants: numpy where it is bit-exact, else ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from effic.passes.cleanup.scopes import has_reference, int_attribute, ints_attribute

Evaluator = Callable[[ir.Node, Sequence[np.ndarray]], np.ndarray]


class CannotEvaluateError(Exception):
    """The node cannot be computed ahead; the text says why, as a phrase."""


def _axis(node: ir.Node, default: int, rank: int) -> int:
    axis = int_attribute(node, "axis", default)
    assert axis is not None  # nodes with references are never evaluated
    return axis + rank if axis < 0 else axis


def _transpose(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(inputs[0], ints_attribute(node, "perm")))


def _reshape(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    array, target = inputs[0], [int(size) for size in inputs[1].reshape(-1)]
    if int_attribute(node, "allowzero", 0) == 0:
        target = [array.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return array.reshape(target)


def _flatten(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    shape = inputs[0].shape
    axis = _axis(node, 1, len(shape))
    return inputs[0].reshape(int(np.prod(shape[:axis], dtype=np.int64)), -1)


def _axes(node: ir.Node, inputs: Sequence[np.ndarray]) -> tuple[int, ...] | None:
    if len(inputs) > 1:
        return tuple(int(axis) for axis in inputs[1].reshape(-1))
    return ints_attribute(node, "axes")


def _squeeze(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.squeeze(inputs[0], axis=_axes(node, inputs))


def _unsqueeze(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.expand_dims(inputs[0], _axes(node, inputs) or ())


def _concat(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(inputs, axis=_axis(node, 0, inputs[0].ndim))


def _gather(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.take(inputs[0], inputs[1].astype(np.int64), axis=_axis(node, 0, inputs[0].ndim))


def _slice(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    array = inputs[0]
    if len(inputs) > 1:
        starts, ends = inputs[1].tolist(), inputs[2].tolist()
        axes = inputs[3].tolist() if len(inputs) > 3 else list(range(len(starts)))
        steps = inputs[4].tolist() if len(inputs) > 4 else [1] * len(starts)
    else:
        starts, ends = list(ints_attribute(node, "starts") or ()), list(ints_attribute(node, "ends") or ())
        axes, steps = list(ints_attribute(node, "axes") or range(len(starts))), [1] * len(starts)
    if any(step < 1 for step in steps):
        raise CannotEvaluateError("it slices backwards")
    where = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[axis] = slice(start, end, step)
    return np.ascontiguousarray(array[tuple(where)])


def _cast(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return inputs[0].astype(ir.DataType(int_attribute(node, "to", 0) or 0).numpy())


def _divide(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray:
    a, b = inputs
    if a.dtype.kind == "f":
        return np.asarray(np.divide(a, b))
    # ONNX rounds integers towards zero, numpy down: one more where it went below a negative result.
    quotient = np.asarray(np.floor_divide(a, b))
    one_up = (np.remainder(a, b) != 0) & ((a < 0) != (b < 0))
    return np.asarray(quotient + one_up.astype(quotient.dtype))


def _elementwise(function: Callable[..., np.ndarray]) -> Evaluator:
    return lambda node, inputs: np.asarray(function(*inputs))


# Every one of these moves numbers, compares them, or rounds once as IEEE 754 says, so that numpy
# and any runtime agree to the last bit.
_NATIVE: dict[str, Evaluator] = {
    "Identity": lambda node, inputs: inputs[0],
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Cast": _cast,
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _divide,
    "Sqrt": _elementwise(np.sqrt),
    "Neg": _elementwise(np.negative),
    "Abs": _elementwise(np.abs),
    "Not": _elementwise(np.logical_not),
    "And": _elementwise(np.logical_and),
    "Or": _elementwise(np.logical_or),
    "Equal": _elementwise(np.equal),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Where": _elementwise(np.where),
}
# Only these types do arithmetic as IEEE 754 says in numpy; moving works for all.
_MOVES = frozenset(
    {"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Gather", "Slice"}
)
_ARITHMETIC = frozenset("bhilqBHILQ?fd")
# What numpy and the runtime both have a type for: the above and half precision.
_FEEDABLE = _ARITHMETIC | {"e"}


def evaluate_native(node: ir.Node, inputs: Sequence[np.ndarray]) -> np.ndarray | None:
    """The node's one output by numpy, bit for bit as a runtime computes it; None if numpy cannot.

    Args:
        node: a standard node without subgraphs or references, with one output.
        inputs: its inputs, none left out.
    """
    rule = _NATIVE.get(node.op_type)
    if rule is None or len(node.outputs) != 1:
        return None
    if node.op_type not in _MOVES and any(array.dtype.char not in _ARITHMETIC for array in inputs):
        return None
    if node.op_type == "Cast" and not _cast_is_exact(inputs[0], int_attribute(node, "to", 0) or 0):
        return None
    if node.op_type == "Div" and inputs[0].dtype.kind in "iu" and not inputs[1].all():
        return None
    try:
        with np.errstate(all="ignore"):
            return rule(node, inputs)
    except (ValueError, IndexError, CannotEvaluateError):
        # Operands that do not fit: the runtime's own message is better than numpy's.
        return None


def _cast_is_exact(array: np.ndarray, to: int) -> bool:
    if to not in set(ir.DataType):
        return False
    target = ir.DataType(to)
    if target in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        return False
    if target.numpy().char not in _ARITHMETIC:
        return False
    # What a float beyond the integer range becomes is left to the runtime.
    return not (array.dtype.kind == "f" and target.numpy().kind in "iu")


def evaluate_in_runtime(
    nodes: Iterable[ir.Node],
    given: dict[ir.Value, np.ndarray],
    wanted: Sequence[ir.Value],
    opset_imports: dict[str, int],
) -> list[np.ndarray]:
    """Compute constant nodes in one ONNX Runtime session without optimizations.

    Args:
        nodes: the nodes, in order.
        given: arrays of the values they read and none of them makes.
        wanted: values to return.
        opset_imports: domains and versions that hold for the nodes.

    Returns:
        The array of each wanted value.

    Raises:
        CannotEvaluateError: the runtime has no kernel for one of them, or it failed.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names: dict[ir.Value, str] = {}

    def name(value: ir.Value | None) -> str:
        return "" if value is None else names.setdefault(value, f"v{len(names)}")

    graph = onnx.GraphProto(name="constants")
    for node in nodes:
        if has_reference(node):
            raise CannotEvaluateError("an attribute is only known where the function is called")
        proto = ir.serde.serialize_node(node)
        proto.input[:] = [name(value) for value in node.inputs]
        proto.output[:] = [name(value) for value in node.outputs]
        graph.node.append(proto)
    feeds = {}
    for value, array in given.items():
        if array.dtype.char not in _FEEDABLE:
            raise CannotEvaluateError(f"numpy has no {array.dtype} to hand to the runtime")
        feeds[name(value)] = array
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name(value), kind, array.shape))
    for value in wanted:
        graph.output.add(name=name(value))
    model = onnx.ModelProto(ir_version=10, graph=graph)
    for domain, version in opset_imports.items():
        model.opset_import.add(domain=domain, version=version)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(None, feeds)
    except (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
        state.InvalidProtobuf,
        state.EPFail,
        RuntimeError,
        ValueError,
    ) as error:
        reason = str(error).splitlines()[0][:200]
        raise CannotEvaluateError(f"ONNX Runtime cannot compute it: {reason}") from error
    if not all(isinstance(result, np.ndarray) for result in results):
        raise CannotEvaluateError("its result is not a tensor")
    return [np.asarray(result) for result in results]

"""Static shapes of a model's values once its dynamic dimensions have sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.serde import serialize_node, serialize_value

from effic.ir.model import Model

# Shape arithmetic works on a few integers; a longer result is data, of which only the shape counts.
_MAX_ELEMENTS = 1024
# Each round of inference gets as far as the next shape that a Range or a Reshape takes from
# arithmetic; deeper chains than this have not been met.
_MAX_ROUNDS = 8
_ARITHMETIC = {
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor",
    "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul",
    "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice",
    "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Unsqueeze", "Where",
}  # fmt: skip
_ARITHMETIC_TYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT)


def static_shapes(model: Model, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the main graph's values, by name, as far as they can be found.

    onnx's shape inference stops where a size is computed from another shape through an operator it
    does not evaluate (a ``Range`` over a sequence length, say): such arithmetic is evaluated here,
    with onnx's reference operators, and inference goes on.

    Args:
        model: it is not changed.
        dims: sizes of dynamic input dimensions by name; each other one counts as 1.
    """
    proto = _skeleton(model, dims)
    shapes = _static(proto.graph.input)
    known = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    # Arithmetic on the inputs' shapes first: it often is all there is, and inference is the slow part.
    _evaluate(proto, shapes, known)
    for _ in range(_MAX_ROUNDS):
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            # A model that shape inference cannot read has the shapes that it declares.
            break
        shapes.update(_static(inferred.graph.value_info))
        shapes.update(_static(inferred.graph.output))
        if not _evaluate(proto, shapes, known):
            break
    return shapes


def _skeleton(model: Model, dims: Mapping[str, int]) -> onnx.ModelProto:
    """The main graph with sizes for dynamic dimensions, and shapes instead of weights."""
    proto = onnx.ModelProto(ir_version=model.ir.ir_version)
    for domain, version in model.ir.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.functions.extend(ir.to_proto(function) for function in model.ir.functions.values())
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    # Not ir.to_proto, which asks each of onnx_ir's protocols whether it fits: that took longer than the rest.
    for value in model.graph.inputs:
        graph.input.append(serialize_value(value))
        for axis, dim in enumerate(value.shape or ()):
            size = dim if isinstance(dim, int) else dims.get(str(dim.value), 1)
            graph.input[-1].type.tensor_type.shape.dim[axis].dim_value = size
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.size <= _MAX_ELEMENTS and tensor.dtype in _ARITHMETIC_TYPES:
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(tensor.numpy()), name))
        else:
            sizes = [int(d) for d in tensor.shape]  # type: ignore[arg-type]
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), sizes))
    worked_out, dropped = _weights_worked_out(model)
    for value in worked_out:
        graph.input.append(serialize_value(value))
    for node in model.graph:
        if node in dropped:
            continue
        graph.node.append(serialize_node(node))
        for value in node.outputs:
            if value.name and value.type is not None and value.shape is not None and value.shape.is_static():
                graph.value_info.append(serialize_value(value))
    for value in model.graph.outputs:
        graph.output.append(onnx.ValueInfoProto(name=value.name))
    return proto


def _weights_worked_out(model: Model) -> tuple[list[ir.Value], set[ir.Node]]:
    """Large values that are worked out from constants alone and whose shape is known, and the nodes that do only that.

    Of a compressed weight inference would keep a number for each code. Its shape is all that is asked for.
    """
    constant: set[ir.Value] = {v for v in model.graph.initializers.values() if not v.is_graph_input()}
    ends: list[ir.Value] = []
    for node in model.graph:
        reads = [value for value in node.inputs if value is not None]
        whole = all(attr.type not in _GRAPHS for attr in node.attributes.values())
        if node.op_type != "Constant" and not (reads and whole and constant.issuperset(reads)):
            continue
        constant.update(node.outputs)
        for value in node.outputs:
            shape = value.shape
            large = shape is not None and shape.is_static() and math.prod(shape.numpy()) > _MAX_ELEMENTS
            if large and value.type is not None and value.name and not value.is_graph_output():
                ends.append(value)
    cut, dropped, kept_ends = set(ends), set[ir.Node](), []
    for node in reversed(list(model.graph)):
        # Uses in subgraphs count: their nodes are not dropped.
        read = [
            v for v in node.outputs if v.is_graph_output() or any(u.node not in dropped for u in v.uses())
        ]
        if all(value in constant for value in node.outputs) and cut.issuperset(read):
            dropped.add(node)
            kept_ends.extend(read)
    return kept_ends, dropped


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _static(infos: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int, ...]]:
    """The shapes among them that are known and static."""
    found = {}
    for info in infos:
        kind = info.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[info.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return found


def _evaluate(
    proto: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], known: dict[str, np.ndarray]
) -> bool:
    """Turn shape arithmetic into initializers, in place; whether there was any."""
    outputs = {value.name for value in proto.graph.output}
    left, found = [], False
    for node in proto.graph.node:
        constant = len(node.output) == 1 and not node.domain and node.output[0] not in outputs
        result = _result(node, shapes, known, proto.opset_import) if constant else None
        if result is None or result.size > _MAX_ELEMENTS:
            left.append(node)
            continue
        name = node.output[0]
        known[name], shapes[name] = result, result.shape
        proto.graph.initializer.append(onnx.numpy_helper.from_array(result, name))
        found = True
    if found:
        kept = onnx.GraphProto(node=left)
        del proto.graph.node[:]
        proto.graph.node.extend(kept.node)
    return found


def _result(
    node: onnx.NodeProto,
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, np.ndarray],
    opsets: Iterable[onnx.OperatorSetIdProto],
) -> np.ndarray | None:
    """What a node of shape arithmetic computes, or None when it is none or not all is known."""
    if node.op_type in ("Shape", "Size"):
        sizes = shapes.get(node.input[0])
        if sizes is None:
            return None
        if node.op_type == "Size":
            return np.array(math.prod(sizes), np.int64)
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        return np.array(sizes[ends.get("start", 0) : ends.get("end", len(sizes))], np.int64)
    if node.op_type == "Constant":
        numbers = next((a for a in node.attribute if a.name in ("value_int", "value_ints")), None)
        if numbers is not None:
            return np.array(numbers.i if numbers.name == "value_int" else list(numbers.ints), np.int64)
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is None or value.data_location == onnx.TensorProto.EXTERNAL:
            return None
        if math.prod(value.dims) > _MAX_ELEMENTS or value.data_type not in _ARITHMETIC_TYPES:
            return None
        return onnx.numpy_helper.to_array(value)
    if node.op_type not in _ARITHMETIC or not node.input or any(name not in known for name in node.input):
        return None
    from onnx.reference import ReferenceEvaluator

    names = dict.fromkeys(node.input)
    single = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "one",
            [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names],
            [onnx.helper.make_value_info(node.output[0], onnx.TypeProto())],
        ),
        opset_imports=list(opsets),
    )
    try:
        results: Any = ReferenceEvaluator(single).run(None, {name: known[name] for name in names})
    except (RuntimeError, ValueError, TypeError, IndexError):
        # An ill-formed shape computation: the runtime will say so when the model is run.
        return None
    return np.asarray(results[0])

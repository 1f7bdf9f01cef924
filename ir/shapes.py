"""Static shapes of a model's values once its dynamic dimensions have sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor

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


def static_shapes(model: Model, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the main graph's values, by name, as far as they can be found.

    onnx's shape inference stops where a size is computed from another shape through an operator it
    does not evaluate (a ``Range`` over a sequence length, say): such arithmetic is evaluated here,
    with onnx's reference operators, and inference goes on.

    Args:
        model: it is not changed.
        dims: sizes of dynamic input dimensions by name; each other one counts as 1.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    copy = model.ir.clone()
    for node in copy.graph:
        for value in node.outputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                d if isinstance(d, int) else dims.get(str(d.value), 1) for d in value.shape
            )
    for value in copy.graph.outputs:
        value.shape = None
    known: dict[ir.Value, np.ndarray] = {}
    # Arithmetic on the inputs' shapes first: it often is all there is, and inference is the slow part.
    _evaluate(copy, known)
    for _ in range(_MAX_ROUNDS):
        try:
            ShapeInferencePass()(copy)
        except (RuntimeError, ValueError, TypeError, KeyError):
            # A model that shape inference cannot read has the shapes that it declares.
            break
        if not _evaluate(copy, known):
            break
    return {
        str(value.name): tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
        for node in copy.graph
        for value in node.outputs
        if value.shape is not None and value.shape.is_static()
    }


def _evaluate(model: ir.Model, known: dict[ir.Value, np.ndarray]) -> bool:
    """Evaluate shape arithmetic in place; whether something new became constant."""
    found = False
    for node in list(model.graph):
        if (
            node.domain
            or len(node.outputs) != 1
            or node.outputs[0] in known
            or node.outputs[0].is_graph_output()
        ):
            continue
        result = _result(model, node, known)
        if result is None or result.size > _MAX_ELEMENTS:
            continue
        output = node.outputs[0]
        known[output] = result
        constant = ir.val(
            f"{output.name}.static", const_value=ir.tensor(result, name=f"{output.name}.static")
        )
        constant.type, constant.shape = ir.TensorType(constant.const_value.dtype), ir.Shape(result.shape)  # type: ignore[union-attr]
        model.graph.register_initializer(constant)
        known[constant] = result
        output.replace_all_uses_with(constant)
        found = True
    return found


def _result(model: ir.Model, node: ir.Node, known: dict[ir.Value, np.ndarray]) -> np.ndarray | None:
    """What a node of shape arithmetic computes, or None when it is none or not all is known."""
    if node.op_type in ("Shape", "Size"):
        source = node.inputs[0]
        if source is None or source.shape is None or not source.shape.is_static():
            return None
        shape = np.array([int(d) for d in source.shape], np.int64)  # type: ignore[arg-type]
        if node.op_type == "Size":
            return np.array(np.prod(shape), np.int64)
        ends = {name: int(attr.as_int()) for name, attr in node.attributes.items()}
        return shape[ends.get("start", 0) : ends.get("end", len(shape))]
    if node.op_type not in _ARITHMETIC or not node.inputs:
        return None
    inputs: list[np.ndarray] = []
    for value in node.inputs:
        if value is None:
            return None
        array = known.get(value)
        if array is None:
            tensor = constant_tensor(value)
            if tensor is None or tensor.size > _MAX_ELEMENTS:
                return None
            array = tensor.numpy()
        inputs.append(array)
    from onnx.reference import ReferenceEvaluator

    names = [f"i{i}" for i in range(len(inputs))]
    attributes = [ir.to_proto(a) for a in node.attributes.values()]
    proto = onnx.NodeProto(op_type=node.op_type, input=names, output=["o"], attribute=attributes)
    single = onnx.helper.make_model(
        onnx.helper.make_graph(
            [proto],
            "one",
            [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in names],
            [onnx.helper.make_value_info("o", onnx.TypeProto())],
        ),
        opset_imports=[onnx.helper.make_opsetid("", model.opset_imports.get("", 0))],
    )
    try:
        results: Any = ReferenceEvaluator(single).run(None, dict(zip(names, inputs, strict=True)))
        return np.asarray(results[0])
    except (RuntimeError, ValueError, TypeError, IndexError):
        # An ill-formed shape computation: the runtime will say so when the model is run.
        return None

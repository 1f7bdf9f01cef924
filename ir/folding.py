"""What a runtime works out once when it loads a model: nodes that read nothing but constants."""

from __future__ import annotations

import math

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor

# Runtimes leave these to their kernels, which read the narrow weights.
_KEPT = ("DequantizeLinear", "QuantizeLinear")

# No inputs, and another result at every run; a Constant is a weight already.
_SOURCES = ("Constant", "RandomNormal", "RandomUniform")


def folded_bytes(model: Model) -> int:
    """Bytes of all the values that are worked out when a runtime with constant folding loads the model.

    ONNX Runtime holds every step of the way until it has folded the whole graph, so that this is what loading
    takes beside the weights themselves. Subgraphs and bodies of functions are not counted.
    """
    known: dict[ir.Value, tuple[int, int]] = {}
    total = 0
    for node in model.graph:
        if node.op_type in (*_KEPT, *_SOURCES) or not node.inputs:
            continue
        inputs = [_stored(value, known) for value in node.inputs if value is not None]
        if not inputs or None in inputs or any(attr.type in _GRAPHS for attr in node.attributes.values()):
            continue
        result = _result(node, [item for item in inputs if item is not None])
        for value in node.outputs:
            known[value] = result
            total += result[0] * result[1] // 8
    return total


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _stored(value: ir.Value, known: dict[ir.Value, tuple[int, int]]) -> tuple[int, int] | None:
    """Elements and bits each of a value that is constant, or None."""
    tensor = None if value.is_graph_input() else constant_tensor(value)
    if tensor is not None:
        return tensor.size, tensor.dtype.bitwidth
    return known.get(value)


def _result(node: ir.Node, inputs: list[tuple[int, int]]) -> tuple[int, int]:
    """Elements and bits each of what a node makes of constants, given theirs."""
    (size, bits), others = inputs[0], inputs[1:]
    if node.op_type == "Cast":
        return size, ir.DataType(node.attributes["to"].as_int()).bitwidth
    if node.op_type == "Gather":
        tensor = constant_tensor(node.inputs[0])
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        length = tensor.shape.numpy()[axis] if tensor is not None and len(tensor.shape) else 1
        return others[0][0] * (size // max(1, length)), bits
    if node.op_type in ("Expand", "ConstantOfShape"):
        shape = constant_tensor(node.inputs[-1])
        if shape is not None:
            value = node.attributes["value"].as_tensor() if "value" in node.attributes else None
            width = bits if node.op_type == "Expand" else 32 if value is None else value.dtype.bitwidth
            return math.prod(int(n) for n in shape.numpy()), width
    if node.op_type in ("ScatterElements", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze"):
        return size, bits
    return max(size, *(count for count, _ in others), 0), bits

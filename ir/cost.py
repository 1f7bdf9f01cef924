"""Bytes, parameters and multiply-adds of every node."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe
from effic.ir.shapes import static_shapes

_INTEGER = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", *_INTEGER)

# Inputs that describe an encoded weight (scales, zero points): bytes, but no parameters.
_METADATA_INPUTS = {
    "DequantizeLinear": (1, 2),
    "QuantizeLinear": (1, 2),
    "MatMulNBits": (2, 3),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulIntegerToFloat": (3, 5),
}


@dataclasses.dataclass
class NodeCost:
    """What one node costs.

    Attributes:
        name: operator and node name.
        op_type: the operator.
        macs: multiply-adds of one run, or None when its shapes are unknown.
        weight_bytes: bytes of the constants first read by this node (a shared one counts once).
        parameters: elements of those constants, scales and zero points left out.
    """

    name: str
    op_type: str
    macs: int | None
    weight_bytes: int
    parameters: int


@dataclasses.dataclass
class ModelCost:
    """What a model costs.

    Attributes:
        weight_bytes: bytes of all constants as stored, each once.
        parameters: elements of all floating or quantized weights, each once.
        nodes: nodes in all graphs, Constant nodes left out.
        macs: multiply-adds of one run of the main graph.
        macs_unknown: nodes that multiply but whose shapes, or (in subgraphs and functions) number of
            runs, are unknown; ``macs`` lacks them.
        dims: the sizes of dynamic dimensions that ``macs`` holds for.
        ops: how often each operator occurs.
        per_node: cost of each node, in order.
        shapes: shapes that had to be inferred, by value name (None: not found); hand it to the next count of the
            same model, since inference costs more than counting.
    """

    weight_bytes: int
    parameters: int
    nodes: int
    macs: int
    macs_unknown: int
    dims: dict[str, int]
    ops: dict[str, int]
    per_node: list[NodeCost]
    shapes: dict[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of the totals."""
        left_out = ("per_node", "shapes")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}


def weight_bytes(model: Model) -> int:
    """Bytes of all constants as stored: initializers and tensors in Constant nodes."""
    total = 0
    for graph in model.graphs():
        total += sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
    for node in model.nodes("Constant"):
        tensor = constant_tensor(node.outputs[0])
        total += tensor.nbytes if tensor is not None else 0
    return total


def model_cost(
    model: Model,
    dims: Mapping[str, int] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...] | None] | None = None,
) -> ModelCost:
    """Count a model's costs.

    Args:
        model: the model; it is not changed.
        dims: sizes of dynamic dimensions by name; each other one counts as 1.
        shapes: what an earlier count of the model, with the same ``dims``, inferred.
    """
    known = _Shapes(model, dims or {}, shapes or {})
    seen: set[int] = set()
    per_node: list[NodeCost] = []
    ops: dict[str, int] = {}
    macs = unknown = 0
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "Constant":
                continue
            label = node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
            ops[label] = ops.get(label, 0) + 1
            nbytes = parameters = 0
            for index, value in enumerate(node.inputs):
                tensor = constant_tensor(value)
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                nbytes += tensor.nbytes
                if index not in _METADATA_INPUTS.get(node.op_type, ()) and _is_weight(tensor):
                    parameters += _elements(node, index, tensor)
            # How often a subgraph or a function runs is not known: what multiplies there is unknown.
            inner = None if node.op_type in _MULTIPLY else 0
            count = _macs(node, known) if graph is model.graph else inner
            if count is None:
                unknown += 1
            else:
                macs += count
            per_node.append(NodeCost(describe(node), label, count, nbytes, parameters))
    return ModelCost(
        weight_bytes=weight_bytes(model),
        parameters=sum(n.parameters for n in per_node),
        nodes=len(per_node),
        macs=macs,
        macs_unknown=unknown,
        dims=known.dims,
        ops=dict(sorted(ops.items(), key=lambda item: -item[1])),
        per_node=per_node,
        shapes=known.inferred,
    )


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8


def _elements(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> int:
    if node.op_type == "MatMulNBits" and index == 1:
        # Codes are packed into bytes: the operator's own K and N say how many there are.
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    return tensor.size


class _Shapes:
    """Static shapes of values, inferred on a copy only when the model does not carry them."""

    def __init__(
        self, model: Model, dims: Mapping[str, int], inferred: Mapping[str, tuple[int, ...] | None]
    ) -> None:
        self._model = model
        self._done = False
        self.inferred: dict[str, tuple[int, ...] | None] = dict(inferred)
        self.dims: dict[str, int] = {}
        for value in model.graph.inputs:
            for dim in value.shape or ():
                if not isinstance(dim, int) and dim.value:
                    self.dims[str(dim.value)] = dims.get(str(dim.value), 1)

    def of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        tensor = constant_tensor(value)
        shape = tensor.shape if tensor is not None else value.shape
        if shape is not None:
            sizes = [d if isinstance(d, int) else self.dims.get(str(d.value)) for d in shape]
            if None not in sizes:
                return tuple(s for s in sizes if s is not None)
        name = value.name or ""
        if name not in self.inferred and not self._done:
            self._done = True
            self.inferred.update(self._infer())
        # A shape that inference does not find is not looked for again.
        return self.inferred.setdefault(name, None)

    def _infer(self) -> dict[str, tuple[int, ...]]:
        return static_shapes(self._model, self.dims)


def _macs(node: ir.Node, shapes: _Shapes) -> int | None:
    """Multiply-adds of one node; 0 for operators that do not multiply matrices."""
    op = node.op_type
    if op in ("Conv", "ConvTranspose"):
        weight = shapes.of(node.inputs[1])
        # Each output of a Conv, and each input of a ConvTranspose, meets one filter.
        spatial = shapes.of(node.outputs[0] if op == "Conv" else node.inputs[0])
        if weight is None or spatial is None:
            return None
        return math.prod(spatial) * math.prod(weight[1:])
    if op in ("MatMul", "Gemm"):
        left, out = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
        if left is None or out is None or not left:
            return None
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int() == 1
        return math.prod(out) * left[0 if transposed else -1]
    if op in _INTEGER:
        left, weight = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
        return None if left is None or weight is None else math.prod(left) * weight[-1]
    if op == "MatMulNBits":
        out = shapes.of(node.outputs[0])
        left = shapes.of(node.inputs[0])
        k, n = node.attributes["K"].as_int(), node.attributes["N"].as_int()
        rows = out[:-1] if out is not None else left[:-1] if left is not None else None
        return None if rows is None else math.prod(rows) * k * n
    return 0

"""Shapes of values, inferred once per use without touching the model."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from effic.ir.model import Model
from effic.passes.cleanup.scopes import subgraphs_of

Dim = int | str | None
"""A dimension: its size, the name of a size fixed at run time, or None when nothing is known."""
Dims = tuple[Dim, ...]

# Shape arguments are shorter than this; larger constants are weights, of which inference needs
# the shape only.
DATA_BYTES = 1024


class Shapes:
    """What is known of shapes and types of a model's values.

    The values' own annotations come first; the rest is inferred by onnx (with data propagation)
    at the first question about a value that has none. The model is not changed, and it may change
    after the inference: new values are unknown then.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._inferred: dict[ir.Value, tuple[int, Dims | None]] | None = None

    def dims(self, value: ir.Value | None, *, infer: bool = True) -> Dims | None:
        """The dimensions of a value, or None when not even its rank is known."""
        if value is None:
            return None
        own = declared_dims(value)
        if own is not None and (not infer or None not in own):
            return own
        if infer:
            inferred = self.table().get(value)
            if inferred is not None and inferred[1] is not None:
                return inferred[1]
        return own

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type of a value, or None."""
        if value is None:
            return None
        if value.dtype is not None:
            return value.dtype
        inferred = self.table().get(value)
        return None if inferred is None or not inferred[0] else ir.DataType(inferred[0])

    def table(self) -> Mapping[ir.Value, tuple[int, Dims | None]]:
        """Every inferred value with its element type (0: unknown) and dimensions."""
        if self._inferred is None:
            self._inferred = _infer(self._model)
        return self._inferred


def declared_dims(value: ir.Value) -> Dims | None:
    """The dimensions written at the value itself.

    Names of an output's dimensions are left out: they are what an exporter's user called them, and
    no runtime checks that the same name means the same size there.
    """
    if value.shape is None:
        return None
    if value.is_graph_output():
        return tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _has_shape(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.shape is not None


def _infer(model: Model) -> dict[ir.Value, tuple[int, Dims | None]]:
    proto = onnx.ModelProto(ir_version=model.ir.ir_version)
    for domain, version in model.ir.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.ir.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    skeleton = _Skeleton(proto.graph)
    skeleton.fill(proto.graph, model.graph)
    try:
        result = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        # Too large for the library, or malformed in its eyes: then only what is declared is known.
        return {}
    found: dict[ir.Value, tuple[int, Dims | None]] = {}
    _collect(result.graph, model.graph, found)
    return found


class _Skeleton:
    """Builds the proto that inference sees: the graph with shapes instead of weights."""

    def __init__(self, main: onnx.GraphProto) -> None:
        self.main = main
        self.weights: dict[str, bytes] = {}

    def fill(self, proto: onnx.GraphProto, graph: ir.Graph) -> None:
        proto.name = graph.name or "graph"
        for value in graph.inputs:
            ir.serde.serialize_value_into(proto.input.add(), value)
        for value in graph.initializers.values():
            self._initializer(proto, value)
        for node in graph:
            if subgraphs_of(node):
                self._node_with_graphs(proto.node.add(), node)
            else:
                ir.serde.serialize_node_into(proto.node.add(), node)
            for value in node.outputs:
                if value.name and value.type is not None and value.shape is not None:
                    ir.serde.serialize_value_into(proto.value_info.add(), value)
        for value in graph.outputs:
            ir.serde.serialize_value_into(proto.output.add(), value)
            for dim in proto.output[-1].type.tensor_type.shape.dim if _has_shape(value) else ():
                if dim.HasField("dim_param"):
                    dim.Clear()

    def _initializer(self, proto: onnx.GraphProto, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is None or not value.name:
            return
        if tensor.nbytes <= DATA_BYTES:
            proto.initializer.append(ir.serde.serialize_tensor(tensor))
            proto.initializer[-1].name = value.name
            return
        if value.is_graph_input():
            return
        info = onnx.helper.make_tensor_value_info(value.name, int(tensor.dtype), list(tensor.shape.numpy()))
        text = info.SerializeToString()
        known = self.weights.get(value.name)
        if known is None:
            # An input of the main graph is visible everywhere inside, as an initializer would be.
            self.weights[value.name] = text
            self.main.input.append(info)
        elif known != text:
            # The same name elsewhere with another shape: inference must see the real thing.
            proto.initializer.append(ir.serde.serialize_tensor(tensor))
            proto.initializer[-1].name = value.name

    def _node_with_graphs(self, proto: onnx.NodeProto, node: ir.Node) -> None:
        proto.op_type, proto.domain, proto.name = node.op_type, node.domain, node.name or ""
        proto.input.extend("" if value is None else value.name or "" for value in node.inputs)
        proto.output.extend(value.name or "" for value in node.outputs)
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
                entry = proto.attribute.add(name=attr.name, type=onnx.AttributeProto.GRAPH)
                self.fill(entry.g, attr.as_graph())
            elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
                entry = proto.attribute.add(name=attr.name, type=onnx.AttributeProto.GRAPHS)
                for graph in attr.as_graphs():
                    self.fill(entry.graphs.add(), graph)
            else:
                proto.attribute.append(ir.serde.serialize_attribute(attr))


def _collect(proto: onnx.GraphProto, graph: ir.Graph, found: dict[ir.Value, tuple[int, Dims | None]]) -> None:
    types = {info.name: info.type for part in (proto.value_info, proto.output) for info in part}
    for entry, node in zip(proto.node, graph, strict=True):
        for value in node.outputs:
            kind = types.get(value.name or "")
            if kind is not None and kind.HasField("tensor_type"):
                found[value] = (kind.tensor_type.elem_type, _dims(kind.tensor_type))
        graphs = subgraphs_of(node)
        if graphs:
            protos = [attr.g for attr in entry.attribute if attr.type == onnx.AttributeProto.GRAPH]
            protos += [g for attr in entry.attribute for g in attr.graphs]
            for sub_proto, sub in zip(protos, graphs, strict=True):
                _collect(sub_proto, sub, found)


def _dims(tensor: onnx.TypeProto.Tensor) -> Dims | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim
    )

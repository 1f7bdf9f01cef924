"""Operators that ONNX defines by others, written out where there is no converter for them.

The definitions come with the ``onnx`` package: the body of ``Shrink`` is some simple operators, that of
``Attention`` some forty, chosen by the types and shapes of the node's inputs.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from effic.ir.errors import InvalidModelError
from effic.ir.model import ONNX_DOMAINS, Model

_DOMAIN = "effic.expanded"


def expand(model: Model, nodes: list[ir.Node]) -> bool:
    """Replace nodes by what ONNX says they are, in place; whether any could be.

    Args:
        model: its values have types, and shapes where they are known.
        nodes: of the main graph.
    """
    written: list[ir.Node] = []
    for node in nodes:
        body = _definition(node, node.version or model.opset)
        if body is None:
            continue
        body.domain, body.name = _DOMAIN, f"{node.op_type}_{len(written)}"
        function = ir.serde.deserialize_function(body)
        function.opset_imports[""] = model.opset
        model.ir.functions[function.identifier()] = function
        node.domain, node.op_type = _DOMAIN, body.name
        written.append(node)
    if not written:
        return False
    model.ir.opset_imports[_DOMAIN] = 1
    InlinePass()(model.ir)
    model.ir.opset_imports.pop(_DOMAIN, None)
    model.forget_names()
    return True


def _definition(node: ir.Node, opset: int) -> onnx.FunctionProto | None:
    if node.domain not in ONNX_DOMAINS or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    try:
        # onnx's stubs leave out what schemas know of function bodies.
        schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    body = onnx.FunctionProto()
    if schema.has_function:
        version = max((v for v in schema.function_opset_versions if v <= opset), default=None)
        if version is None:
            return None
        body.ParseFromString(schema.get_function_with_opset_version(version))
    elif schema.has_context_dependent_function:
        version = max(
            (v for v in schema.context_dependent_function_opset_versions if v <= opset), default=None
        )
        types = _input_types(node)
        if version is None or types is None:
            return None
        proto = ir.to_proto(node).SerializeToString()
        body.ParseFromString(schema.get_context_dependent_function_with_opset_version(version, proto, types))
    else:
        return None
    made = {name for inner in body.node for name in inner.output} | set(body.input)
    # The definition lists outputs that the node has not, and does not compute them.
    named = [index for index, value in enumerate(node.outputs) if value.name]
    del body.output[max(named, default=0) + 1 :]
    for index, name in enumerate(body.output):
        if name not in made and index in named:
            return None
        if name not in made:  # left out between others: anything will do in its place
            body.node.append(onnx.helper.make_node("Identity", [body.input[0]], [name]))
    # The definition takes attributes by reference: those that the node leaves out have their defaults.
    for name, default in schema.attributes.items():
        if name not in node.attributes and default.default_value.type:
            attribute = ir.from_proto(default.default_value)
            assert isinstance(attribute, ir.Attr)
            node.attributes[name] = attribute
    return body


def _input_types(node: ir.Node) -> list[bytes] | None:
    found = []
    for value in node.inputs:
        proto = onnx.TypeProto()
        if value is not None:
            if value.type is None:
                return None
            written = ir.to_proto(value)
            if not isinstance(written, onnx.ValueInfoProto):
                raise InvalidModelError(f"the value '{value.name}' cannot be written as ONNX")
            proto = written.type
        found.append(proto.SerializeToString())
    return found

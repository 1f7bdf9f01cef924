"""Structural checks: what every model has to satisfy between two passes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from effic.ir.errors import CheckFailedError
from effic.ir.model import Model, describe
from effic.ir.onnx_checks import schema_of
from effic.ir.topology import neighbourhood, subgraphs


def verify(model: Model, what: str = "the model") -> None:
    """Check the structure of every graph.

    Args:
        model: the model.
        what: how the message names it (``"after fuse-conv-bn, the model"``).

    Raises:
        CheckFailedError: with the first problem and the neighbourhood of the node.
    """
    for problem, node in problems(model):
        text = f"{what} is not valid: {problem}"
        raise CheckFailedError(text if node is None else f"{text}\n{neighbourhood(node)}")


def signature(model: Model) -> list[tuple[str, str, str, str]]:
    """Names, types and shapes of the inputs and outputs: what no pass may change."""
    rows = []
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            rows.append((kind, str(value.name), str(value.dtype), str(value.shape)))
    return rows


def required_signature(
    model: Model, before: list[tuple[str, str, str, str]]
) -> list[tuple[str, str, str, str]]:
    """The signature without the optional inputs that were not there ``before``.

    An input is optional when it has a default value: an initializer of its name.
    """
    optional = {str(v.name) for v in model.graph.inputs if v.is_initializer()}
    known = set(before)
    return [row for row in signature(model) if row in known or row[0] != "input" or row[1] not in optional]


def problems(model: Model) -> Iterator[tuple[str, ir.Node | None]]:
    """Every structural problem, each with the node it belongs to (or None)."""
    functions = {(f.domain, f.name) for f in model.ir.functions.values()}
    yield from _graph_problems(model.graph, {}, model.ir.opset_imports, functions)
    for function in model.ir.functions.values():
        yield from _graph_problems(function.graph, {}, function.opset_imports, functions)


def _graph_problems(
    graph: ir.Graph,
    outer: dict[str, ir.Value],
    opsets: dict[str, int],
    functions: set[tuple[str, str]],
) -> Iterator[tuple[str, ir.Node | None]]:
    # Subgraphs see outer values by name: one dictionary, added to on the way in and restored.
    scope = outer
    added: list[str] = []

    def define(value: ir.Value) -> str | None:
        if not value.name:
            return "a value has no name"
        known = scope.get(value.name)
        if known is not None and known is not value:
            return f"two values are called '{value.name}'"
        if known is None:
            scope[value.name] = value
            added.append(value.name)
        return None

    for value in (*graph.inputs, *graph.initializers.values()):
        if problem := define(value):
            yield problem, None
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            yield f"initializer '{name}' has no data", None
        elif value.shape is not None and tuple(value.shape) != tuple(tensor.shape):
            yield f"initializer '{name}' has the shape {tensor.shape} but is declared {value.shape}", None
        elif value.dtype is not None and value.dtype != tensor.dtype:
            yield f"initializer '{name}' has the type {tensor.dtype} but is declared {value.dtype}", None
    for node in graph:
        for read in node.inputs:
            if read is not None and scope.get(read.name or "") is not read:
                yield f"{describe(node)} reads '{read.name}', which nothing before it makes", node
        if problem := _operator_problem(node, opsets, functions):
            yield problem, node
        for inner in subgraphs(node):
            yield from _graph_problems(inner, scope, opsets, functions)
        for value in node.outputs:
            # An empty name marks an optional output that is not produced.
            if value.name and (problem := define(value)):
                yield f"{describe(node)}: {problem}", node
    for value in graph.outputs:
        if scope.get(value.name or "") is not value:
            yield f"nothing makes the graph output '{value.name}'", None
    if len({id(v) for v in graph.outputs}) != len(graph.outputs):
        yield "a value is listed twice among the graph outputs", None
    for name in added:
        del scope[name]


def _operator_problem(node: ir.Node, opsets: dict[str, int], functions: set[tuple[str, str]]) -> str | None:
    if (node.domain, node.op_type) in functions:
        return None
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain not in opsets:
        return f"{describe(node)} is of the domain '{domain}', which the model does not import"
    if domain != "":
        return None
    schema = schema_of(node.op_type, opsets[domain])
    if schema is None:
        return f"{describe(node)}: opset {opsets[domain]} has no operator {node.op_type}"
    given = len(node.inputs)
    if not schema.min_input <= given <= schema.max_input:
        return f"{describe(node)} has {given} inputs, {schema.min_input} to {schema.max_input} are allowed"
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        return f"{describe(node)} has {len(node.outputs)} outputs, at most {schema.max_output} are allowed"
    for name in node.attributes:
        if name not in schema.attributes:
            return f"{describe(node)} has the attribute '{name}', unknown at opset {opsets[domain]}"
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            return f"{describe(node)} lacks the attribute '{name}'"
    return None

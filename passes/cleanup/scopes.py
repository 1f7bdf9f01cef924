"""Graphs with what a rewrite must know about the place they are in, and removal that cascades."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model


@dataclass(frozen=True, eq=False)
class Scope:
    """One graph of a model.

    Attributes:
        graph: the main graph, a subgraph, or the body of a function.
        opset: version of the standard operators that holds inside it.
        opset_imports: all domains and versions that hold inside it.
        in_function: whether it is a function body or lies inside one (no initializers there).
        ancestors: the graphs around it, outermost first: their values are visible inside.
    """

    graph: ir.Graph
    opset: int
    opset_imports: dict[str, int]
    in_function: bool
    ancestors: tuple[ir.Graph, ...]


def scopes(model: Model) -> list[Scope]:
    """Every graph of the model, each after the graphs around it."""
    found: list[Scope] = []

    def enter(root: ir.Graph, imports: dict[str, int], in_function: bool) -> None:
        opset = imports.get("", imports.get("ai.onnx", 0))
        stack: list[tuple[ir.Graph, tuple[ir.Graph, ...]]] = [(root, ())]
        while stack:
            graph, ancestors = stack.pop()
            found.append(Scope(graph, opset, dict(imports), in_function, ancestors))
            inner = [sub for node in graph for sub in subgraphs_of(node)]
            stack.extend((sub, (*ancestors, graph)) for sub in reversed(inner))

    enter(model.graph, dict(model.ir.opset_imports), False)
    for function in model.ir.functions.values():
        # A function may leave out what the model imports.
        enter(function.graph, {**model.ir.opset_imports, **function.opset_imports}, True)
    return found


def subgraphs_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs a node carries in its attributes (If, Loop, Scan, SequenceMap)."""
    found: list[ir.Graph] = []
    if not len(node.attributes):
        # Asked of every node many times; half of them have no attributes.
        return found
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            found.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
            found.extend(attr.as_graphs())
    return found


def is_standard(node: ir.Node) -> bool:
    """Whether the node's operator is one of the ONNX standard."""
    return node.domain in ONNX_DOMAINS


def is_unused(node: ir.Node) -> bool:
    """Whether nothing reads any output of the node."""
    return not any(output.uses() or output.is_graph_output() for output in node.outputs)


def detach(node: ir.Node) -> list[ir.Value]:
    """Take a node nothing reads out of its graph, and let go of what it and its subgraphs read.

    Returns:
        The values it read; they may have no reader left.
    """
    fed = [value for value in node.inputs if value is not None]
    for graph in subgraphs_of(node):
        graph.outputs.clear()
        for inner in list(graph.all_nodes()):
            fed += [value for value in inner.inputs if value is not None]
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    return fed


def prune(start: Iterable[ir.Node | None]) -> int:
    """Remove the nodes of ``start`` that nothing reads, then whatever fed only them.

    Initializers that lose their last reader go as well, unless they are graph inputs or outputs.

    Returns:
        Number of nodes removed.
    """
    count = 0
    stack = [node for node in start if node is not None]
    while stack:
        node = stack.pop()
        if node.graph is None or not is_unused(node):
            continue
        count += 1
        for value in detach(node):
            producer = value.producer()
            if producer is not None:
                stack.append(producer)
            else:
                drop_unused_initializer(value)
    return count


def drop_unused_initializer(value: ir.Value) -> bool:
    """Remove an initializer that nothing reads; graph inputs and outputs stay."""
    if not value.is_initializer() or value.uses() or value.is_graph_output() or value.is_graph_input():
        return False
    graph = value.graph
    if graph is None or value.name is None:
        return False
    graph.initializers.pop(value.name)
    return True


def int_attribute(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute, its default when absent, None when it refers to a function's attribute."""
    attr = node.attributes.get(name)
    if attr is None:
        return default
    return None if attr.is_ref() else attr.as_int()


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An integer-list attribute, or None when absent or referring to a function's attribute."""
    attr = node.attributes.get(name)
    return None if attr is None or attr.is_ref() else tuple(attr.as_ints())


def has_reference(node: ir.Node) -> bool:
    """Whether an attribute's value is only known where the function around the node is called."""
    return any(attr.is_ref() for attr in node.attributes.values())

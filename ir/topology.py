"""networkx views of a graph: who feeds whom, order, dominators, neighbourhoods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from effic.ir.model import describe

if TYPE_CHECKING:
    import networkx as nx

# networkx is imported in the functions that use it: it takes a tenth of a second, and every
# structural check imports this module.


def digraph(graph: ir.Graph) -> nx.DiGraph:
    """Nodes of one graph and the values between them.

    A node that contains a subgraph also depends on what the subgraph captures from outside.

    Returns:
        A directed graph over ``onnx_ir.Node`` objects; an edge carries ``values``, the names of
        the values that flow along it.
    """
    import networkx as nx

    result: nx.DiGraph = nx.DiGraph()
    for node in graph:
        result.add_node(node)
    for node in graph:
        for value in read_values(node):
            producer = value.producer()
            if producer is None or producer.graph is not graph or producer is node:
                continue
            if result.has_edge(producer, node):
                result.edges[producer, node]["values"].append(value.name)
            else:
                result.add_edge(producer, node, values=[value.name])
    return result


def read_values(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads: its inputs and what its subgraphs capture from outside."""
    for value in node.inputs:
        if value is not None:
            yield value
    for inner in subgraphs(node):
        own = {id(v) for v in inner.inputs} | {id(v) for v in inner.initializers.values()}
        own.update(id(v) for n in inner for v in n.outputs)
        for inner_node in inner:
            for value in read_values(inner_node):
                if id(value) not in own:
                    yield value
        for output in inner.outputs:
            if id(output) not in own:
                yield output


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs a node holds as attributes (the branches of If, the body of Loop and Scan)."""
    graphs: list[ir.Graph] = []
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            graphs.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            graphs.extend(attr.as_graphs())
    return graphs


def order(graph: ir.Graph) -> list[ir.Node]:
    """The nodes in an order in which each comes after what it reads.

    Raises:
        networkx.NetworkXUnfeasible: the graph has a cycle.
    """
    import networkx as nx

    return list(nx.topological_sort(digraph(graph)))


def immediate_dominators(graph: ir.Graph, start: ir.Node) -> dict[ir.Node, ir.Node]:
    """For each node reachable from ``start``, the last node every path to it runs through."""
    import networkx as nx

    return dict(nx.immediate_dominators(digraph(graph), start))


def region(graph: ir.Graph, start: ir.Node, end: ir.Node) -> set[ir.Node]:
    """The nodes that lie on some path from ``start`` to ``end``, both included."""
    import networkx as nx

    view = digraph(graph)
    after, before = nx.descendants(view, start), nx.ancestors(view, end)
    return ({start} | set(after)) & ({end} | set(before))


def neighbourhood(node: ir.Node, limit: int = 6) -> str:
    """The node with what it reads and who reads it, one line each, for error messages."""
    lines = [f"  > {_line(node)}"]
    before = [v.producer() for v in node.inputs if v is not None]
    lines[:0] = [f"    {_line(n)}" for n in before if n is not None][:limit]
    after = [use.node for v in node.outputs for use in v.uses()]
    lines.extend(f"    {_line(n)}" for n in after[:limit])
    return "\n".join(lines)


def _line(node: ir.Node) -> str:
    reads = ", ".join("-" if v is None else str(v.name) for v in node.inputs)
    makes = ", ".join(str(v.name) for v in node.outputs)
    return f"{describe(node)}: ({reads}) -> ({makes})"

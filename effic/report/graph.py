"""A model's graph as a page can draw it: nodes, who feeds whom, and what each holds."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from effic.ir.cost import ModelCost
from effic.ir.model import Model, constant_tensor, describe
from effic.ir.topology import read_values, subgraphs
from effic.show import dtype_text

_CONSTANTS = 6
"""Constants of a node that are named; a node that concatenates a hundred of them is told by its count."""


def graph_of(model: Model, cost: ModelCost) -> dict[str, Any]:
    """Nodes and edges of the main graph.

    Returns:
        ``nodes``: rows of name, operator, constants (texts), bytes of weights, multiply-adds, kind
        (``node``, ``input``, ``output``); ``edges``: rows of producer, reader (numbers of nodes), value's name
        and shape; ``hidden``: nodes in subgraphs and functions, which are not among them.
    """
    nodes: list[list[Any]] = []
    edges: list[list[Any]] = []
    made: dict[int, int] = {}
    costs = {node.name: node for node in cost.per_node}
    graph = model.graph
    for value in graph.inputs:
        if constant_tensor(value) is None:
            made[id(value)] = len(nodes)
            nodes.append([value.name or "?", "input", [], 0, None, "input"])
    drawn = [node for node in graph if node.op_type != "Constant"]
    numbers = {}
    for node in drawn:
        numbers[id(node)] = len(nodes)
        spent = costs.get(describe(node))
        nodes.append(
            [
                node_name(node),
                node.op_type,
                _constants(node),
                0 if spent is None else spent.weight_bytes,
                None if spent is None else spent.macs,
                "node",
            ]
        )
        for output in node.outputs:
            made[id(output)] = numbers[id(node)]
    for node in drawn:
        seen = set()
        for value in read_values(node):
            if id(value) in made and id(value) not in seen:
                seen.add(id(value))
                edges.append([made[id(value)], numbers[id(node)], value.name or "?", _type(value)])
    for value in graph.outputs:
        if id(value) in made:
            edges.append([made[id(value)], len(nodes), value.name or "?", _type(value)])
            nodes.append([value.name or "?", "output", [], 0, None, "output"])
    return {"nodes": nodes, "edges": edges, "hidden": cost.nodes - len(drawn)}


def node_name(node: ir.Node) -> str:
    """A node's name, or that of its first output."""
    return node.name or (node.outputs[0].name if node.outputs else None) or "?"


def _constants(node: ir.Node) -> list[str]:
    found = []
    for value in node.inputs:
        tensor = constant_tensor(value)
        if value is not None and tensor is not None:
            found.append(f"{value.name} {dtype_text(tensor.dtype)}{list(tensor.shape.numpy())}")
    if len(found) > _CONSTANTS:
        found = [*found[:_CONSTANTS], f"and {len(found) - _CONSTANTS} more constants"]
    inner = len(subgraphs(node))
    return [*found, f"holds {inner} graph{'s' if inner > 1 else ''} of its own"] if inner else found


def _type(value: ir.Value) -> str:
    shape = "" if value.shape is None else str([d if isinstance(d, int) else d.value for d in value.shape])
    return f"{dtype_text(value.dtype)}{shape}".replace("'", "").replace("None", "?")

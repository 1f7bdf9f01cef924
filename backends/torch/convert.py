"""The walk over a graph: each node by its converter, every refusal noted."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.operators import lookup, operator_key
from effic.backends.torch.sizes import propagate
from effic.ir.errors import UnsupportedError
from effic.ir.model import describe

ONNX_NODE = "onnx_node"
"""Key in an fx node's ``meta``: the ONNX node it was made for."""


def convert_nodes(graph: ir.Graph, builder: GraphBuilder) -> None:
    """Emit every node of ``graph`` into the builder's fx graph.

    What cannot be converted is noted in ``builder.store.refusals``, and the walk goes on.
    """
    for node in graph:
        before = next(iter(reversed(builder.graph.nodes)), None)
        _convert(node, builder)
        for made in reversed(builder.graph.nodes):
            if made is before:
                break
            made.meta.setdefault(ONNX_NODE, describe(node))


def _convert(node: ir.Node, builder: GraphBuilder) -> None:
    try:
        if node.op_type == "Constant" and _holds_a_tensor(node):
            return  # made where it is read
        if propagate(node, builder):
            return
        converter = lookup(node)
        if converter is None:
            builder.store.missing.setdefault(operator_key(node), []).append(node)
            _stand_in(node, builder)
            return
        made = converter(OperatorNode(node, builder), builder)
        results = made if isinstance(made, tuple) else (made,)
        for value, result in zip(node.outputs, results, strict=False):
            if result is not None:
                builder.bind(value, result)
    except UnsupportedError as error:
        text = str(error)
        builder.store.refusals.append(text if text.startswith(node.op_type) else f"{describe(node)} {text}")
        _stand_in(node, builder)


def _stand_in(node: ir.Node, builder: GraphBuilder) -> None:
    """Something to go on with: every refusal is collected before the user is told."""
    for value in node.outputs:
        builder.bind(value, builder.call(_refused))


def _refused() -> None:
    """Stands in for what a refused node makes."""


def _holds_a_tensor(node: ir.Node) -> bool:
    return any(
        key in node.attributes for key in ("value", "value_float", "value_floats", "value_int", "value_ints")
    )


def convert_body(graph: ir.Graph, outer: GraphBuilder) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The body of a Loop, Scan or If as a module.

    Returns:
        The module, which takes the body's inputs and then what it reads from outside, and returns a
        tuple; and the fx nodes of the outer graph that make what it reads.
    """
    builder = GraphBuilder(outer.store, outer.opset_imports, outer)
    for index, value in enumerate(graph.inputs):
        builder.bind(value, builder.argument(f"input_{index}"))
    convert_nodes(graph, builder)
    builder.graph.output(tuple(builder.tensor(value) for value in graph.outputs))
    builder.graph.eliminate_dead_code()
    captured = []
    for source, argument in builder.captured.items():
        if argument.users:
            captured.append(source)
        else:
            builder.graph.erase_node(argument)
    return fx.GraphModule({}, builder.graph), captured

"""Structural checks find each kind of damage, and networkx views see the graph."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.errors import CheckFailedError
from effic.ir.model import Model
from effic.ir.topology import digraph, immediate_dominators, neighbourhood, order, region
from effic.ir.verify import problems, verify
from effic.models.builders import BUILDERS

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2] x) => (float[2] y) <float[2] w = {1,2}> {
  [first] a = Add(x, w)
  [left] b = Relu(a)
  [right] c = Neg(a)
  [last] y = Mul(b, c)
}
"""


def make() -> Model:
    return Model(ir.from_onnx_text(TEXT))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_builders_are_valid(name: str) -> None:
    assert list(problems(Model(BUILDERS[name]()))) == []


def undefined(g: ir.Graph) -> None:
    g.remove(g[1])


def order_broken(g: ir.Graph) -> None:
    first = g[0]
    g.remove(first)
    g.append(first)


def no_output(g: ir.Graph) -> None:
    g.outputs[0] = ir.val("ghost", ir.DataType.FLOAT, [2])


def twice(g: ir.Graph) -> None:
    g[1].outputs[0].name = "a"


def unknown_operator(g: ir.Graph) -> None:
    g[1].op_type = "Relo"


def unknown_attribute(g: ir.Graph) -> None:
    g[1].attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)


def missing_attribute(g: ir.Graph) -> None:
    g[1].op_type = "Cast"


def too_few(g: ir.Graph) -> None:
    g[3].resize_inputs(1)


def unknown_domain(g: ir.Graph) -> None:
    g[1].domain = "elsewhere"


def wrong_shape(g: ir.Graph) -> None:
    g.initializers["w"].const_value = ir.tensor(np.ones(3, np.float32), name="w")


def no_data(g: ir.Graph) -> None:
    g.initializers["w"].const_value = None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (undefined, "nothing before it makes"),
        (order_broken, "nothing before it makes"),
        (no_output, "nothing makes the graph output 'ghost'"),
        (twice, "two values are called 'a'"),
        (unknown_operator, "no operator Relo"),
        (unknown_attribute, "attribute 'alpha'"),
        (missing_attribute, "lacks the attribute 'to'"),
        (too_few, "has 1 inputs"),
        (unknown_domain, "does not import"),
        (wrong_shape, "is declared"),
        (no_data, "has no data"),
    ],
)
def test_damage_is_found(damage: Callable[[ir.Graph], None], message: str) -> None:
    model = make()
    damage(model.graph)
    with pytest.raises(CheckFailedError, match=message):
        verify(model)


def test_networkx_views() -> None:
    graph = make().graph
    first, left, right, last = graph
    view = digraph(graph)
    assert set(view.edges) == {(first, left), (first, right), (left, last), (right, last)}
    assert view.edges[first, left]["values"] == ["a"]
    assert order(graph)[0] is first
    assert immediate_dominators(graph, first)[last] is first
    assert region(graph, first, last) == set(graph)
    assert region(graph, left, last) == {left, last}
    assert "> Relu 'left'" in neighbourhood(left)


def test_captured_values_are_edges() -> None:
    graph = Model(BUILDERS["control_flow"]()).graph
    view = digraph(graph)
    holder = next(n for n in graph if n.op_type in ("If", "Loop"))
    assert nx.ancestors(view, holder) or any(v.is_graph_input() for v in holder.inputs if v is not None)

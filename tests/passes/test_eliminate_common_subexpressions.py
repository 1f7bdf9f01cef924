"""eliminate-common-subexpressions: equal nodes and equal bytes, across graphs, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effic.passes.base import Remarks
from effic.passes.cleanup.eliminate_common_subexpressions import EliminateCommonSubexpressions

PASS = EliminateCommonSubexpressions()


def ops(model) -> list[str]:
    return [node.op_type for node in model.nodes(domain=None)]


def test_chains_of_equal_nodes_merge(make_net, check) -> None:
    model = make_net(
        "(float[2,3] x) => (float[2,3] y)",
        """a = Exp(x)  b = Exp(x)  c = LeakyRelu <alpha = 0.5> (a)  d = LeakyRelu <alpha = 0.5> (b)
        e = Add(c, x)  f = Add(x, d)  y = Mul(e, f)""",
    )
    remarks = check(model, PASS)
    assert ops(model) == ["Exp", "LeakyRelu", "Add", "Mul"]
    assert remarks.count("passed") == 3


def test_attributes_tell_nodes_apart(make_net, check) -> None:
    model = make_net(
        "(float[2,3] x) => (float[2,3] y)",
        "a = LeakyRelu <alpha = 0.5> (x)  b = LeakyRelu <alpha = 0.25> (x)"
        "  c = Sub(a, b)  d = Sub(b, a)  y = Mul(c, d)",
    )
    check(model, PASS)
    assert len(ops(model)) == 5


def test_tensor_attributes_compare_by_value(make_net, check) -> None:
    model = make_net(
        "(float[4] x) => (float[4] y)",
        """a = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
        b = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
        c = Constant <value = float[4] {1.0, 2.0, 3.0, 5.0}> ()
        d = Add(x, a)  e = Add(x, b)  g = Add(d, c)  y = Mul(g, e)""",
    )
    check(model, PASS)
    assert ops(model).count("Constant") == 2
    assert ops(model).count("Add") == 2


def test_equal_initializers_merge_bit_for_bit(make_net, check) -> None:
    nan = np.array([np.nan, 0.0], np.float32)
    model = make_net(
        "(float[2] x) => (float[2] y)",
        "a = Add(x, n1)  b = Sub(x, n2)  c = Add(a, z1)  d = Mul(c, z2)  e = Where(t, d, b)  y = Max(e, z3)",
        n1=nan,
        n2=nan.copy(),
        z1=np.array([0.0, 1.0], np.float32),
        z2=np.array([-0.0, 1.0], np.float32),
        z3=np.array([0.0, 1.0], np.float32),
        t=np.array([False, True]),
    )
    check(model, PASS)
    assert set(model.graph.initializers) == {"n1", "z1", "z2", "t"}


@pytest.mark.parametrize("position", [0, 777, 99_999])
def test_large_weights_that_differ_in_one_place_stay_apart(make_net, check, position: int) -> None:
    a = np.zeros(100_000, np.float32)
    b, c = a.copy(), a.copy()
    b[position] = 1
    model = make_net(
        "(float[1] x) => (float[100000] y)", "p = Add(x, a)  q = Add(p, b)  y = Add(q, c)", a=a, b=b, c=c
    )
    check(model, PASS)
    assert set(model.graph.initializers) == {"a", "b"}


def test_subgraphs_use_what_ran_before_them(make_net, check) -> None:
    model = make_net(
        "(bool c, float[4] x) => (float[4] y)",
        """a = Exp(x)
        z = If(c) <then_branch = t () => (float[4] p) { b = Exp(x)  b2 = Relu(x)  p = Mul(b, b2) },
                   else_branch = e () => (float[4] q) { d = Relu(x)  g = Relu(x)  q = Sub(d, g) }>
        y = Add(z, a)""",
    )
    check(model, PASS)
    assert ops(model).count("Exp") == 1
    # One branch's nodes are not visible in the other.
    assert ops(model).count("Relu") == 2


def test_subgraph_initializers_merge_with_outer_ones(make_net, check) -> None:
    model = make_net(
        "(bool c, float[4] x) => (float[4] y)",
        """z = If(c) <then_branch = t () => (float[4] p) <float[4] v = {1.0, 2.0, 3.0, 4.0}> { p = Mul(x, v) },
                   else_branch = e () => (float[4] q) <float[4] u = {1.0, 2.0, 3.0, 4.0}> { q = Sub(x, u) }>
        y = Add(z, w)""",
        w=np.array([1, 2, 3, 4], np.float32),
    )
    check(model, PASS)
    assert [len(g.initializers) for g in model.graphs()] == [1, 0, 0]


def test_function_bodies_and_calls_merge(make_net, check) -> None:
    model = make_net(
        "(float[4] x) => (float[4] y)",
        "a = f.twice(x)  b = f.twice(x)  y = Mul(a, b)",
        functions='<opset_import: ["": 18], domain: "f"> twice (p) => (q) { r = Exp(p)  s = Exp(p)  q = Add(r, s) }',
    )
    check(model, PASS)
    assert ops(model) == ["twice", "Mul", "Exp", "Add"]


def test_random_nodes_stay_with_the_reason(make_net) -> None:
    model = make_net(
        "(float[4] x) => (float[4] y)",
        "a = RandomNormalLike(x)  b = RandomNormalLike(x)  c = f.noise(x)  d = f.noise(x)  y = Sum(a, b, c, d)",
        functions='<opset_import: ["": 18], domain: "f"> noise (p) => (q) { q = RandomUniformLike(p) }',
    )
    remarks = Remarks()
    PASS.apply(model, remarks)
    assert len(model.graph) == 5
    assert {r.kind for r in remarks.items} == {"missed"}
    assert len(remarks.items) == 2


def test_training_dropout_and_unknown_domains_stay(make_net) -> None:
    model = make_net(
        "(float[4] x) => (float[4] y)",
        "a = Dropout(x, r, m)  b = Dropout(x, r, m)  y = Add(a, b)",
        r=np.float32(0.5),
        m=np.array(True),
    )
    PASS.apply(model, Remarks())
    assert len(model.graph) == 3
    twins = [ir.Node("com.example", "Magic", [model.graph.inputs[0]]) for _ in range(2)]
    model.graph.extend(twins)
    remarks = Remarks()
    PASS.apply(model, remarks)
    assert any("keep a state" in r.text for r in remarks.items)


def test_decoded_weights_keep_their_own_decoder(make_net, check) -> None:
    model = make_net(
        "(float[2,2] x) => (float[2,2] y)",
        "a = DequantizeLinear(q, s)  b = DequantizeLinear(q, s)  c = MatMul(x, a)  y = MatMul(c, b)",
        q=np.array([[1, 2], [3, 4]], np.int8),
        s=np.float32(0.5),
    )
    remarks = check(model, PASS)
    assert ops(model).count("DequantizeLinear") == 2
    assert "one reader" in remarks.items[-1].text


def test_equal_outputs_keep_their_names(make_net, check) -> None:
    model = make_net("(float[2] x) => (float[2] y, float[2] z)", "y = Exp(x)  z = Exp(x)")
    check(model, PASS)
    assert ops(model) == ["Exp", "Identity"]
    assert [v.name for v in model.graph.outputs] == ["y", "z"]


def test_an_output_takes_over_the_node_it_equals(make_net, check) -> None:
    model = make_net("(float[2] x) => (float[2] y)", "a = Exp(x)  b = Relu(a)  c = Exp(x)  y = Relu(c)")
    check(model, PASS)
    assert ops(model) == ["Exp", "Relu"]

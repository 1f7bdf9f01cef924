"""eliminate-dead-code: what no output depends on goes, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effic.passes.base import Remarks
from effic.passes.cleanup.eliminate_dead_code import EliminateDeadCode, optional_outputs

DEAD = EliminateDeadCode()


def ops(model) -> list[str]:
    return [node.op_type for node in model.nodes()]


def test_unused_nodes_and_initializers_go_in_chains(make_net, check) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,4] y)",
        "y = Relu(x)  a = Mul(x, w)  b = Exp(a)  r = RandomNormalLike(b)",
        w=np.ones(4, np.float32),
        v=np.ones(3, np.float32),
    )
    remarks = check(model, DEAD)
    assert ops(model) == ["Relu"]
    assert not model.graph.initializers
    assert remarks.count("passed") == 5


def test_dead_nodes_in_subgraphs_release_what_they_captured(make_net, check) -> None:
    model = make_net(
        "(bool c, float[4] x) => (float[4] y)",
        """captured = Exp(x)
        y = If(c) <then_branch = t () => (float[4] a) { dead = Neg(captured)  a = Relu(x) },
                   else_branch = e () => (float[4] b) { b = Abs(x) }>""",
    )
    check(model, DEAD)
    assert sorted(ops(model)) == ["Abs", "If", "Relu"]


def test_an_unused_if_goes_with_all_it_read(make_net, check) -> None:
    model = make_net(
        "(bool c, float[4] x) => (float[4] y)",
        """captured = Exp(x)
        unused = If(c) <then_branch = t () => (float[4] a) { a = Relu(captured) },
                        else_branch = e () => (float[4] b) { b = Mul(captured, w) }>
        y = Abs(x)""",
        w=np.ones(4, np.float32),
    )
    check(model, DEAD)
    assert ops(model) == ["Abs"]
    assert not model.graph.initializers


def test_unused_functions_go_and_used_ones_lose_their_dead_nodes(make_net, check) -> None:
    model = make_net(
        "(float[4] x) => (float[4] y)",
        "y = f.outer(x)",
        functions="""
        <opset_import: ["": 18, "f": 1], domain: "f"> outer (a) => (b) { d = Exp(a)  b = f.inner(a) }
        <opset_import: ["": 18], domain: "f"> inner (a) => (b) { b = Relu(a) }
        <opset_import: ["": 18, "f": 1], domain: "f"> unused (a) => (b) { b = f.inner(a) }""",
    )
    check(model, DEAD)
    assert {f.name for f in model.ir.functions.values()} == {"outer", "inner"}
    assert ops(model) == ["Relu"]


def test_unused_opset_imports_go(make_net) -> None:
    model = make_net("(float[4] x) => (float[4] y)", "y = Relu(x)")
    model.ir.opset_imports["com.example"] = 1
    remarks = Remarks()
    DEAD.apply(model, remarks)
    assert dict(model.ir.opset_imports) == {"": 18}
    assert "com.example" in remarks.items[0].where


def test_optional_outputs_are_dropped_from_the_end(make_net, check) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,4] y)",
        "d, mask = Dropout(x)  y, mean, scale = LayerNormalization(d, w)",
        w=np.ones(4, np.float32),
    )
    check(model, DEAD)
    assert [len(node.outputs) for node in model.nodes()] == [1, 1]


def test_training_batch_norm_keeps_its_statistics(make_net) -> None:
    model = make_net(
        "(float[2,3] x) => (float[2,3] y)",
        "y, m, v = BatchNormalization <training_mode = 1> (x, s, s, s, s)",
        s=np.ones(3, np.float32),
    )
    remarks = Remarks()
    DEAD.apply(model, remarks)
    assert len(next(iter(model.nodes())).outputs) == 3
    assert "training mode" in remarks.items[0].text


def test_outputs_inputs_and_overridable_weights_stay(make_net, check) -> None:
    model = make_net(
        "(float[4] x, float[4] unused) => (float[4] y, float[4] w)", "y = Relu(x)", w=np.ones(4, np.float32)
    )
    remarks = check(model, DEAD)
    assert not remarks.items
    assert [v.name for v in model.graph.inputs] == ["x", "unused"]


def test_which_outputs_are_optional() -> None:
    assert optional_outputs("Dropout", 18) == 1
    assert optional_outputs("LSTM", 18) == 1
    assert optional_outputs("Relu", 18) is None
    assert optional_outputs("Split", 18) is None
    assert optional_outputs("NoSuchOperator", 18) is None


def test_scales_linearly(make_net) -> None:
    nodes = [ir.Node("", "Relu", [None], num_outputs=1) for _ in range(16_000)]
    model = make_net("(float[4] x) => (float[4] y)", "y = Relu(x)")
    previous = model.graph.inputs[0]
    for node in nodes:
        node.replace_input_with(0, previous)
        previous = node.outputs[0]
    model.graph.extend(nodes)
    DEAD.apply(model, Remarks())
    assert len(model.graph) == 1

"""Attention written as products and a softmax is found and run by one kernel, with the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm", reason="needs the tvm extra")

import onnx_ir as ir

from effic.ir.model import Model
from tests.backends.tvm.kernel_runs import random
from tests.backends.tvm.module_runs import Lowered

Q, K, V, MASK = (2, 3, 5, 8), (2, 3, 8, 21), (2, 3, 21, 8), (2, 1, 1, 21)


def model_of(scaled: str | None, masked: bool, extra_output: bool = False) -> Model:
    nodes, last = [helper.make_node("MatMul", ["q", "k"], ["s"])], "s"
    if scaled is not None:
        nodes.append(helper.make_node(scaled, [last, "factor"], ["t"]))
        last = "t"
    if masked:
        nodes.append(helper.make_node("Add", [last, "mask"], ["m"]))
        last = "m"
    nodes.append(helper.make_node("Softmax", [last], ["p"], axis=-1))
    nodes.append(helper.make_node("MatMul", ["p", "v"], ["y"]))
    named = {"q": Q, "k": K, "v": V, **({"mask": MASK} if masked else {})}
    outputs = {"y": Q, **({"p": (2, 3, 5, 21)} if extra_output else {})}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in named.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.array(0.5, np.float32), "factor")] if scaled else [],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(proto)
    return Model(ir.from_proto(proto))


def expected(inputs: dict[str, np.ndarray], factor: float) -> np.ndarray:
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    scores = wide["q"] @ wide["k"] * factor + wide.get("mask", 0)
    power = np.exp(scores - scores.max(-1, keepdims=True))
    result: np.ndarray = power / power.sum(-1, keepdims=True) @ wide["v"]
    return result


@pytest.mark.parametrize(
    ("scaled", "masked", "factor"),
    [(None, False, 1.0), ("Mul", True, 0.5), ("Div", True, 2.0), ("Div", False, 2.0)],
)
def test_one_kernel(scaled: str | None, masked: bool, factor: float) -> None:
    shapes = {"q": Q, "k": K, "v": V, **({"mask": MASK} if masked else {})}
    inputs = {name: random(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    lowered = Lowered(model_of(scaled, masked))
    assert "attention" in lowered.kernels
    np.testing.assert_allclose(lowered.run(inputs)["y"], expected(inputs, factor), atol=1e-5)


def test_weights_that_somebody_reads_are_not_swallowed() -> None:
    inputs = {"q": random(0, *Q), "k": random(1, *K), "v": random(2, *V)}
    lowered = Lowered(model_of(None, False, extra_output=True))
    assert "attention" not in lowered.kernels
    np.testing.assert_allclose(lowered.run(inputs)["y"], expected(inputs, 1.0), atol=1e-5)


def shared_heads(queries: int, axis: int, turned: bool = True) -> Model:
    """Two heads of keys, each read by three of queries: expanded along ``axis`` (2: each head three times;
    1: all heads, three times over) and merged."""
    shape = {1: (1, 3, 2, 21, 8), 2: (1, 2, 3, 21, 8)}[axis]
    numbers = {"axis": [axis], "repeat": shape, "flat": (1, 6, 21, 8)}
    nodes = []
    for name in "kv":
        nodes += [
            helper.make_node("Unsqueeze", [name, "axis"], [f"{name}1"]),
            helper.make_node("Expand", [f"{name}1", "repeat"], [f"{name}2"]),
            helper.make_node("Reshape", [f"{name}2", "flat"], [f"{name}3"]),
        ]
    if not turned:
        # The same in two steps.
        nodes.append(helper.make_node("Transpose", ["k3"], ["k4"], perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Transpose", ["k4"], ["kt"], perm=[0, 2, 1, 3]))
    else:
        nodes.append(helper.make_node("Transpose", ["k3"], ["kt"], perm=[0, 1, 3, 2]))
    nodes += [
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v3"], ["y"]),
    ]
    named = {"q": (1, 6, queries, 8), "k": (1, 2, 21, 8), "v": (1, 2, 21, 8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in named.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, named["q"])],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(proto)
    return Model(ir.from_proto(proto))


@pytest.mark.parametrize(
    ("queries", "axis", "turned", "kept"),
    [(1, 2, True, True), (5, 2, True, True), (5, 1, True, False), (5, 2, False, True)],
)
def test_heads_that_queries_share_are_not_copied(queries: int, axis: int, turned: bool, kept: bool) -> None:
    inputs = {"q": random(0, 1, 6, queries, 8), "k": random(1, 1, 2, 21, 8), "v": random(2, 1, 2, 21, 8)}
    lowered = Lowered(shared_heads(queries, axis, turned))
    assert "attention" in lowered.kernels
    names = [variable.name_hint for variable in lowered.module.get_global_vars()]
    assert any("kv_heads2" in name for name in names) == kept
    order = np.repeat(range(2), 3) if axis == 2 else np.tile(range(2), 3)
    copied = {"q": inputs["q"], "k": inputs["k"][:, order].swapaxes(2, 3), "v": inputs["v"][:, order]}
    np.testing.assert_allclose(lowered.run(inputs)["y"], expected(copied, 1.0), atol=1e-5)

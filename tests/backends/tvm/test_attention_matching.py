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

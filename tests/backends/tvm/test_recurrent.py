"""LSTM, GRU and RNN on TVM against ONNX Runtime, all forms compiled in one module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.coverage import coverage
from effic.backends.tvm.kernels.recurrent import GATES, Recurrent
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from tests.backends.tvm.node_cases import CPU, Form, Group

LSTM, GRU, RNN = "LSTM", "GRU", "RNN"

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": (LSTM, {"hidden": 32}),
    "lstm ragged": (LSTM, {"hidden": 21, "batch": 5, "steps": 7}),
    "lstm both ways": (LSTM, {"hidden": 5, "direction": "bidirectional", "lengths": True}),
    "lstm with peepholes": (LSTM, {"hidden": 17, "peepholes": True, "states": True}),
    "lstm clipped": (LSTM, {"hidden": 16, "clip": 0.3, "batch": 6}),
    "lstm of other activations": (LSTM, {"hidden": 9, "activations": ["Sigmoid", "Relu", "Tanh"]}),
    "lstm without biases": (LSTM, {"hidden": 8, "biased": False}),
    "lstm, one row of many units": (LSTM, {"hidden": 260, "batch": 1, "states": True}),
    "gru": (GRU, {"hidden": 32, "states": True}),
    "gru, reset afterwards": (GRU, {"hidden": 21, "linear_before_reset": 1, "batch": 5}),
    "gru, reset afterwards, no biases": (GRU, {"hidden": 7, "linear_before_reset": 1, "biased": False}),
    "gru backwards": (GRU, {"hidden": 18, "direction": "reverse", "lengths": True, "states": True}),
    "gru both ways": (GRU, {"hidden": 16, "direction": "bidirectional", "linear_before_reset": 1}),
    "rnn": (RNN, {"hidden": 33, "states": True}),
    "rnn with relu": (RNN, {"hidden": 4, "activations": ["Relu"], "direction": "reverse"}),
    "rnn of a computed weight": (RNN, {"hidden": 19, "computed": True}),
    "lstm of computed weights": (LSTM, {"hidden": 12, "computed": True, "direction": "bidirectional"}),
}


def layer(
    cell: str,
    hidden: int,
    *,
    steps: int = 4,
    batch: int = 3,
    size: int = 6,
    biased: bool = True,
    states: bool = False,
    lengths: bool = False,
    peepholes: bool = False,
    computed: bool = False,
    **attributes: Any,
) -> tuple[Model, dict[str, np.ndarray]]:
    """A model of one node, with all its outputs, and inputs for it; ``computed``: weights are inputs."""
    rng = np.random.default_rng(hidden)
    ways, gates = (2 if attributes.get("direction") == "bidirectional" else 1), GATES[cell]

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    arrays: dict[str, np.ndarray] = {
        "X": 3 * normal(steps, batch, size),
        "W": normal(ways, gates * hidden, size),
        "R": normal(ways, gates * hidden, hidden),
    }
    if biased:
        arrays["B"] = normal(ways, 2 * gates * hidden)
    if lengths:
        arrays["lengths"] = np.array([steps, 1, *rng.integers(1, steps + 1, batch - 2)], np.int32)
    if states:
        arrays["h"] = normal(ways, batch, hidden)
    if states and cell == LSTM:
        arrays["c"] = normal(ways, batch, hidden)
    if peepholes:
        arrays["P"] = normal(ways, 3 * hidden)
    order = ["X", "W", "R", "B", "lengths", "h", *(["c", "P"] if cell == LSTM else [])]
    names = [name if name in arrays else "" for name in order]
    fed = {"X", "lengths", "h"} | ({"W", "R", "B"} if computed else set())
    outputs = ["Y", "Y_h", *(["Y_c"] if cell == LSTM else [])]
    attributes = {"direction": "forward", **attributes}
    if ways == 2 and "activations" in attributes:
        attributes["activations"] = attributes["activations"] * 2
    node = helper.make_node(cell, names, outputs, hidden_size=hidden, **attributes)

    def typed(name: str) -> onnx.ValueInfoProto:
        kind = TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, arrays[name].shape)

    graph = helper.make_graph(
        [node],
        "g",
        [typed(name) for name in arrays if name in fed],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name not in fed],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Model(ir.from_proto(proto)), {name: array for name, array in arrays.items() if name in fed}


@pytest.fixture(scope="module")
def group() -> Group:
    forms = []
    for name, (cell, options) in LAYERS.items():
        model, inputs = layer(cell, **options)
        expected = Oracle(model).run(inputs)
        forms.append(
            Form(name, model, inputs, [expected[value.name or ""] for value in model.graph.outputs], 0)
        )
    return Group(forms)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_onnx_runtime(group: Group, name: str) -> None:
    assert name not in group.refused
    for found, expected in zip(group.run(name), group.forms[name].expected, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activations": ["Affine", "Tanh", "Tanh"]}, "'affine' is none of sigmoid, tanh, relu"),
        ({"activations": ["Sigmoid", "Tanh"]}, "LSTM has 3 activations"),
        ({"activations": ["LeakyRelu"] * 3, "activation_alpha": [0.1]}, "factors of their own"),
        ({"input_forget": 1}, "couples its input and forget gates"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    model, _ = layer(LSTM, 8, **options)
    (found,) = coverage(model, CPU)
    assert found.op == LSTM
    assert reason in found.reason


def test_a_sequence_of_open_length_is_refused() -> None:
    model, _ = layer(GRU, 8)
    model.graph.inputs[0].shape = ir.Shape(["steps", 3, 6])
    with pytest.raises(Exception, match=r"size.*shapes"):
        Group([Form("open", model, {}, [], 0)])


def test_threads_are_used_where_there_is_work_for_them() -> None:
    spec = Recurrent("LSTM", 3, 4, 64, ("sigmoid", "tanh", "tanh"))
    one = spec.prim_func(CPU).script()
    two = spec.prim_func(replace(CPU, cores=2)).script()
    assert "T.parallel" not in one
    assert "T.parallel" not in two  # too little work to wake them
    large = Recurrent("LSTM", 3, 4, 512, ("sigmoid", "tanh", "tanh"))
    assert "T.parallel" in large.prim_func(replace(CPU, cores=2)).script()


def test_no_elements_are_no_sequence() -> None:
    assert Recurrent("RNN", 0, 1, 4, ("tanh",)).why_not() == "a sequence of no elements"

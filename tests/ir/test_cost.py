"""Costs are counted, each weight once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.cost import model_cost, weight_bytes
from effic.ir.model import Model
from effic.models.builders import BUILDERS

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N,3,8,8] x, float[N,T,6] z) => (float[N,4,4,4] y, float[N,T,5] u, float[N,T,5] v) {
  y = Conv<strides = [2,2], pads = [1,1,1,1]>(x, w)
  u = MatMul(z, m)
  v = MatMul(z, m)
}
"""


def make() -> Model:
    model = Model(
        ir.from_onnx_text(TEXT.replace("float[N,T,6] z)", "float[N,T,6] z, float[4,3,3,3] w, float[6,5] m)"))
    )
    graph = model.graph
    for name, shape in (("m", (6, 5)), ("w", (4, 3, 3, 3))):
        value = graph.inputs.pop()
        assert value.name == name
        value.const_value = ir.tensor(np.ones(shape, np.float32), name=name)
        graph.register_initializer(value)
    return model


def test_counts() -> None:
    cost = model_cost(make(), {"N": 2, "T": 7})
    conv, matmul = 2 * 4 * 4 * 4 * 3 * 9, 2 * 7 * 6 * 5
    assert cost.macs == conv + 2 * matmul
    assert cost.macs_unknown == 0
    assert cost.parameters == 4 * 27 + 30
    assert cost.weight_bytes == 4 * cost.parameters == weight_bytes(make())
    assert cost.nodes == 3
    assert cost.ops == {"MatMul": 2, "Conv": 1}
    assert [n.weight_bytes for n in cost.per_node] == [432, 120, 0]


def test_dynamic_dimensions_count_as_one() -> None:
    assert model_cost(make()).macs == 4 * 4 * 4 * 27 + 2 * 30


def test_inference_leaves_the_model_alone() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
        g (float[N,4] x) => (float[N,4] y) { a = Relu(x)  b = MatMul(a, a2)  y = Relu(b) }"""
    model = Model(ir.from_onnx_text(text.replace("float[N,4] x)", "float[N,4] x, float[4,4] a2)")))
    assert model_cost(model, {"N": 3}).macs == 3 * 16
    assert all(v.shape is None for n in list(model.graph)[:2] for v in n.outputs)


@pytest.mark.parametrize("name", ["encoder", "llama", "cnn"])
def test_shape_arithmetic_is_no_obstacle(name: str) -> None:
    cost = model_cost(Model(BUILDERS[name]()))
    assert cost.macs > 0
    assert cost.macs_unknown == 0


def test_what_runs_an_unknown_number_of_times_is_unknown() -> None:
    assert model_cost(Model(BUILDERS["control_flow"]())).macs_unknown > 0
    assert model_cost(Model(BUILDERS["functions"]())).macs_unknown > 0


def test_a_second_count_reuses_inferred_shapes() -> None:
    model = Model(BUILDERS["encoder"]())
    first = model_cost(model)
    again = model_cost(model, shapes=first.shapes)
    assert again.macs == first.macs
    assert again.shapes == first.shapes


def test_dynamic_integer_kernels_multiply() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[N,4] x) => (float[N,3] y, float[N,3] z)
            <int8[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] s = {1,1,1}> {
            y = com.microsoft.DynamicQuantizeMatMul(x, w, s)
            c, a, p = DynamicQuantizeLinear(x)
            z = com.microsoft.MatMulIntegerToFloat(c, w, a, s, p) }"""
    cost = model_cost(Model(ir.from_onnx_text(text)), {"N": 5})
    assert (cost.macs, cost.macs_unknown, cost.parameters) == (2 * 5 * 4 * 3, 0, 12)

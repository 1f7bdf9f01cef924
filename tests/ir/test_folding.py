"""What a runtime works out when it loads a model, counted without working it out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from effic.ir.cost import model_cost
from effic.ir.folding import folded_bytes
from effic.ir.memory import peak_memory, release_memory, reset_peak_memory
from effic.ir.model import Model
from effic.ir.shapes import static_shapes
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes


def dense(rows: int, columns: int, *, kind: str = "float32") -> Model:
    """One weight ``[rows, columns]`` that is multiplied with."""
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(kind)
    graph = onnx.parser.parse_graph(
        f"g (float[n, {rows}] x) => (float[n, {columns}] y) {{ y = MatMul(x, w) }}"
    )
    graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return Model(ir.from_proto(proto))


def worked_out(model: Model) -> int:
    """Bytes of all values that follow from constants, by running the model."""
    proto = ir.to_proto(model.ir)
    known = {t.name for t in proto.graph.initializer}
    names = []
    for node in proto.graph.node:
        if node.op_type == "Constant" or (node.input and known.issuperset(node.input)):
            known.update(node.output)
            if node.op_type not in ("Constant", "DequantizeLinear"):
                names += node.output
        if node.op_type == "DequantizeLinear":
            known.difference_update(node.output)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    x = np.zeros((1, model.graph.inputs[0].shape[1]), np.float32)  # type: ignore[index]
    outputs = ReferenceEvaluator(proto).run(None, {"x": x})
    return sum(array.nbytes for array in outputs[1:])


@pytest.mark.parametrize(
    "passes",
    [
        "prune-magnitude{n=2,m=4,head=true},compress-nm",
        "prune-magnitude{n=1,m=8,head=true},compress-nm",
        "prune-magnitude{n=2,m=4,head=true},quantize-rtn{bits=8},compress-nm",
    ],
)
def test_what_compressed_weights_take_to_load(passes: str) -> None:
    model = dense(256, 96)
    run_passes(model, parse_passes(passes), check="off")
    assert any(node.op_type == "ScatterElements" for node in model.graph)
    assert folded_bytes(model) == worked_out(model)


def test_nothing_is_worked_out_of_plain_weights() -> None:
    model = dense(256, 96)
    assert folded_bytes(model) == 0
    run_passes(model, parse_passes("quantize-rtn{bits=8}"), check="off")
    assert folded_bytes(model) == 0


def test_the_shape_of_a_compressed_weight_is_known_without_its_codes() -> None:
    model = dense(4096, 1024)
    want = model_cost(model)
    run_passes(model, parse_passes("prune-magnitude{n=2,m=4,head=true},compress-nm"), check="off")
    release_memory()
    reset_peak_memory()
    before = peak_memory()
    assert model_cost(model).macs == want.macs == 4096 * 1024
    # To hold a number for each of the million codes takes twice as much.
    assert peak_memory() - before < 64 << 20


def test_a_large_value_that_is_worked_out_and_given_out_keeps_its_node() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n] x) => (float[64, 64] big, float[n] y) <float[64, 64] big> {
        shape = Constant<value = int64[2] {64, 64}>()
        one = Constant<value = float {1.0}>()
        big = Expand(one, shape)
        y = Relu(x)
    }"""
    model = Model(ir.from_proto(onnx.parser.parse_model(text)))
    assert static_shapes(model, {"n": 3})["y"] == (3,)
    assert folded_bytes(model) == 64 * 64 * 4

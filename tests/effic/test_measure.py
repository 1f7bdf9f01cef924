"""Figures of a model file: what they are, what they are made of, and back from JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.model import Model
from effic.measure import METRICS, Measurement, measure

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[B, 64] x, float[64, 64] in_w, float[64, 4] in_v, float[4] in_b) => (float[B, 4] y)
{
   [first] h = MatMul(x, in_w)
   [relu] r = Relu(h)
   [second] y = Gemm(r, in_v, in_b)
}
"""


def model() -> Model:
    made = Model(ir.from_onnx_text(TEXT))
    for value in tuple(made.graph.inputs[1:]):
        assert value.name is not None
        assert value.shape is not None
        array = np.ones(value.shape.numpy(), np.float32)
        value.replace_all_uses_with(made.add_initializer(made.graph, value.name[3:], array))
        made.graph.inputs.remove(value)
    return made


def test_the_figures_of_a_small_model(tmp_path: Path) -> None:
    model().save(tmp_path / "m.onnx")
    found = measure(tmp_path / "m.onnx")
    assert found.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert found.weight_bytes == 4 * (64 * 64 + 64 * 4 + 4)
    assert found.parameters == 64 * 64 + 64 * 4 + 4
    assert found.macs == 64 * 64 + 64 * 4
    assert found.nodes == 3
    assert found.ops == {"MatMul": 1, "Relu": 1, "Gemm": 1}
    assert found.tensors == {"w": 16384, "v": 1024, "(tensors under 256 B)": 16}
    assert found.macs_by_node == {"MatMul 'first'": 4096, "Gemm 'second'": 256}
    assert sum(found.contributions("parameters")[1].values()) == found.parameters
    assert sum(found.contributions("file_bytes")[1].values()) == found.file_bytes
    assert sum(found.contributions("nodes")[1].values()) == found.nodes


def test_external_data_counts(tmp_path: Path) -> None:
    model().save(tmp_path / "m.onnx", external=True)
    assert len(list(tmp_path.iterdir())) == 2
    found = measure(tmp_path / "m.onnx")
    assert found.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert found.file_bytes > found.weight_bytes


def test_unknown_shapes_make_macs_unknown(tmp_path: Path) -> None:
    made = model()
    node = ir.Node("someone", "Mystery", [made.graph.inputs[0]], num_outputs=1, name="mystery")
    node.outputs[0].name = "m"
    made.ir.opset_imports["someone"] = 1
    made.graph.insert_before(made.graph[0], node)
    made.graph[1].replace_input_with(0, node.outputs[0])
    for later in made.graph:
        later.outputs[0].shape = None
    made.save(tmp_path / "m.onnx")
    found = measure(tmp_path / "m.onnx")
    assert found.macs is None
    assert found.metric("nodes") == 4
    assert "unknown shapes" in found.why_not("macs")


def test_json_and_back(tmp_path: Path) -> None:
    model().save(tmp_path / "m.onnx")
    found = measure(tmp_path / "m.onnx")
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "decoded_weights"])
def test_every_metric_is_a_figure(tmp_path: Path, metric: str) -> None:
    model().save(tmp_path / "m.onnx")
    found = measure(tmp_path / "m.onnx")
    assert isinstance(found.metric(metric), int)
    assert found.contributions(metric)[1]

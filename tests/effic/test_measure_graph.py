"""What constants become when a model runs: weights in floating point, decoded ones, the peak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import effic
from effic.ir.cost import model_cost
from effic.ir.model import Model
from effic.measure import Measurement, measure, measure_all
from effic.measure_graph import Constants, peak_bytes
from effic.models.builders import BUILDERS
from effic.op_coverage import Operator, covers

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[1, 64] x) => (float[1, 64] y)
<float[64, 64] w = {0}, int8[64, 64] codes = {0}, float scale = {0.5}>
{
   [first] a = MatMul(x, w)
   [relu] b = Relu(a)
   [decode] v = DequantizeLinear(codes, scale)
   [second] c = MatMul(b, v)
   [add] y = Add(c, a)
}
"""


def model(text: str = TEXT) -> Model:
    made = Model(ir.from_onnx_text(text))
    for value in made.graph.initializers.values():
        assert value.dtype is not None
        assert value.shape is not None
        array = np.ones(tuple(int(d) for d in value.shape), value.dtype.numpy())  # type: ignore[arg-type]
        value.const_value = ir.Tensor(array, name=value.name)
    return made


def found(made: Model, path: Path) -> Measurement:
    made.save(path / "m.onnx", force=True)
    return measure(path / "m.onnx")


def test_which_weights_are_stored_and_decoded_how(tmp_path: Path) -> None:
    got = found(model(), tmp_path)
    assert got.rows["float_weights"] == {"MatMul 'first'": 1}
    assert got.rows["decoded_weights"] == {"codes": 1}
    assert got.readers == {"w": "MatMul 'first'", "codes": "MatMul 'second'"}


def test_the_peak_by_hand(tmp_path: Path) -> None:
    """While ``second`` runs: the input, ``a`` (read again later), ``b``, the decoded weight, and ``c``."""
    got = found(model(), tmp_path)
    weights, row, decoded = 64 * 64 * 4 + 64 * 64 + 4, 64 * 4, 64 * 64 * 4
    assert got.peak_bytes == weights + 4 * row + decoded
    assert sum(got.rows["peak_bytes"].values()) == got.peak_bytes
    assert got.rows["peak_bytes"]["v"] == decoded


def test_what_is_folded_at_load_is_held_like_a_weight(tmp_path: Path) -> None:
    text = TEXT.replace(
        "[decode] v = DequantizeLinear(codes, scale)",
        "[cast] t = Cast<to = 1>(codes)\n[mul] v = Mul(t, scale)",
    )
    got = found(model(text), tmp_path)
    assert got.decoded_weights == 0
    assert got.rows["peak_bytes"]["(weights)"] == 64 * 64 * 4 + 64 * 64 + 4 + 64 * 64 * 4
    assert "t" not in got.rows["peak_bytes"]


def test_dynamic_dimensions_count_as_one(tmp_path: Path) -> None:
    text = TEXT.replace("float[1, 64] x", "float[N, 64] x").replace("float[1, 64] y", "float[N, 64] y")
    assert found(model(text), tmp_path).peak_bytes == found(model(), tmp_path).peak_bytes


@pytest.mark.parametrize("name", ["control_flow", "functions"])
def test_a_peak_that_cannot_be_told_is_unknown(tmp_path: Path, name: str) -> None:
    got = found(Model(BUILDERS[name]()), tmp_path)
    assert got.peak_bytes is None
    assert "nobody can tell" in got.why_not("peak_bytes")
    assert got.contributions("peak_bytes") == ("tensor", {})


def test_an_unknown_operator_makes_the_peak_unknown(tmp_path: Path) -> None:
    made = model()
    relu = next(made.nodes("Relu"))
    relu.domain, relu.op_type = "someone", "Mystery"
    made.ir.opset_imports["someone"] = 1
    got = found(made, tmp_path)
    assert got.peak_bytes is None
    assert "Mystery 'relu' has an unknown shape or type" in got.why_not("peak_bytes")


@pytest.mark.parametrize("name", ["encoder", "llama", "cnn"])
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu{decode=call}"])
def test_lowered_models_have_a_peak(tmp_path: Path, name: str, target: str) -> None:
    """Operators of the runtime's own, whose shapes onnx cannot infer, are known."""
    Model(BUILDERS[name]()).save(tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    effic.optimize(tmp_path / "m.onnx", "quantize-rtn{min_size=0}", output=out, target=target, check="off")
    got = measure(out)
    assert got.peak_bytes is not None, got.why_unknown
    assert got.peak_bytes > got.weight_bytes
    assert got.outside(lambda operator: covers("ort-cpu", operator)) == {}


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    made = Model(BUILDERS["llama"]())
    made.save(tmp_path / "m.onnx")
    read = effic.read_onnx(tmp_path / "m.onnx")
    before = ir.to_proto(read.ir).SerializeToString()
    measure_all(read, tmp_path / "m.onnx", model_cost(read))
    assert ir.to_proto(read.ir).SerializeToString() == before


def test_the_peak_is_at_least_every_node_alone(tmp_path: Path) -> None:
    """A lower bound that needs no liveness: weights, and the largest node's inputs and outputs."""
    made = Model(BUILDERS["grouped_transposed"]())
    made.save(tmp_path / "m.onnx")
    read = effic.read_onnx(tmp_path / "m.onnx")
    peak, _, _ = peak_bytes(Constants(read), model_cost(read))
    assert peak is not None
    for node in read.graph:
        values = [
            v for v in (*dict.fromkeys(node.inputs), *node.outputs) if v is not None and v.const_value is None
        ]
        if all(v.shape is not None and v.shape.is_static() for v in values):
            alone = sum(int(np.prod(v.shape.numpy())) * 4 for v in values)  # type: ignore[union-attr]
            assert peak >= alone


@pytest.mark.parametrize(
    ("target", "operator", "is_covered"),
    [
        ("portable", Operator("Conv", "", 20), True),
        ("portable", Operator("Gelu", "", 19), False),
        ("portable", Operator("Gelu", "", 20), True),
        ("portable", Operator("MatMulNBits", "com.microsoft", 1), False),
        ("ort-cpu", Operator("MatMulNBits", "com.microsoft", 1), True),
        ("ort-cpu", Operator("HardSwish", "", 20), True),
        ("ort-cpu", Operator("Mystery", "someone", 1), False),
        ("torch", Operator("Conv", "", 20), True),
        ("torch", Operator("Mystery", "someone", 1), False),
    ],
)
def test_what_targets_cover(target: str, operator: Operator, is_covered: bool) -> None:
    assert covers(target, operator) is is_covered

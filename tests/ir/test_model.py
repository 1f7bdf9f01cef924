"""Model: names, replacing values, constants, records."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.model import Model, PassRecord, constant_array, sole_consumer
from effic.ir.tensors import SPILL_BYTES, borrow
from effic.ir.verify import verify

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1,2}> {
  a = Add(x, w)
  y = Identity(a)
  z = Identity(x)
}
"""


def make() -> Model:
    return Model(ir.from_onnx_text(TEXT))


def test_replacing_an_output_keeps_its_name() -> None:
    model = make()
    identity = next(model.nodes("Identity"))
    model.replace_value(identity.outputs[0], identity.inputs[0])
    model.graph.remove(identity, safe=True)
    verify(model)
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0].producer().op_type == "Add"


def test_an_output_without_a_shape_stays_so() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[4] x) => (float y) { a = Exp(x)  y = Identity(a) }'
    )
    model = Model(ir.from_onnx_text(text))
    identity = next(model.nodes("Identity"))
    source, output = identity.inputs[0], identity.outputs[0]
    # The parser takes no type without a rank.
    output.shape = None
    source.type, source.shape = output.type, ir.Shape([4])
    model.replace_value(output, source)
    model.graph.remove(identity, safe=True)
    assert model.graph.outputs[0].shape is None


def test_an_input_cannot_become_an_output_without_an_identity() -> None:
    model = make()
    identity = list(model.nodes("Identity"))[1]
    model.replace_value(identity.outputs[0], identity.inputs[0])
    model.graph.remove(identity, safe=True)
    verify(model)
    assert model.graph.outputs[1].name == "z"
    assert model.graph.outputs[1].producer().op_type == "Identity"


def test_names_are_unique() -> None:
    model = make()
    assert model.unique_name("a") == "a_1"
    assert model.unique_name("a") == "a_2"
    assert model.add_initializer(model.graph, "w", np.ones(1)).name == "w_1"


def test_a_numpy_scalar_becomes_an_initializer() -> None:
    model = make()
    value = model.add_initializer(model.graph, "two", np.float32(2))
    assert np.array_equal(constant_array(value), np.float32(2))


def test_function_bodies_get_constant_nodes() -> None:
    from effic.models.builders import functions

    model = Model(functions())
    body = next(iter(model.ir.functions.values())).graph
    value = model.add_initializer(body, "k", np.float32([1]))
    assert value.producer().op_type == "Constant"
    assert np.array_equal(constant_array(value), [1])


def test_large_tensors_go_to_disk_and_come_back() -> None:
    model = make()
    array = np.arange(SPILL_BYTES // 4 + 1, dtype=np.float32)
    value = model.add_initializer(model.graph, "big", array)
    assert isinstance(value.const_value, ir.ExternalTensor)
    with borrow(value.const_value) as got:
        assert np.array_equal(got, array)
    packed = np.arange(SPILL_BYTES, dtype=np.uint8)
    tensor = model.scratch.packed("p", packed, ir.DataType.INT4, (SPILL_BYTES, 2))
    assert tensor.shape == (SPILL_BYTES, 2)
    assert tensor.tobytes() == packed.tobytes()


def test_scratch_goes_with_the_model() -> None:
    import os

    model = make()
    folder = model.scratch.folder
    copy = model.clone()
    del model
    assert os.path.isdir(folder)
    del copy
    assert not os.path.exists(folder)


def test_sole_consumer() -> None:
    model = make()
    add, identity, _ = model.graph
    assert sole_consumer(add.outputs[0]) is identity
    assert sole_consumer(identity.outputs[0]) is None
    assert sole_consumer(model.graph.inputs[0]) is None


def test_record_survives_the_file(tmp_path) -> None:
    from effic.ir.onnx_format import read_onnx

    model = make()
    model.record.append(PassRecord("fuse-conv-bn", "0.1.0", 2, 1, 100, 90))
    model.save(tmp_path / "m.onnx")
    assert read_onnx(tmp_path / "m.onnx").record == model.record


def record(text: str = '"a"', passed: str = "1") -> str:
    return f'[{{"text":{text},"version":"1","passed":{passed},"missed":1,"bytes_before":1,"bytes_after":1}}]'


def test_a_record_is_read() -> None:
    inner = make().ir
    inner.metadata_props["effic.record"] = record()
    assert Model(inner).record == [PassRecord("a", "1", 1, 1, 1, 1)]


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[1]", '[{"a": 1}]', "{}", "[" * 5000,
     record("5"), record('"\\ud800"'), record(passed='"x"'), record(passed=str(10**400))],
)  # fmt: skip
def test_a_foreign_record_is_ignored(text: str) -> None:
    inner = make().ir
    inner.metadata_props["effic.record"] = text
    assert Model(inner).record == []

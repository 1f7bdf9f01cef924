"""Raising the operator set: the same numbers, and everything else as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from effic.ir.model import Model
from effic.ir.onnx_format import raise_opset, read_onnx, to_proto, write_onnx
from effic.models.builders import BUILDERS


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def session(model: str | Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: str | Path | bytes, seed: int = 0) -> list[np.ndarray]:
    loaded = session(model)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in loaded.get_inputs():
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        if "float" in value.type:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif "bool" in value.type:
            feeds[value.name] = np.ones(shape, bool)
        else:
            feeds[value.name] = rng.integers(0, 3, shape).astype(
                np.int64 if "int64" in value.type else np.int32
            )
    return loaded.run(None, feeds)


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


REAL = ("resnet20_cifar", "mobilenet_v1_075_224", "version-RFB-320", "stories260k", "basic_pitch_nmp")


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_read_written_and_raised(name: str, data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "onnx" / f"{name}.onnx"
    expected = run(source)
    model = read_onnx(source)
    weights = set(model.graph.initializers)
    outputs = [v.name for v in model.graph.outputs]
    assert raise_opset(model, 21) is None
    assert model.opset == 21
    assert weights <= set(model.graph.initializers)
    assert [v.name for v in model.graph.outputs] == outputs
    write_onnx(model, tmp_path / "out.onnx", external=True)
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    for got, want in zip(run(tmp_path / "out.onnx"), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


def test_rfb_320_has_its_weights_demoted(data_dir: Path) -> None:
    model = read_onnx(data_dir / "onnx" / "version-RFB-320.onnx")
    assert [v.name for v in model.graph.inputs] == ["input"]
    assert "244 weights" in model.origin.notes[0]


@pytest.mark.parametrize("name", BUILDERS)
def test_built_models_are_raised(name: str, tmp_path: Path) -> None:
    model = Model(BUILDERS[name]())
    write_onnx(model, tmp_path / "before.onnx")
    target = max(23, model.opset)
    assert raise_opset(model, target) is None
    assert model.opset == target
    write_onnx(model, tmp_path / "after.onnx")
    onnx.checker.check_model(str(tmp_path / "after.onnx"), full_check=True)
    assert equal(run(tmp_path / "before.onnx"), run(tmp_path / "after.onnx"))


# Operators whose form changed between opset 9 and 21, each as it was written then.
OLD = {
    "squeeze": (9, "float[1,3] x", "float[3] y", "y = Squeeze<axes = [0]>(x)"),
    "unsqueeze": (11, "float[3] x", "float[1,3] y", "y = Unsqueeze<axes = [0]>(x)"),
    "softmax over the last axis": (11, "float[2,3] x", "float[2,3] y", "y = Softmax<axis = 1>(x)"),
    "softmax by its default axis": (11, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax(x)"),
    "log softmax": (11, "float[2,3,4] x", "float[2,3,4] y", "y = LogSoftmax<axis = -1>(x)"),
    "softmax of unknown rank": (11, "float[2,3] x", "float[N,M] y", "t = Identity(x) u = Softmax(t) y = Identity(u)"),
    "slice": (9, "float[4,4] x", "float[2,4] y", "y = Slice<axes = [0], starts = [1], ends = [3]>(x)"),
    "pad": (9, "float[2,2] x", "float[2,4] y", "y = Pad<pads = [0, 1, 0, 1], value = 2.0>(x)"),
    "clip": (9, "float[4] x", "float[4] y", "y = Clip<min = -0.5, max = 0.5>(x)"),
    "clip below": (9, "float[4] x", "float[4] y", "y = Clip<min = 0.1>(x)"),
    "reduce": (9, "float[2,3] x", "float[2,1] y", "y = ReduceMean<axes = [1]>(x)"),
    "split": (9, "float[4] x", "float[2] y", "y, z = Split<axis = 0>(x)"),
    "dropout": (9, "float[4] x", "float[4] y", "y = Dropout<ratio = 0.3>(x)"),
    "topk": (9, "float[4] x", "float[2] y", "y, i = TopK<k = 2, axis = 0>(x)"),
    "upsample": (
        9, "float[1,1,4,4] x", "float[1,1,8,8] y",
        "s = Constant<value = float[4] {1, 1, 2, 2}>() y = Upsample<mode = \"nearest\">(x, s)",
    ),
    "upsample linear": (
        9, "float[1,1,4,4] x", "float[1,1,12,12] y",
        "s = Constant<value = float[4] {1, 1, 3, 3}>() y = Upsample<mode = \"linear\">(x, s)",
    ),
    "resize": (
        10, "float[1,1,4,4] x", "float[1,1,10,10] y",
        "s = Constant<value = float[4] {1, 1, 2.5, 2.5}>() y = Resize<mode = \"nearest\">(x, s)",
    ),
    "resize down": (
        10, "float[1,1,8,8] x", "float[1,1,3,3] y",
        "s = Constant<value = float[4] {1, 1, 0.4, 0.4}>() y = Resize<mode = \"nearest\">(x, s)",
    ),
    "resize linear": (
        10, "float[1,1,4,4] x", "float[1,1,10,10] y",
        "s = Constant<value = float[4] {1, 1, 2.5, 2.5}>() y = Resize<mode = \"linear\">(x, s)",
    ),
    "max pool": (9, "float[1,1,4,4] x", "float[1,1,2,2] y", "y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)"),
    "scatter": (
        9, "float[4] x", "float[4] y",
        "i = Constant<value = int64[2] {0, 2}>() u = Constant<value = float[2] {7, 8}>() y = Scatter(x, i, u)",
    ),
    "in a branch": (
        11, "float[1,3] x", "float[3] y",
        "c = Constant<value = bool {1}>() y = If(c) <then_branch = a () => (float[3] t) { t = Squeeze<axes = [0]>(x) },"
        " else_branch = b () => (float[3] e) { e = ReduceSum<axes = [0], keepdims = 0>(x) }>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD)
def test_operators_whose_form_changed(case: str, tmp_path: Path) -> None:
    opset, given_, returned, body = OLD[case]
    text = f'<ir_version: 5, opset_import: ["" : {opset}]> model ({given_}) => ({returned}) {{ {body} }}'
    path = save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    model = read_onnx(path)
    assert raise_opset(model, 21) is None
    write_onnx(model, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    for got, want in zip(run(tmp_path / "out.onnx"), run(path), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_a_softmax_over_the_last_axis_stays_one_node(tmp_path: Path) -> None:
    text = '<ir_version: 5, opset_import: ["" : 11]> m (float[2,3] x) => (float[2,3] y) { y = Softmax(x) }'
    model = read_onnx(save(onnx.parser.parse_model(text), tmp_path / "m.onnx"))
    assert raise_opset(model, 21) is None
    assert [n.op_type for n in model.graph] == ["Softmax"]


def test_raising_keeps_everything_else(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 10, "custom" : 3, "local" : 1]>
    model (float[1,8] x) => (float[8] y) {
        [first] s = Squeeze<axes = [0]>(x)
        o = custom.Odd<mode = "keep">(s)
        f = local.act<alpha = 0.5>(o)
        y = Relu(f)
    }
    <domain: "local", opset_import: ["" : 10]>
    act <alpha> (a) => (b) { c = LeakyRelu<alpha: float = @alpha>(a) b = Clip<min = 0.0>(c) }
    """
    proto = onnx.parser.parse_model(text)
    proto.graph.node[0].metadata_props.add(key="module", value="layer")
    proto.metadata_props.add(key="a", value="b")
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    assert raise_opset(model, 21) is None
    squeeze = next(model.nodes("Squeeze"))
    assert squeeze.name == "first"
    assert squeeze.metadata_props == {"module": "layer"}
    assert squeeze.outputs[0].name == "s"
    assert next(model.nodes("Odd", domain="custom")).attributes["mode"].as_string() == "keep"
    assert model.ir.opset_imports == {"": 21, "custom": 3, "local": 1}
    function = next(iter(model.ir.functions.values()))
    assert function.opset_imports[""] == 21
    assert [n.op_type for n in function] == ["LeakyRelu", "Constant", "Clip"]
    write_onnx(model, tmp_path / "out.onnx")
    assert read_onnx(tmp_path / "out.onnx").ir.metadata_props["a"] == "b"


def test_what_cannot_be_raised_is_said_and_left_alone(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 11, "local" : 1]>
    model (float[1,8] x) => (float[8] y) { t = Softmax(x) y = local.f<d = [0]>(t) }
    <domain: "local", opset_import: ["" : 11]>
    f <d> (a) => (b) { b = Squeeze<axes: ints = @d>(a) }
    """
    path = save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    model = read_onnx(path)
    before = to_proto(model)
    reason = raise_opset(model, 21)
    assert reason is not None
    assert "Squeeze" in reason
    assert to_proto(model) == before
    assert "newer than" in str(raise_opset(model, 99))
    assert raise_opset(model, 11) is None
    assert raise_opset(model, 7) is None
    assert to_proto(model) == before


def test_a_resize_whose_scales_are_computed(tmp_path: Path) -> None:
    text = """
    <ir_version: 5, opset_import: ["" : 10]>
    m (float[1,1,4,4] x, float[4] s) => (float[1,1,N,M] y) { y = Resize<mode = "nearest">(x, s) }
    """
    model = read_onnx(save(onnx.parser.parse_model(text), tmp_path / "m.onnx"))
    assert "nearest pixel" in str(raise_opset(model, 21))


def test_an_operator_onnx_does_not_know(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> m (float[4] x) => (float[4] y) { y = Fantasy(x) }'
    model = read_onnx(save(onnx.parser.parse_model(text), tmp_path / "m.onnx"))
    assert "Fantasy" in str(raise_opset(model, 21))

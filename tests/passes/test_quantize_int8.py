from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.backends.ort.targets import OrtCpu
from effic.ir.errors import UsageError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.verify import signature, verify
from effic.models.sketch import Sketch
from effic.passes.base import Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.integer_layers import MOST_BIAS, bias_codes, bias_scales, integer_weight
from effic.passes.quantize.placement import KINDS
from effic.passes.quantize.quantize_int8 import QuantizeInt8
from effic.passes.spec import parse_passes


def parse(text: str, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 17]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def feeds(model: Model, count: int = 3) -> list[dict[str, np.ndarray]]:
    shapes = {
        str(v.name): [d if isinstance(d, int) else 2 for d in v.shape or ()] for v in model.graph.inputs
    }
    return [{name: random(*shape, seed=s) for name, shape in shapes.items()} for s in range(count)]


def apply(model: Model, data: list[dict[str, np.ndarray]] | None = None, **options: Any) -> Remarks:
    remarks, before = Remarks(), signature(model)
    QuantizeInt8(**options).apply_with(model, Calibration.of(data or feeds(model)), remarks)
    model.forget_names()
    verify(model)
    assert signature(model) == before
    return remarks


def error_db(model: Model, want: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> float:
    return compare_outputs(want, Oracle(model).run(data)).sqnr_db


def quantize_and_compare(model: Model, **options: Any) -> tuple[Remarks, float]:
    data = feeds(model)
    want = Oracle(model).run(data[0])
    remarks = apply(model, data, **options)
    return remarks, error_db(model, want, data[0])


def ops(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def optimized(model: Model, folder: Path, *, lower: bool = True) -> list[str]:
    """Operators of the graph that ONNX Runtime makes of the model, in order."""
    if lower:
        OrtCpu().lower(model, Remarks())
        verify(model)
    source, out = folder / "model.onnx", folder / "optimized.onnx"
    model.save(source, force=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(out).graph.node]


def two_convs(between: str = "c = Relu (a)", *, more: str = "", inits: str = "") -> Model:
    """Conv, something, Conv."""
    text = f"""
    g (float[N,3,8,8] x) => (float[N,4,H,W] y)
    <float[6,3,3,3] w1 = {{0}}, float[6] b1 = {{0}}, float[4,6,1,1] w2 = {{0}}, float[4] b2 = {{0}} {inits}>
    {{ a = Conv <pads=[1,1,1,1]> (x, w1, b1)  {between}  y = Conv (c, w2, b2) {more} }}
    """
    return parse(
        text,
        w1=random(6, 3, 3, 3) / 5,
        b1=random(6, seed=1) / 3,
        w2=random(4, 6, 1, 1, seed=2) / 2,
        b2=random(4, seed=3) / 3,
    )


# -- the arithmetic ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1000), st.floats(-8, 2), st.floats(-6, 6), st.booleans())
def test_weights_round_to_half_a_step_and_every_bias_fits(
    seed: int, step_power: float, bias_power: float, per_channel: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((5, 7)) * 10 ** rng.uniform(-6, 2, (5, 1))).astype(np.float32)
    weight[seed % 5] = 0
    bias = (rng.standard_normal(5) * 10**bias_power).astype(np.float32)
    step = 10**step_power
    done = integer_weight(weight, [(step, bias), (step * 3, None)], per_channel=per_channel)
    assert np.abs(weight - done.codes * done.scales[:, None]).max(axis=1) == pytest.approx(
        0, abs=float((done.scales * 0.5001).max())
    )
    assert (np.abs(weight - done.codes * done.scales[:, None]).max(axis=1) <= done.scales * 0.5001).all()
    assert (done.codes[seed % 5] == 0).all()
    scales = bias_scales(step, done.scales)
    codes = bias_codes(bias, scales)
    assert np.abs(codes.astype(np.int64)).max() <= MOST_BIAS * 1.001
    assert (np.abs(codes * scales.astype(np.float64) - bias) <= scales * 0.51 + np.abs(bias) * 1e-6).all()
    if not per_channel:
        assert np.unique(done.scales).size == 1


def test_a_bias_beyond_32_bits_widens_the_weight_step_and_is_said() -> None:
    weight, bias = np.full((2, 3), 1e-7, np.float32), np.array([50.0, 0.0], np.float32)
    done = integer_weight(weight, [(1e-3, bias)])
    assert done.widened == 1
    assert done.scales[0] > done.scales[1]
    assert abs(int(bias_codes(bias, bias_scales(1e-3, done.scales))[0])) <= MOST_BIAS * 1.001


def test_the_report_says_that_steps_were_widened() -> None:
    model = two_convs()
    first = model.graph.initializers["w1"]
    array = np.array(first.const_value.numpy())  # type: ignore[union-attr]
    array[0] *= 1e-9
    first.const_value = ir.Tensor(array, name="w1")
    remarks = apply(model)
    assert any("wider step" in r.text for r in remarks.items)


# -- the placement -------------------------------------------------------------------------------


def test_a_relu_is_done_by_the_range_and_pairs_are_shared() -> None:
    model = two_convs("c = Relu (a)")
    remarks, sqnr = quantize_and_compare(model)
    # The input, the rectified value and the output get a pair; weights and biases a DequantizeLinear.
    assert ops(model) == {"QuantizeLinear": 3, "DequantizeLinear": 7, "Conv": 2}
    assert sqnr > 30
    done = [r for r in remarks.items if r.kind == "passed"]
    assert [r.where for r in done] == ["Conv 'a'", "Conv 'y'"] or len(done) == 2
    for remark in done:
        assert remark.data["method"] == "int8"
        assert remark.data["bits"] == 8
        assert remark.data["axis"] == "oc"
        assert remark.data["output_sqnr_db"] > 25
        assert remark.data["input_range"][0] <= 0 <= remark.data["input_range"][1]


@pytest.mark.parametrize("high", ["0.5", "6.0"])
def test_a_clip_from_zero_is_done_by_the_range(high: str) -> None:
    model = two_convs("c = Clip (a, lo, hi)", inits=f", float lo = {{0.0}}, float hi = {{{high}}}")
    _, sqnr = quantize_and_compare(model)
    assert "Clip" not in ops(model)
    assert sqnr > 25


def test_a_clip_that_leaves_zero_out_stays() -> None:
    model = two_convs("c = Clip (a, lo, hi)", inits=", float lo = {0.2}, float hi = {1.0}")
    _, sqnr = quantize_and_compare(model)
    assert ops(model)["Clip"] == 1
    assert sqnr > 25


@pytest.mark.parametrize(
    ("between", "inits", "fused"),
    [
        ("c = MaxPool <kernel_shape=[2,2]> (a)", "", "MaxPool"),
        ("r = Relu (a) c = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (r)", "", "MaxPool"),
        ("c = AveragePool <kernel_shape=[2,2]> (a)", "", "QLinearAveragePool"),
        ("c = Add (a, a)", "", "QLinearAdd"),
        ("b = LeakyRelu (a) c = Mul (a, b)", "", "QLinearMul"),
        ("s = Sigmoid (a) c = Mul (a, s)", "", "QLinearSigmoid"),
        ("c = LeakyRelu <alpha=0.1> (a)", "", "QLinearLeakyRelu"),
        ("c = Transpose <perm=[0,1,3,2]> (a)", "", None),
        ("c = Pad (a, p)", ", int64[8] p = {0,0,1,1,0,0,1,1}", None),
        ("c = Pad <mode=\"reflect\"> (a, p)", ", int64[8] p = {0,0,1,1,0,0,1,1}", "Pad"),
        ("b = Pad (a, p, v) c = Relu (b)", ", int64[8] p = {0,0,1,1,0,0,1,1}, float v = {-9.0}", None),
        ("c = Slice (a, s, e)", ", int64[3] s = {0,0,1}, int64[3] e = {9,9,7}", "Slice"),
        ("c = Resize <mode=\"nearest\"> (a, , f)", ", float[4] f = {1,1,2,2}", "Resize"),
        ("p, q = Split <axis=1> (a, n) c = Concat <axis=1> (q, p)", ", int64[2] n = {3,3}", "QLinearConcat"),
        ("c = Mul (a, k)", ", float k = {0.3}", "QLinearMul"),
    ],
)  # fmt: skip
def test_what_lies_between_layers_runs_on_codes(
    tmp_path: Path, between: str, inits: str, fused: str | None
) -> None:
    model = two_convs(between, inits=inits)
    _, sqnr = quantize_and_compare(model)
    assert sqnr > 22
    if "Relu (b)" in between:
        return  # the Relu behind the Pad stays: the Pad's value is below its bound
    found = optimized(model, tmp_path)
    assert found.count("QLinearConv") == 2
    assert found.count("QuantizeLinear") == 1
    assert found.count("DequantizeLinear") == 1
    if fused is not None:
        assert any(name.endswith(fused) for name in found), found


def test_scales_are_shared_through_pooling_and_concatenation() -> None:
    model = two_convs(
        """r = Relu (a)  p = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (r)
        q = Concat <axis=1> (r, p)  c = Slice (q, s, e, t)""",
        inits=", int64[1] s = {0}, int64[1] e = {6}, int64[1] t = {1}",
    )
    apply(model)
    scales = {
        node.inputs[0].name: (node.inputs[1].name, node.inputs[2].name)  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "QuantizeLinear"
    }
    assert scales["a"] == scales["p"] == scales["q"] == scales["c"]


def test_what_lies_before_and_behind_stays_in_floating_point() -> None:
    text = """
    g (float[N,3,8,8] x) => (float[N,6] y)
    <float k = {0.5}, float[6,3,3,3] w = {0}>
    { s = Mul (x, k)  a = Conv (s, w)  r = Relu (a)  p = GlobalAveragePool (r)  f = Flatten (p)  y = Softmax (f) }
    """
    model = parse(text, w=random(6, 3, 3, 3))
    _, sqnr = quantize_and_compare(model)
    assert ops(model)["QuantizeLinear"] == 2
    assert sqnr > 25
    mul = next(node for node in model.graph if node.op_type == "Mul")
    assert mul.inputs[0].name == "x"  # type: ignore[union-attr]


def test_a_mean_over_pixels_becomes_a_pooling_and_a_pad_the_convolution_s(tmp_path: Path) -> None:
    text = """
    g (float[N,3,9,9] x) => (float[N,5] y)
    <int64[8] p = {0,0,0,0,0,0,1,1}, float[6,3,3,3] w = {0}, float[6,5] v = {0}, float[5] b = {0}>
    { q = Pad (x, p)  a = Conv <strides=[2,2]> (q, w)  r = Relu (a)
      m = ReduceMean <keepdims=0, axes=[2,3]> (r)  y = Gemm (m, v, b) }
    """
    model = parse(text, w=random(6, 3, 3, 3), v=random(6, 5), b=random(5))
    remarks, sqnr = quantize_and_compare(model)
    assert sqnr > 28
    assert "Pad" not in ops(model)
    assert "ReduceMean" not in ops(model)
    assert any("padding" in r.text for r in remarks.items)
    found = optimized(model, tmp_path)
    assert "QLinearGlobalAveragePool" in found
    assert "QGemm" in found
    assert "DequantizeLinear" not in found


def test_graph_outputs_keep_their_names_and_stay_floats() -> None:
    text = """
    g (float[N,3,8,8] x) => (float[N,6,8,8] a, float[N,6,8,8] r, float[N,4,8,8] y)
    <float[6,3,3,3] w1 = {0}, float[4,6,1,1] w2 = {0}>
    { a = Conv <pads=[1,1,1,1]> (x, w1)  r = Relu (a)  y = Conv (r, w2) }
    """
    model = parse(text, w1=random(6, 3, 3, 3), w2=random(4, 6, 1, 1))
    _, sqnr = quantize_and_compare(model)
    assert [v.name for v in model.graph.outputs] == ["a", "r", "y"]
    assert sqnr > 30


def test_a_gemm_gives_its_output_exactly_as_it_computes_it() -> None:
    model = parse(
        "g (float[N,8] x) => (float[N,4] y) <float[8,4] w = {0}> { y = Gemm (x, w) }", w=random(8, 4)
    )
    _, sqnr = quantize_and_compare(model)
    assert ops(model)["QuantizeLinear"] == 1
    assert sqnr > 38


# -- options -------------------------------------------------------------------------------------


def three_convs() -> Model:
    s = Sketch(3, opset=17)
    x = s.input("x", ["N", 3, 12, 12])
    for number, (cin, cout) in enumerate(((3, 8), (8, 8), (8, 4))):
        x = s.conv(x, f"conv{number}", cin, cout, bias=True)
        if number < 2:
            x = s.op("Relu", x, at=f"relu{number}")
    return Model(s.model(s.output(x, "y", ["N", 4, 12, 12])))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"first": "float"}, ["conv0"]),
        ({"last": "float"}, ["conv2"]),
        ({"skip": ("conv1*",)}, ["conv1"]),
        ({"first": "float", "last": "float"}, ["conv0", "conv2"]),
        ({"skip": ("kind:Conv",)}, ["conv0", "conv1", "conv2"]),
    ],
)
def test_layers_left_in_floating_point_are_remarked(options: dict[str, Any], left: list[str]) -> None:
    model = three_convs()
    remarks, sqnr = quantize_and_compare(model, **options)
    floats = [n.removesuffix(".weight") for n in model.graph.initializers if n.endswith(".weight")]
    assert floats == left
    assert remarks.count("missed") == len(left)
    assert sqnr > 25 or len(left) == 3


def test_one_scale_for_the_whole_weight() -> None:
    model = three_convs()
    _, sqnr = quantize_and_compare(model, per_channel=False)
    assert sqnr > 20
    shapes = {
        n.inputs[1].const_value.shape.numpy()  # type: ignore[union-attr]
        for n in model.graph
        if n.op_type == "DequantizeLinear" and "weight" in str(n.inputs[0].name)  # type: ignore[union-attr]
    }
    assert shapes == {()}


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("correct", [True, False])
def test_every_way_of_choosing_ranges_stays_near_the_original(ranges: str, correct: bool) -> None:
    more = {"percentile": 99.9} if ranges == "percentile" else {}
    _, sqnr = quantize_and_compare(three_convs(), ranges=ranges, bias_correction=correct, **more)
    assert sqnr > 20


def test_equalizing_first_changes_nothing_but_the_rounding() -> None:
    model = three_convs()
    remarks, sqnr = quantize_and_compare(model, equalize=True)
    assert sqnr > 25
    assert any("equal" in r.text or "range" in r.text for r in remarks.items)


def test_bias_correction_gives_the_means_back() -> None:
    data = feeds(three_convs(), 6)
    means = {}
    for correct in (False, True):
        model = three_convs()
        # Weights all a little above a level: rounding takes something off every one.
        for value in model.graph.initializers.values():
            if str(value.name).endswith("weight"):
                array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
                step = np.abs(array).max(axis=(1, 2, 3), keepdims=True) / 127
                value.const_value = ir.Tensor((np.round(array / step) + 0.45) * step, name=value.name)
        original = model.clone()
        apply(model, data, bias_correction=correct, ranges="minmax")
        shift = [
            Oracle(model).run(d)["y"].mean((0, 2, 3)) - Oracle(original).run(d)["y"].mean((0, 2, 3))
            for d in data
        ]
        means[correct] = float(np.abs(np.mean(shift, axis=0)).max())
    assert means[True] < 0.25 * means[False]


def test_without_data_it_says_which_option_is_missing() -> None:
    with pytest.raises(UsageError, match="--calib"):
        QuantizeInt8().apply(three_convs(), Remarks())


def test_dynamic_mode_needs_no_data() -> None:
    assert not QuantizeInt8(mode="dynamic").needs_data
    model = parse(
        "g (float[N,64] x) => (float[N,32] y) <float[64,32] w = {0}> { y = MatMul (x, w) }", w=random(64, 32)
    )
    remarks = Remarks()
    QuantizeInt8(mode="dynamic").apply(model, remarks)
    assert remarks.count("passed") == 1


@pytest.mark.parametrize("options", ["ranges=best", "percentile=20", "kinds=[Softmax]"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(UsageError):
        parse_passes(f"quantize-int8{{{options}}}")


# -- refusals ------------------------------------------------------------------------------------


def refusals(model: Model, **options: Any) -> str:
    return "\n".join(r.text for r in apply(model, **options).items if r.kind == "missed")


def test_a_weight_that_is_not_finite_is_left_alone() -> None:
    model = three_convs()
    value = model.graph.initializers["conv2.weight"]
    array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
    array[0, 0, 0, 0] = np.nan
    value.const_value = ir.Tensor(array, name=value.name)
    # Nothing behind it is finite, and nothing behind it is looked at.
    remarks = Remarks()
    QuantizeInt8().apply_with(model, Calibration.of(feeds(model)), remarks)
    assert "holds a weight that is infinite or not a number" in [r.text for r in remarks.items]


def test_weights_computed_at_run_time_and_shared_with_others_are_left_alone() -> None:
    text = """
    g (float[N,3,8,8] x, float[4,3,1,1] u) => (float[N,4,8,8] y, float[4,3,1,1] z, float[N,4,8,8] v)
    <float[4,3,1,1] w = {0}>
    { a = Abs (u)  y = Conv (x, a)  v = Conv (x, w)  z = Neg (w) }
    """
    told = refusals(parse(text, w=random(4, 3, 1, 1)))
    assert "is computed at run time" in told
    assert "is read by Neg" in told


def test_a_batch_norm_behind_a_layer_gets_a_hint() -> None:
    s = Sketch(0, opset=17)
    x = s.input("x", ["N", 3, 8, 8])
    y = s.norm(s.conv(x, "conv", 3, 4), "norm", 4)
    assert "run fuse-conv-bn first" in refusals(Model(s.model(s.output(y, "y", ["N", 4, 8, 8]))))


def test_layers_inside_a_branch_are_left_alone() -> None:
    text = """
    g (float[2,4] x, bool t) => (float[2,4] y)
    <float[4,4] w = {0}>
    { y = If (t) <then_branch = yes () => (float[2,4] a) { a = MatMul (x, w) },
                  else_branch = no () => (float[2,4] b) { b = Relu (x) }> }
    """
    model = parse(text, w=random(4, 4))
    data = [{"x": random(2, 4), "t": np.array(True)}]
    remarks = apply(model, data)
    assert "inside a subgraph" in remarks.items[0].text
    assert "QuantizeLinear" not in ops(model)


def test_a_weight_of_two_layers_is_quantized_once_with_a_bias_for_each() -> None:
    text = """
    g (float[N,4,8,8] x) => (float[N,4,8,8] y)
    <float[4,4,3,3] w = {0}, float[4] b = {0}>
    { a = Conv <pads=[1,1,1,1]> (x, w, b)  r = Relu (a)  c = Conv <pads=[1,1,1,1]> (r, w, b)  y = Relu (c) }
    """
    model = parse(text, w=random(4, 4, 3, 3) / 5, b=random(4))
    _, sqnr = quantize_and_compare(model)
    assert sqnr > 28
    codes = [n for n, v in model.graph.initializers.items() if v.const_value.dtype == ir.DataType.INT8]  # type: ignore[union-attr]
    biases = [n for n, v in model.graph.initializers.items() if v.const_value.dtype == ir.DataType.INT32]  # type: ignore[union-attr]
    assert (len(codes), len(biases)) == (1, 2)
    assert "w" not in model.graph.initializers
    assert "b" not in model.graph.initializers


def test_all_zero_layers_and_activations_keep_their_bias() -> None:
    model = two_convs()
    for name in ("w1",):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.zeros(value.shape.numpy(), np.float32), name=name)  # type: ignore[union-attr]
    _, sqnr = quantize_and_compare(model, bias_correction=False)
    assert sqnr > 35
    model = two_convs()
    zeros = [{"x": np.zeros((2, 3, 8, 8), np.float32)}]
    want = Oracle(model).run(zeros[0])
    apply(model, zeros, bias_correction=False)
    assert error_db(model, want, zeros[0]) > 35


def test_a_second_run_finds_nothing_to_do() -> None:
    model = three_convs()
    apply(model)
    assert apply(model).count("passed") == 0


def test_cleanup_afterwards_keeps_the_integer_form(tmp_path: Path) -> None:
    model = three_convs()
    apply(model)
    wanted = ops(model)
    for item in parse_passes(
        "fold-constants,eliminate-identities,eliminate-common-subexpressions,canonicalize-linear,eliminate-dead-code"
    ):
        item.apply(model, Remarks())
        model.forget_names()
    assert ops(model) == wanted
    found = optimized(model, tmp_path)
    assert found.count("QLinearConv") == 3


def test_kinds_choose_operators() -> None:
    assert set(QuantizeInt8().kinds) == set(KINDS)
    model = two_convs("c = Add (a, a)")
    remarks = apply(model, kinds=("Conv",))
    assert any("kinds" in r.text for r in remarks.items)
    add = next(node for node in model.graph if node.op_type == "Add")
    assert add.outputs[0].uses()[0].node.op_type == "QuantizeLinear"  # type: ignore[index]


# -- real models ---------------------------------------------------------------------------------

CLEAN = "eliminate-identities,fold-constants,canonicalize-linear,fuse-conv-bn,eliminate-dead-code"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("resnet20_cifar", (2, 3, 32, 32), {"QLinearConv": 19, "QLinearAdd": 9}),
        ("mobilenet_v1_075_224", (1, 3, 224, 224), {"QLinearConv": 27}),
    ],
)  # fmt: skip
def test_the_runtime_runs_real_models_in_integers_throughout(
    tmp_path: Path, data_dir: Path, name: str, shape: tuple[int, ...], expected: dict[str, int]
) -> None:
    model = read_onnx(data_dir / "onnx" / f"{name}.onnx")
    for item in parse_passes(CLEAN):
        item.apply(model, Remarks())
        model.forget_names()
    apply(model, [{str(model.graph.inputs[0].name): random(*shape)}], bias_correction=False)
    found = Counter(optimized(model, tmp_path))
    for op_type, count in {**expected, "QLinearGlobalAveragePool": 1, "QGemm": 1}.items():
        assert found[op_type] == count
    # One at the input; what is left in floating point is what the runtime computes at the end.
    assert found["QuantizeLinear"] == 1
    assert found["DequantizeLinear"] == 0

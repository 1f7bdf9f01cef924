"""Random graphs through the whole pipeline, against ONNX Runtime; what random graphs have found, by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("tvm", reason="needs the tvm extra")

import tvm
from tvm import relax

from effic.backends.tvm.coverage import coverage
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.relax_builder import build_relax
from effic.backends.tvm.schedule.pipeline import compile_module
from effic.ir.errors import NotMeasuredError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from tests.backends.tvm.random_graphs import RandomGraph

TOLERANCE = 1e-4
CPU = Cpu.host(1)


def run(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a build does, in this process."""
    module, parameters, signature = build_relax(model, CPU)
    executable, _ = compile_module(module, CPU)
    (bucket,) = signature.buckets
    arrays = [*(feeds[one.name] for one in bucket.inputs), *(parameters[n] for n in bucket.parameters)]
    result = relax.VirtualMachine(executable, tvm.cpu())[bucket.function](
        *(tvm.runtime.tensor(np.array(a, order="C")) for a in arrays)
    )
    results = [result] if len(bucket.outputs) == 1 else list(result)
    return {one.name: got.numpy() for one, got in zip(bucket.outputs, results, strict=True)}


def agree(want: np.ndarray, got: np.ndarray) -> bool:
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    found = compare_outputs({"y": want}, {"y": got})
    same = want.dtype.kind != "f" or np.array_equal(np.isfinite(want), np.isfinite(got))
    return bool(found.max_rel < TOLERANCE and not found.wrong_integers and same)


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_random_graphs(first: int) -> None:
    ran = 0
    for seed in range(first, first + 8):
        graph = RandomGraph(seed, special=seed % 4 == 3)
        try:
            want = Oracle(graph.model).run(graph.feeds)
        except NotMeasuredError:
            continue  # not everything that ONNX allows is in ONNX Runtime
        if coverage(graph.model, CPU):
            continue
        ran += 1
        got = run(graph.model, graph.feeds)
        for name, array in want.items():
            # Where ONNX Runtime differs from ONNX (a minimum of NaN), ONNX's own implementation is right.
            assert agree(array, got[name]) or agree(graph.values[name], got[name]), f"seed {seed}\n{graph}"
    assert ran >= 3


X = np.array(
    [np.nan, np.inf, -np.inf, 0, 1e-8, 0.3, -0.3, 0.999, -1.5, 10, -10, 88.9, -88.9, 100], np.float32
)


def net(text: str, opset: int = 20, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model(ir.from_proto(proto))


@pytest.mark.parametrize("op", ["Sinh", "Cosh", "Sign", "ThresholdedRelu<alpha=0.5>"])
def test_functions_of_one_number(op: str) -> None:
    model = net(f"(float[14] x) => (float[14] y) {{ y = {op}(x) }}")
    want, got = Oracle(model).run({"x": X})["y"], run(model, {"x": X})["y"]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize(
    "op", ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceSum", "ReduceMax"]
)
def test_reductions_of_no_axes(op: str) -> None:
    model = net(f"(float[3] x) => (float[3] y) {{ y = {op}<noop_with_empty_axes=1>(x) }}")
    feeds = {"x": np.array([1.5, -2, 3], np.float32)}
    np.testing.assert_allclose(run(model, feeds)["y"], Oracle(model).run(feeds)["y"], rtol=1e-6)


def test_truth_values_are_compared() -> None:
    model = net("(bool[2,33] a, bool[33] b) => (bool[2,33] y) { y = Equal(a, b) }")
    rng = np.random.default_rng(0)
    feeds = {"a": rng.random((2, 33)) < 0.5, "b": rng.random(33) < 0.5}
    np.testing.assert_array_equal(run(model, feeds)["y"], feeds["a"] == feeds["b"])


def test_the_largest_come_first() -> None:
    # A sorting function is called with pointers, which have no element type.
    model = net("(float[3,9] x) => (float[3,4] y, int64[3,4] i) { y, i = TopK(x, k) }", k=np.array([4]))
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 9)).astype(np.float32)}
    want, got = Oracle(model).run(feeds), run(model, feeds)
    np.testing.assert_array_equal(got["y"], want["y"])
    np.testing.assert_array_equal(got["i"], want["i"])


def test_maxima_over_the_first_axis_are_compiled() -> None:
    # TVM fails on names within names where several vectors are held at once.
    model = net(
        "(float[2,144] x) => (float[144] y) { y = ReduceMax<keepdims=0>(x, axes) }", axes=np.array([0])
    )
    x = np.random.default_rng(2).standard_normal((2, 144)).astype(np.float32)
    x[0, 3] = x[1, 7] = np.nan
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x.max(0))


def test_functions_of_functions_of_functions_are_compiled() -> None:
    # Mish written out; the time doubled with each name within another, and this took minutes.
    model = net("(float[14] x) => (float[14] y) { a = Softplus(x) b = Tanh(a) y = Mul(x, b) }")
    want, got = Oracle(model).run({"x": X})["y"], run(model, {"x": X})["y"]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


def test_extremes_at_the_ends_of_the_range() -> None:
    model = net(
        """(float[4,3] x, int8[2,3] i) => (int64[4] a, int64[4] b, int64[2] c, float[4] d, float[4,3] e) {
        a = ArgMax<axis=1, keepdims=0>(x)
        b = ArgMin<axis=1, keepdims=0, select_last_index=1>(x)
        c = ArgMax<axis=-1, keepdims=0>(i)
        d = ReduceLogSumExp<keepdims=0>(x, axes)
        e = Max(x, row, x)
        }""",
        axes=np.array([1]),
        row=np.array([[1, np.nan, -np.inf]], np.float32),
    )
    inf = np.float32(np.inf)
    x = np.array([[-inf, -inf, -inf], [inf, inf, 0], [1, np.nan, np.nan], [0.5, 1, -inf]], np.float32)
    found = run(model, {"x": x, "i": np.full((2, 3), -128, np.int8)})
    np.testing.assert_array_equal(found["a"], [0, 0, 1, 1])
    np.testing.assert_array_equal(found["b"], [2, 2, 2, 2])
    np.testing.assert_array_equal(found["c"], [0, 0])
    np.testing.assert_allclose(found["d"], [-inf, inf, np.nan, np.log(np.exp(0.5) + np.exp(1))], rtol=1e-6)
    np.testing.assert_array_equal(found["e"], np.maximum(x, np.array([1, np.nan, -inf], np.float32)))


def test_numbers_that_are_not_floats_of_32_bits() -> None:
    model = net(
        """(float[3] x, float[3] y, uint8[3] u, uint8[3] s, int32[2,2] i, double[3] d, float16[3] h) =>
        (float[3] a, uint8[3] b, uint8[3] c, uint8[3] l, int32[2,1] m, double[3] e, float16[3] k) {
        a = Mod<fmod=1>(x, y)
        b = Sign(u)
        c = BitShift<direction="RIGHT">(u, s)
        l = BitShift<direction="LEFT">(u, s)
        m = ReduceMean(i, axes)
        e = Elu(d)
        k = Acos(h)
        }""",
        axes=np.array([1]),
    )
    feeds: dict[str, np.ndarray] = {
        "x": np.array([1e8, -5e4, 7], np.float32),
        "y": np.array([3, 0.1, -2.5], np.float32),
        "u": np.array([0, 7, 255], np.uint8),
        "s": np.array([1, 2, 8], np.uint8),
        "i": np.array([[-3, -4], [5, 2]], np.int32),
        "d": np.array([-1.5, 0, 2]),
        "h": np.array([-0.5, 0, 0.75], np.float16),
    }
    found = run(model, feeds)
    np.testing.assert_array_equal(found["a"], np.fmod(feeds["x"], feeds["y"]))
    np.testing.assert_array_equal(found["b"], [0, 1, 1])
    np.testing.assert_array_equal(found["c"], [0, 1, 0])
    np.testing.assert_array_equal(found["l"], [0, 28, 0])
    np.testing.assert_array_equal(found["m"], [[-3], [3]])
    np.testing.assert_allclose(found["e"], [np.expm1(-1.5), 0, 2], rtol=1e-12)
    np.testing.assert_allclose(found["k"], np.arccos(feeds["h"].astype(np.float32)), rtol=1e-3)


def test_spectra_lengths_and_caches() -> None:
    model = net(
        """(float[2,7,2] z, float[2,3] x, float[2,4,1] cache, float[2,3,1] new, int64[2] at) =>
        (float[2,12,1] a, float[2,3] b, float[2,4,1] c) {
        a = DFT<inverse=1, onesided=1>(z, , axis)
        b = LpNormalization(x)
        c = TensorScatter<mode="circular">(cache, new, at)
        }""",
        opset=24,
        axis=np.array(1),
    )
    rng = np.random.default_rng(3)
    z = rng.standard_normal((2, 7, 2)).astype(np.float32)
    cache, new = rng.standard_normal((2, 4, 1)), rng.standard_normal((2, 3, 1))
    feeds = {"z": z, "x": np.array([[3, 4, 0], [0, 0, 0]]), "cache": cache, "new": new}
    found = run(model, {**{n: a.astype(np.float32) for n, a in feeds.items()}, "at": np.array([0, 3])})
    np.testing.assert_allclose(found["a"][..., 0], np.fft.irfft(z[..., 0] + 1j * z[..., 1]), atol=1e-5)
    np.testing.assert_allclose(found["b"], [[0.6, 0.8, 0], [0, 0, 0]], rtol=1e-6)
    cache[0, :3], cache[1, [3, 0, 1]] = new
    np.testing.assert_array_equal(found["c"], cache.astype(np.float32))


def test_an_old_resize_takes_the_next_input_where_it_shrinks() -> None:
    scales = np.array([1, 0.6], np.float32)
    model = net("(float[1,5] x) => (float[1,3] y) { y = Resize(x, scales) }", opset=10, scales=scales)
    assert run(model, {"x": np.arange(5, dtype=np.float32)[None]})["y"].tolist() == [[0, 2, 4]]


def test_regions_are_scaled_before_half_a_pixel_is_taken_off() -> None:
    model = net(
        """(float[1,1,5,6] x, float[3,4] rois, int64[3] images) => (float[3,1,2,2] y) {
        y = RoiAlign<output_height=2, output_width=2, spatial_scale=0.5>(x, rois, images)
        }"""
    )
    x = np.random.default_rng(4).standard_normal((1, 1, 5, 6)).astype(np.float32)
    rois = np.array([[1, 1, 8, 6], [0, 2, 10, 8], [2, 2, 2, 4]], np.float32)
    feeds = {"x": x, "rois": rois, "images": np.zeros(3, np.int64)}
    np.testing.assert_allclose(run(model, feeds)["y"], Oracle(model).run(feeds)["y"], rtol=1e-5, atol=1e-6)


def test_an_input_without_elements_is_refused_by_name() -> None:
    one, _ = coverage(
        net("(float[0] x, float[2] y) => (float[0] w, float[2] z) { w = Neg(x) z = Neg(y) }"), CPU
    )
    assert str(one) == "input 'x': has no elements, and kernels are made for some"


@pytest.mark.parametrize(
    "text",
    [
        "(int64[2,3] i) => (float[2,3,5] y) { y = OneHot(i, depth, values) }",
        "(int64[2,3] i) => (float[2,5,3] y) { y = OneHot<axis=1>(i, depth, values) }",
        "(int64[2,3] i) => (float[2,3] y) { y = EyeLike<k=1, dtype=1>(i) }",
        "(int64[3,2] i) => (int64[3,2] y) { y = EyeLike(i) }",
    ],
)
def test_places_become_ones(text: str) -> None:
    model = net(text, depth=np.array([5]), values=np.array([-1, 2], np.float32))
    shape = (3, 2) if "[3,2] i" in text else (2, 3)
    i = np.array([0, 4, -1, -5, 7, -6]).reshape(shape)
    np.testing.assert_array_equal(run(model, {"i": i})["y"], Oracle(model).run({"i": i})["y"])


@pytest.mark.parametrize(
    "attributes", ["output_shape=[10,8]", "output_shape=[8,6]", 'output_shape=[8,6], auto_pad="SAME_UPPER"']
)
def test_padding_follows_from_the_output_shape(attributes: str) -> None:
    w = np.random.default_rng(0).standard_normal((2, 3, 3, 3)).astype(np.float32)
    model = net(
        f"(float[1,2,3,4] x) => (float[1,3,h,w2] y) {{ y = ConvTranspose<strides=[3,2], {attributes}>(x, w) }}",
        w=w,
    )
    x = np.random.default_rng(1).standard_normal((1, 2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        run(model, {"x": x})["y"], Oracle(model).run({"x": x})["y"], rtol=1e-5, atol=1e-5
    )


def test_sizes_that_only_a_model_names_take_no_memory_to_look_at() -> None:
    deep = net("(int64[2] i) => (float[2,n] y) { y = OneHot(i, depth, values) }",
               depth=np.array([1 << 40]), values=np.array([0, 1], np.float32))  # fmt: skip
    wide = net("(int64[1000000,1000000] i) => (float[1000000,1000000] y) { y = EyeLike<dtype=1>(i) }")
    for model in (deep, wide):
        coverage(model, CPU)  # lowered; what it would take is found out by running it


def test_what_the_importer_refuses_is_said_in_the_terms_of_the_model() -> None:
    (one,) = coverage(net("(float[3,4] x, int64[2] where) => (float[a,b] y) { y = Reshape(x, where) }"), CPU)
    assert str(one) == "Reshape 'y': takes 'where' from the inputs' values"
    (two,) = coverage(net("(float[3,4] x, float[3,5] z) => (float[a,b] y) { y = Add(x, z) }"), CPU)
    assert str(two).startswith(
        "Add 'y': TVM's converter refuses it: relax.add: the first input shape at dim 1 is 4"
    )


@pytest.mark.parametrize("op", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])
def test_what_is_not_so_of_nan_is_so(op: str) -> None:
    model = net(
        f"(float[14] x) => (bool[14] y) {{ found = {op}(x, c) y = Not(found) }}",
        c=np.array([0.3], np.float32),
    )
    np.testing.assert_array_equal(run(model, {"x": X})["y"], Oracle(model).run({"x": X})["y"])


def test_a_bound_from_memory_beside_a_single_value_compiles() -> None:
    model = net(
        "(float[1,1] x) => (float[2,3] y) { slope = Clip(x, low) whole = PRelu(x, slope) y = Tile(whole, times) }",
        low=np.array(-1, np.float32),
        times=np.array([2, 3]),
    )
    x = np.array([[-0.5]], np.float32)
    np.testing.assert_allclose(run(model, {"x": x})["y"], Oracle(model).run({"x": x})["y"])

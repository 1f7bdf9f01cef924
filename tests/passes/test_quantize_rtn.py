from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effic.ir.encodings import decode, dequantize, recognise
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.opset import raise_opset
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks
from effic.passes.quantize.affine import Grid, quantization_noise, quantize
from effic.passes.quantize.quantize_rtn import QuantizeRTN


def parse(text: str, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def run(model: Model, **inputs: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = ir.to_proto(model.ir).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)[
        0
    ]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(model: Model, **options: Any) -> Remarks:
    remarks = Remarks()
    QuantizeRTN(**options).apply(model, remarks)
    return remarks


def linear(weight: np.ndarray, node: str = "y = MatMul (x, w)") -> Model:
    rows, columns = weight.shape
    return parse(
        f"g (float[N,K] x) => (float[N,M] y) <float[{rows},{columns}] w = {{0}}> {{ {node} }}", w=weight
    )


# -- the arithmetic ------------------------------------------------------------------------------


def round_trip(matrix: np.ndarray, axis: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Decoded matrix, and the step of each weight's group."""
    done = quantize(matrix, axis, grid, ir.DataType.INT8 if grid.symmetric else ir.DataType.UINT8)
    assert done is not None
    codes = done.packed.view(np.int8 if grid.symmetric else np.uint8).reshape(matrix.shape)
    assert codes.min() >= grid.lowest
    assert codes.max() <= grid.highest
    block = grid.block(matrix.shape[axis])
    where = axis if block else 1 - axis
    step = dequantize(np.ones(matrix.shape, np.int8), np.abs(done.scales), None, where, block)
    return dequantize(codes, done.scales, done.zero_points, where, block), step


def reference(group: np.ndarray, grid: Grid) -> np.ndarray:
    """One group by the book, in plain numpy."""
    if grid.symmetric:
        extreme = group[np.argmax(np.abs(group))]
        scale = extreme / grid.lowest if grid.scale == "full" else np.abs(extreme) / grid.highest
        zero = np.float32(0)
    else:
        low, high = min(group.min(), 0), max(group.max(), 0)
        scale = high / np.float32(grid.highest) - low / np.float32(grid.highest)
        zero = np.clip(np.rint(-low * (1 / scale)), 0, grid.highest) if scale else np.float32(0)
    if scale == 0:
        return np.zeros_like(group)
    codes = np.clip(np.rint(group * (np.float32(1) / scale)) + zero, grid.lowest, grid.highest)
    return (codes - zero) * scale


grids = st.builds(
    Grid,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 1, 3, 4, 7, 16]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["full", "absmax"]),
)
# Where numbers are neither dust nor near the largest float, so that bounds are about rounding only.
floats = st.one_of(
    st.just(0.0),
    st.floats(2**-10, 1024, width=32),
    st.floats(-1024, -(2**-10), width=32),
    st.integers(-8, 8).map(float),
)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=floats)


@settings(deadline=None, max_examples=200)
@given(matrices, st.sampled_from([0, 1]), grids)
def test_every_group_is_rounded_by_the_book(matrix: np.ndarray, axis: int, grid: Grid) -> None:
    decoded, step = round_trip(matrix, axis, grid)
    lines, out = (matrix, decoded) if axis == 1 else (matrix.T, decoded.T)
    size = grid.block(lines.shape[1]) or lines.shape[1]
    for line, got in zip(lines, out, strict=True):
        for start in range(0, lines.shape[1], size):
            group = line[start : start + size]
            np.testing.assert_allclose(got[start : start + size], reference(group, grid), rtol=1e-6)
    # Only the rule that uses every level may clip, and by less than half a step.
    reach = 1.0 if grid.symmetric and grid.scale == "full" else 0.5
    assert (np.abs(matrix - decoded) <= step * reach * (1 + 1e-5)).all()
    assert (decoded[matrix == 0] == 0).all()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 1]), grids)
def test_quantizing_twice_changes_nothing_more(seed: int, axis: int, grid: Grid) -> None:
    # Random weights: with an end of the range exactly between two levels, rounding half to even may
    # leave the outermost level unused, and then the second grid is a narrower one.
    once, _ = round_trip(random(9, 11, seed=seed), axis, grid)
    twice, _ = round_trip(once, axis, grid)
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(matrices, st.sampled_from([0, 1]), grids, st.sampled_from([0.25, 2.0, 1024.0]))
def test_scaling_weights_scales_the_result(matrix: np.ndarray, axis: int, grid: Grid, factor: float) -> None:
    # Powers of two, so that the comparison is exact.
    factor = np.float32(factor)
    np.testing.assert_array_equal(
        round_trip(matrix * factor, axis, grid)[0], round_trip(matrix, axis, grid)[0] * factor
    )


@given(matrices, st.sampled_from([0, 1]), grids)
@settings(deadline=None)
def test_columns_and_rows_are_the_same_thing_turned(matrix: np.ndarray, axis: int, grid: Grid) -> None:
    turned = round_trip(np.ascontiguousarray(matrix.T), 1 - axis, grid)[0].T
    np.testing.assert_array_equal(round_trip(matrix, axis, grid)[0], turned)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_have_the_smaller_bound(symmetric: bool) -> None:
    matrix = random(64, 256)
    worst = [round_trip(matrix, 1, Grid(bits, 32, symmetric))[1].max() for bits in (2, 3, 4, 8)]
    assert worst == sorted(worst, reverse=True)
    errors = [quantization_noise(matrix, 1, Grid(bits, 32, symmetric))[1] for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_the_full_scale_beats_the_one_that_wastes_a_level() -> None:
    matrix = random(512, 512)
    for bits, least in ((2, 4.0), (3, 2.0), (4, 1.0), (8, 0.02)):
        full = quantization_noise(matrix, 0, Grid(bits, 128, scale="full"))[1]
        absmax = quantization_noise(matrix, 0, Grid(bits, 128, scale="absmax"))[1]
        assert 10 * np.log10(absmax / full) > least


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_that_is_not_finite_is_refused(value: float, axis: int) -> None:
    matrix = random(8, 8)
    matrix[3, 5] = value
    assert quantize(matrix, axis, Grid(4, 4), ir.DataType.INT4) is None


@pytest.mark.parametrize("dtype", [np.float16, ir.DataType.BFLOAT16.numpy(), np.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exponent", [-45, -24, -20, -14, 0, 15, 127])
def test_extreme_magnitudes_stay_on_the_grid(dtype: Any, bits: int, symmetric: bool, exponent: int) -> None:
    with np.errstate(over="ignore", under="ignore"):
        matrix = (random(32, 16) / 5).clip(-0.99, 0.99)
        matrix = (matrix.astype(np.float64) * 2.0**exponent).astype(dtype)
    if not np.isfinite(matrix.astype(np.float32)).all():
        return
    decoded, step = round_trip(matrix, 0, Grid(bits, 8, symmetric))
    exact = matrix.astype(np.float64)
    error = np.abs(exact - decoded.astype(np.float64))
    # Scale and product are both rounded to the dtype of the weight; the former moves the far end of
    # the grid by some of its steps.
    digits, least = {"float32": (2**-23, 2.0**-149), "float16": (2**-10, 2.0**-24)}.get(
        matrix.dtype.name, (2**-7, 2.0**-133)
    )
    reach = (1.0 if symmetric else 0.5) + digits * 2 ** min(bits, 4)
    bound = step.astype(np.float64) * reach + 2 * digits * np.abs(exact) + least * 2**bits
    assert (error <= bound).all()


def test_a_large_matrix_is_sampled_and_the_estimate_is_close() -> None:
    matrix = random(1024, 512)
    for axis in (0, 1):
        signal, noise, sampled = quantization_noise(matrix, axis, Grid(4, 128))
        assert sampled
        decoded, _ = round_trip(matrix, axis, Grid(4, 128))
        exact = 10 * np.log10((matrix**2).sum() / ((matrix - decoded) ** 2).sum())
        assert abs(10 * np.log10(signal / noise) - exact) < 0.2


# -- the pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 48, -1])
def test_the_model_computes_with_the_decoded_weight(
    axis: str, symmetric: bool, bits: int, group_size: int
) -> None:
    weight = random(64, 96)
    model = linear(weight)
    remarks = apply(model, bits=bits, group_size=group_size, symmetric=symmetric, axis=axis)
    (remark,) = remarks.items
    assert remark.kind == "passed"
    assert remark.where == "w"
    assert remark.data["bits"] == bits
    assert remark.data["bytes_after"] < remark.data["bytes_before"] == weight.nbytes
    site = weight_sites(model)[0]
    assert site.encoding is not None
    assert site.encoding.bits == bits
    assert site.encoding.symmetric == symmetric
    assert site.axis_of(site.encoding) == axis
    decoded = decode(site.encoding)
    x = random(3, 64)
    # Not bit for bit: how a product is summed is the runtime's choice. What it multiplies is exact.
    np.testing.assert_allclose(run(model, x=x), x @ decoded, rtol=1e-5, atol=1e-5)
    sqnr = 10 * np.log10((weight**2).sum() / ((weight - decoded) ** 2).sum())
    assert remark.data["sqnr_db"] == pytest.approx(sqnr, abs=0.01)


def test_effective_bits_count_scales_and_zero_points() -> None:
    model = linear(random(256, 64))
    (remark,) = apply(model, bits=4, group_size=128, symmetric=False).items
    assert remark.data["effective_bits"] == pytest.approx(4 + (32 + 4) / 128, abs=1e-4)
    assert remark.data["group_size"] == 128


def test_what_three_bits_are_stored_in_is_said() -> None:
    model = linear(random(256, 64))
    (remark,) = apply(model, bits=3).items
    assert remark.text.startswith("3 bits, stored as 4, groups of 128 (oc)")
    assert recognise(model.graph.node(1).inputs[1]).bits == 3  # type: ignore[union-attr]


def test_the_file_gets_smaller(tmp_path: Path) -> None:
    model = linear(random(512, 256))
    ir.save(model.ir, tmp_path / "before.onnx")
    apply(model)
    ir.save(model.ir, tmp_path / "after.onnx")
    before, after = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("before", "after"))
    assert after < before * 4.4 / 32


def test_gemm_keeps_its_layout() -> None:
    weight, bias = random(40, 64), random(40, seed=1)
    model = parse(
        "g (float[N,64] x) => (float[N,40] y) <float[40,64] w = {0}, float[40] b = {0}>"
        "{ y = Gemm <transB = 1, alpha = 0.5> (x, w, b) }",
        w=weight,
        b=bias,
    )
    assert apply(model, group_size=32).count("passed") == 1
    encoding = weight_sites(model)[0].encoding
    assert encoding is not None
    assert (encoding.shape, encoding.axis, encoding.block_size) == ((40, 64), 1, 32)
    x = random(3, 64)
    np.testing.assert_allclose(run(model, x=x), 0.5 * x @ decode(encoding).T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("axis", ["oc", "ic"])
def test_convolutions_on_request(group_size: int, axis: str) -> None:
    def model() -> Model:
        return parse(
            """g (float[1,8,9,9] x) => (float[N,C,H,W] y) <float[16,4,3,3] w = {0}, float[16,12,2,2] v = {0}>
            { a = Conv <group = 2> (x, w)  y = ConvTranspose <group = 2> (a, v) }""",
            w=random(16, 4, 3, 3),
            v=random(16, 12, 2, 2),
        )

    left = apply(model())
    assert [item.kind for item in left.items] == ["missed"]
    assert left.items[0].text.startswith("2 convolution weights left in floating point")
    quantized = model()
    remarks = apply(quantized, kinds=("Conv", "ConvTranspose"), group_size=group_size, axis=axis, min_size=1)
    assert remarks.count("passed") == 2
    floating = model()
    for site, plain in zip(weight_sites(quantized), weight_sites(floating), strict=True):
        assert site.encoding is not None
        assert site.axis_of(site.encoding) == axis
        plain.graph.initializers[plain.name].const_value = ir.Tensor(decode(site.encoding))  # type: ignore[union-attr]
    x = random(1, 8, 9, 9)
    np.testing.assert_allclose(run(quantized, x=x), run(floating, x=x), rtol=1e-5, atol=1e-5)


TIED = """g (int64[T] ids) => (float[T,V] y) <float[64,32] w = {0}>
{ x = Gather (w, ids)  t = Transpose <perm = [1, 0]> (w)  y = MatMul (x, t) }"""


def test_embeddings_only_when_asked_also_tied_ones() -> None:
    model = parse(TIED, w=random(64, 32))
    (remark,) = apply(model).items
    assert (remark.kind, remark.where) == ("missed", "w")
    assert remark.text == "is an embedding table as well; ask for it with embeddings=true"
    (remark,) = apply(model, embeddings=True, group_size=16).items
    assert remark.kind == "passed"
    encoding = weight_sites(model)[0].encoding
    assert encoding is not None
    assert (encoding.axis, encoding.block_size) == (1, 16)
    decoded = decode(encoding)
    np.testing.assert_allclose(
        run(model, ids=np.array([5, 9])), decoded[[5, 9]] @ decoded.T, rtol=1e-5, atol=1e-5
    )


def test_a_second_run_says_what_is_there_already() -> None:
    model = linear(random(64, 32))
    apply(model, bits=8, min_size=0)
    (remark,) = apply(model).items
    assert (remark.kind, remark.text) == ("missed", "is already encoded, in 8 bits")


def test_reasons_to_leave_a_weight_alone() -> None:
    def only(model: Model, **options: Any) -> str:
        (remark,) = apply(model, **options).items
        assert remark.kind == "missed"
        assert "DequantizeLinear" not in {node.op_type for node in model.nodes()}
        return remark.text

    assert only(linear(random(16, 16))) == "has 256 elements, fewer than min_size=1024"
    assert "would grow" in only(linear(random(64, 64)), group_size=1)
    assert only(linear(random(64, 64)), skip=("w*",)) == "is named in skip"
    broken = random(64, 64)
    broken[5, 5] = np.nan
    assert "infinite or not a number" in only(linear(broken))
    shown = parse(
        "g (float[N,64] x) => (float[N,64] y, float[64,64] w) <float[64,64] w = {0}> { y = MatMul (x, w) }",
        w=random(64, 64),
    )
    assert only(shown) == "is read by graph output 'w' as well, so the original would have to stay"
    assert only(parse("g (float[N,N] x) => (float[N,N] y) { y = MatMul (x, x) }")) == "is a graph input"


def test_a_function_at_an_old_opset_is_left_alone() -> None:
    model = parse(
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {0}> { y = MatMul (x, w) }", w=random(64, 64)
    )
    model.ir.graph.opset_imports[""] = 20
    (remark,) = apply(model).items
    assert "opset 20" in remark.text


def test_overrides_give_some_weights_other_widths() -> None:
    model = parse(
        """g (float[N,64] x) => (float[N,64] y) <float[64,64] a = {0}, float[64,64] b = {0}, float[64,64] c = {0}>
        { h = MatMul (x, a)  i = MatMul (h, b)  [head] y = MatMul (i, c) }""",
        a=random(64, 64),
        b=random(64, 64),
        c=random(64, 64),
    )
    remarks = apply(model, overrides=("b=2", "hea?=8"), group_size=32)
    assert [remark.data["bits"] for remark in remarks.items] == [4, 2, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"overrides": ("w",)}, "override 'w' is not PATTERN=BITS"),
        ({"overrides": ("w=5",)}, "bits of 2, 3, 4, 8"),
        ({"kinds": ("Conv2d",)}, "kinds has 'Conv2d'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeRTN(**options)


@pytest.mark.parametrize("opset", [21, 25])
def test_two_bit_codes_take_two_bits_where_the_opset_has_them(opset: int) -> None:
    model = linear(random(64, 64))
    model.ir.graph.opset_imports[""] = opset
    (remark,) = apply(model, bits=2, group_size=32).items
    assert remark.data["stored_bits"] == (2 if opset == 25 else 4)
    decoded = decode(weight_sites(model)[0].encoding)  # type: ignore[arg-type]
    x = random(2, 64)
    np.testing.assert_allclose(run(model, x=x), x @ decoded, rtol=1e-5, atol=1e-5)


def test_half_precision_weights_keep_their_type() -> None:
    model = linear(random(64, 32).astype(np.float16))
    model.graph.inputs[0].type = model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    assert apply(model, group_size=16).count("passed") == 1
    encoding = weight_sites(model)[0].encoding
    assert encoding is not None
    assert encoding.scales.dtype == np.float16
    x = random(2, 64).astype(np.float16)
    expected = x.astype(np.float32) @ decode(encoding).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x).astype(np.float32), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_builder_survives(name: str) -> None:
    model = Model(BUILDERS[name]())
    assert raise_opset(model, 21) is None
    remarks = apply(
        model, kinds=("MatMul", "Gemm", "Conv", "ConvTranspose"), embeddings=True, group_size=16, min_size=64
    )
    assert remarks.items
    assert remarks.count("passed") == sum(site.encoding is not None for site in weight_sites(model))


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize(("bits", "file_bits"), [(3, 4.25), (4, 4.25), (8, 8.25)])
def test_the_report_says_what_a_weight_takes_in_the_file(axis: str, bits: int, file_bits: float) -> None:
    model = Model(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 21]>\n'
            "g (float[M,256] x, float[256,256] w) => (float[M,256] y) { y = MatMul(x, w) }"
        )
    )
    value = model.graph.inputs.pop()
    value.const_value = ir.Tensor(
        np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32), name="w"
    )
    model.graph.register_initializer(value)
    remarks = Remarks()
    QuantizeRTN(bits=bits, axis=axis).apply(model, remarks)
    (remark,) = remarks.items
    assert remark.data["effective_bits"] == bits + 0.25
    assert remark.data["file_bits"] == file_bits
    assert remark.data["bytes_after"] == 256 * 256 * file_bits / 8
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert stored == remark.data["bytes_after"]
    assert ("3.25 bits per weight (4.25 in the file)" in remark.text) == (bits == 3)


def test_weights_too_large_to_be_squared_have_no_ratio_of_squares() -> None:
    model = linear((np.random.default_rng(0).standard_normal((64, 32)) * 1e30).astype(np.float32))
    remarks = Remarks()
    QuantizeRTN(min_size=0, group_size=32).apply(model, remarks)
    assert [(r.kind, r.data["sqnr_db"]) for r in remarks.items] == [("passed", None)]

"""quantize-easyquant: the invariants of the method, hand-made graphs, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.encodings import decode, dequantize, unpack
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.ir.weights import weight_sites
from effic.passes.base import Remarks
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.easyquant import (
    EasyQuantized,
    Room,
    Search,
    easyquant,
    mean_and_deviation,
    measure,
    outlier_bounds,
)
from effic.passes.quantize.quantize_easyquant import QuantizeEasyQuant
from effic.passes.spec import parse_passes

BFLOAT16 = ir.DataType.BFLOAT16.numpy()


def parse(text: str, opset: int = 21, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def run(model: Model, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    data = ir.to_proto(model.ir).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, inputs)]


def weights(*shape: int, seed: int = 0, tails: int = 4) -> np.ndarray:
    """Student-t weights, whose tails make outliers."""
    return np.random.default_rng(seed).standard_t(tails, shape).astype(np.float32)


def apply(model: Model, **options: Any) -> Remarks:
    remarks = Remarks()
    QuantizeEasyQuant(**{"min_size": 0, **options}).apply(model, remarks)
    verify(model)
    return remarks


def linear(weight: np.ndarray, node: str = "y = MatMul (x, w)") -> Model:
    rows, columns = weight.shape
    return parse(
        f"g (float[N,K] x) => (float[N,M] y) <float[{rows},{columns}] w = {{0}}> {{ {node} }}", w=weight
    )


def quantized(
    matrix: np.ndarray,
    axis: int = 0,
    bits: int = 4,
    group: int = -1,
    sigma: float = 3.0,
    search: Search | None = None,
) -> EasyQuantized:
    storage = ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8
    done = easyquant(matrix, axis, Grid(bits, group, True, "absmax"), storage, sigma, search or Search())
    assert done is not None
    return done


def codes_of(done: EasyQuantized, shape: tuple[int, int], bits: int) -> np.ndarray:
    storage = ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8
    return unpack(done.packed, storage, shape[0] * shape[1]).reshape(shape)


def decoded(done: EasyQuantized, matrix: np.ndarray, axis: int, bits: int, group: int) -> np.ndarray:
    block = Grid(bits, group).block(matrix.shape[axis])
    codes = codes_of(done, matrix.shape, bits)
    out = dequantize(codes, done.scales, None, axis if block else 1 - axis, block)
    out.reshape(-1)[done.indices] = done.values
    return out


settings_of = {
    "seed": st.integers(0, 10**6),
    "shape": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "axis": st.sampled_from([0, 1]),
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group": st.sampled_from([-1, 1, 5, 8, 16]),
    "dtype": st.sampled_from([np.float32, np.float16, BFLOAT16]),
    "sigma": st.sampled_from([1.5, 2.5, 3.0]),
}


# -- the invariants of the method ----------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(**settings_of)
def test_outliers_are_bit_exact_and_their_codes_are_zero(
    seed: int, shape: tuple[int, int], axis: int, bits: int, group: int, dtype: Any, sigma: float
) -> None:
    matrix = weights(*shape, seed=seed).astype(dtype)
    done = quantized(matrix, axis, bits, group, sigma)
    wide = matrix.astype(np.float64)
    distance = np.abs(wide - wide.mean()) - sigma * wide.std()
    clear = np.abs(distance) > 1e-5 * wide.std()
    is_outlier = np.zeros(matrix.size, bool)
    is_outlier[done.indices] = True
    assert (is_outlier.reshape(shape) == (distance >= 0))[clear].all()
    assert (np.diff(done.indices) > 0).all()
    assert done.indices.dtype == np.int32
    assert done.values.dtype == matrix.dtype
    assert done.values.tobytes() == matrix.reshape(-1)[done.indices].tobytes()
    assert (codes_of(done, shape, bits).reshape(-1)[done.indices] == 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_outlier_fraction_is_under_one_percent_for_gaussian_weights(axis: int) -> None:
    matrix = np.random.default_rng(3).standard_normal((700, 500)).astype(np.float32) * 0.02
    fraction = quantized(matrix, axis).indices.size / matrix.size
    assert fraction == pytest.approx(0.0027, abs=0.0003)


@settings(deadline=None, max_examples=100)
@given(
    **settings_of,
    optimizer=st.sampled_from(["exact", "adam"]),
    steps=st.sampled_from([1, 2, 7]),
    rate=st.sampled_from([1e-3, 0.3]),
)
def test_error_is_never_above_that_of_the_first_scale_with_the_same_mask(
    seed: int,
    shape: tuple[int, int],
    axis: int,
    bits: int,
    group: int,
    dtype: Any,
    sigma: float,
    optimizer: Any,
    steps: int,
    rate: float,
) -> None:
    matrix = weights(*shape, seed=seed).astype(dtype)
    errors = []
    for search in (Search(optimizer, 0, rate), Search(optimizer, steps, rate)):
        done = quantized(matrix, axis, bits, group, sigma, search)
        # In double precision: what is compared is the result, not how it is rounded to the dtype.
        block = Grid(bits, group).block(matrix.shape[axis])
        where = axis if block else 1 - axis
        exact = dequantize(codes_of(done, shape, bits), done.scales.astype(np.float32), None, where, block)
        exact.reshape(-1)[done.indices] = done.values
        error = float(np.square(exact.astype(np.float64) - matrix.astype(np.float64)).sum())
        assert error == pytest.approx(done.noise, rel=1e-3, abs=1e-9)
        errors.append(error)
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-9


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 8]),
    optimizer=st.sampled_from(["exact", "adam"]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_error_does_not_increase_with_steps(seed: int, bits: int, optimizer: Any, dtype: Any) -> None:
    matrix = weights(90, 7, seed=seed).astype(dtype)
    noise = [quantized(matrix, 0, bits, search=Search(optimizer, n, 0.01)).noise for n in (0, 1, 2, 3, 6, 12)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(noise))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact_alternation_is_no_worse_than_adam(bits: int) -> None:
    matrix = weights(1024, 24, seed=bits)
    exact = quantized(matrix, 0, bits).noise
    adam = min(
        quantized(matrix, 0, bits, search=Search("adam", steps, rate)).noise
        for steps, rate in ((100, 1e-3), (100, 1e-2))
    )
    # 0.15 dB of slack: adam saw every weight, the start of the alternation a sample.
    assert exact <= adam * 10**0.015
    assert exact <= quantized(matrix, 0, bits, search=Search("adam", 100, 1e-3)).noise or bits == 8


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, 1.3])
def test_clamped_gradient_agrees_with_finite_differences(ratio: float) -> None:
    grid, rng = Grid(3), np.random.default_rng(1)
    lines = rng.uniform(-3, 3, (5, 64)).astype(np.float32)
    at = np.full(5, ratio, np.float32)
    # Off the points where a code jumps the error is smooth; the codes stay those of `ratio`.
    room = Room.of(lines.shape)
    here = measure(lines, at, grid, room)
    codes = room.codes.astype(np.float64)
    assert (np.abs(codes) <= 4).all()

    def error(r: float) -> np.ndarray:
        return np.square(r * codes - lines).sum(axis=1)

    numeric = (error(ratio + 1e-6) - error(ratio - 1e-6)) / 2e-6
    np.testing.assert_allclose(2 * here.slope, numeric, rtol=1e-4, atol=1e-4)
    if ratio == 0.5:
        # What the paper prints, the unclamped code, is something else where weights are clipped.
        unclamped = 2 * ((ratio * codes - lines) * np.rint(lines / ratio)).sum(axis=1)
        assert (np.abs(unclamped - numeric) > 1).all()


def test_result_is_deterministic_and_reads_no_data() -> None:
    first, second = linear(weights(96, 40)), linear(weights(96, 40))
    apply(first)
    apply(second)
    assert not hasattr(QuantizeEasyQuant, "calibrate")
    a, b = (ir.to_proto(m.ir).SerializeToString(deterministic=True) for m in (first, second))
    assert a == b


@pytest.mark.parametrize("optimizer", ["exact", "adam"])
def test_scale_of_the_weights_does_not_matter(optimizer: Any) -> None:
    matrix = weights(200, 6)
    base = quantized(matrix, search=Search(optimizer, 5))
    for power in (-100, -20, 20, 100):
        factor = np.float32(2.0**power)
        moved = quantized(matrix * factor, search=Search(optimizer, 5))
        np.testing.assert_array_equal(moved.packed, base.packed)
        np.testing.assert_array_equal(moved.scales, base.scales * factor)


@pytest.mark.parametrize("group", [-1, 7, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_and_columns_are_the_same_thing_turned(group: int, bits: int) -> None:
    matrix = weights(30, 22)
    one = decoded(quantized(matrix, 0, bits, group), matrix, 0, bits, group)
    turned = np.ascontiguousarray(matrix.T)
    other = decoded(quantized(turned, 1, bits, group), turned, 1, bits, group)
    np.testing.assert_array_equal(one, other.T)


@pytest.mark.parametrize(("rows", "columns"), [(3000, 150), (150, 3000), (9, 40001), (40001, 9)])
@pytest.mark.parametrize("axis", [0, 1])
def test_large_matrices_are_walked_over_in_pieces(rows: int, columns: int, axis: int) -> None:
    matrix = weights(rows, columns, tails=6)
    given: list[int] = []
    done = easyquant(matrix, axis, Grid(4), ir.DataType.INT4, 3.0, Search(), given.append)
    assert done is not None
    out = decoded(done, matrix, axis, 4, -1)
    error = float(np.square((out - matrix).astype(np.float64)).sum())
    assert error == pytest.approx(done.noise, rel=1e-3)
    assert 10 * np.log10(done.signal / done.noise) > 18
    assert given[-1] == rows


# -- edge cases ----------------------------------------------------------------------------------


def test_constant_weights_have_no_outliers() -> None:
    for value in (0.0, 0.1, -3.3, 1e-30, 1e30):
        matrix = np.full((700, 300), value, np.float32)
        assert mean_and_deviation(matrix) == (pytest.approx(value), 0.0)
        done = quantized(matrix)
        assert done.indices.size == 0
        np.testing.assert_allclose(decoded(done, matrix, 0, 4, -1), matrix, rtol=1e-6)
        assert done.noise <= 1e-9 * max(done.signal, 1e-300)


def test_bounds_are_those_of_exact_arithmetic() -> None:
    low, high = outlier_bounds(0.1, 1e-9, 3.0)
    assert float(low) <= 0.1 - 3e-9
    assert float(high) >= 0.1 + 3e-9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_is_not_finite_is_left_alone(value: float, dtype: Any) -> None:
    matrix = weights(40, 40).astype(dtype)
    matrix[33, 17] = value
    assert easyquant(matrix, 0, Grid(4), ir.DataType.INT4, 3.0, Search()) is None
    model = linear(matrix.astype(np.float32))
    remarks = apply(model)
    assert [(r.kind, r.text) for r in remarks.items] == [
        ("missed", "holds a weight that is infinite or not a number")
    ]
    assert [n.op_type for n in model.nodes()] == ["MatMul"]


def test_all_zero_weights_stay_zero() -> None:
    model = linear(np.zeros((64, 32), np.float32))
    remarks = apply(model)
    assert remarks.items[0].data["sqnr_db"] is None
    assert not run(model, x=np.ones((2, 64), np.float32))[0].any()


def test_a_matrix_of_mostly_outliers_is_left_alone() -> None:
    model = linear(weights(64, 32))
    remarks = apply(model, outlier_sigma=0.0)
    assert remarks.items[0].kind == "missed"
    assert "100.0 % of its weights are outliers" in remarks.items[0].text
    assert [n.op_type for n in model.nodes()] == ["MatMul"]


def test_a_tiny_layer_is_left_alone_unless_asked_for() -> None:
    model = linear(weights(8, 8))
    assert "min_size" in apply(model, min_size=1024).items[0].text
    assert apply(model, min_size=0).items[0].kind == "passed"


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="no zero points"):
        QuantizeEasyQuant(symmetric=False)
    with pytest.raises(UsageError, match="steps"):
        QuantizeEasyQuant(steps=-2)
    with pytest.raises(UsageError, match="optimizer"):
        parse_passes("quantize-easyquant{optimizer=sgd}")


# -- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["y = MatMul (x, w)", "y = Gemm (x, w)", "y = Gemm<transB=1> (x, w)"])
@pytest.mark.parametrize(("bits", "group"), [(4, -1), (3, 16), (2, -1), (8, -1)])
def test_graph_computes_with_the_decoded_weight(node: str, bits: int, group: int) -> None:
    matrix = weights(48, 72)
    model = linear(matrix, node)
    (remark,) = apply(model, bits=bits, group_size=group).items
    (site,) = weight_sites(model)
    assert site.encoding is not None
    assert site.encoding.outliers is not None
    weight = decode(site.encoding)
    turned = "transB" in node
    x = weights(3, 72 if turned else 48, seed=5)
    want = x @ (weight.T if turned else weight)
    np.testing.assert_allclose(run(model, x=x)[0], want, rtol=1e-4, atol=1e-4)
    share = site.encoding.outliers.indices.size / matrix.size
    assert remark.data["outlier_fraction"] == share > 0
    assert "kept exact" in remark.text
    # Code, position and value; a scale per channel.
    scales = site.encoding.scales.size
    expected = bits + 64 * share + 32 * scales / matrix.size
    assert remark.data["effective_bits"] == pytest.approx(expected, abs=1e-3)
    assert remark.data["group_size"] == group
    assert (remark.data["method"], remark.data["axis"], remark.data["symmetric"]) == ("easyquant", "oc", True)


def test_convolutions_on_request() -> None:
    text = "g (float[1,3,9,9] x) => (float[1,40,7,7] y) <float[40,3,3,3] w = {0}> { y = Conv (x, w) }"
    matrix = weights(40, 3, 3, 3)
    model = parse(text, w=matrix)
    assert apply(model).count("passed") == 0
    assert apply(model, kinds=("Conv",)).count("passed") == 1
    (site,) = weight_sites(model)
    assert site.encoding is not None
    x = weights(1, 3, 9, 9, seed=1)
    want = run(parse(text, w=decode(site.encoding)), x=x)[0]
    np.testing.assert_allclose(run(model, x=x)[0], want, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(decode(site.encoding) - matrix) < 0.2 * np.linalg.norm(matrix)


def test_tied_embedding_is_encoded_once_when_asked() -> None:
    text = (
        "g (int64[N] ids) => (float[N,60] y) <float[60,40] w = {0}> "
        "{ e = Gather (w, ids)  t = Transpose<perm=[1,0]> (w)  y = MatMul (e, t) }"
    )
    model = parse(text, w=weights(60, 40))
    assert "embedding" in apply(model).items[0].text
    assert apply(model, embeddings=True).count("passed") == 1
    (site,) = weight_sites(model)
    assert site.encoding is not None
    table, ids = decode(site.encoding), np.array([0, 59, 7])
    np.testing.assert_allclose(run(model, ids=ids)[0], table[ids] @ table.T, rtol=1e-4, atol=1e-4)


def test_weights_in_branches_and_as_graph_outputs() -> None:
    text = (
        "g (float[2,40] x, bool c) => (float[2,40] y, float[40,40] w) <float[40,40] w = {0}, float[40,40] v = {0}> "
        "{ y = If (c) <then_branch = a () => (float[2,40] p) { p = MatMul (x, w) }, "
        "else_branch = b () => (float[2,40] q) { q = MatMul (x, v) }> }"
    )
    first, second = weights(40, 40), weights(40, 40, seed=1)
    model = parse(text, w=first, v=second)
    remarks = apply(model)
    assert [(r.where, r.kind) for r in remarks.items] == [("w", "missed"), ("v", "passed")]
    x = weights(2, 40, seed=2)
    y, weight = run(model, x=x, c=np.array(True))
    np.testing.assert_array_equal(weight, first)
    np.testing.assert_allclose(y, x @ first, rtol=1e-4, atol=1e-4)


def test_half_precision_weights_keep_their_type() -> None:
    matrix = weights(64, 48).astype(np.float16)
    text = "g (float16[N,64] x) => (float16[N,48] y) <float16[64,48] w = {0}> { y = MatMul (x, w) }"
    model = parse(text, w=matrix)
    apply(model)
    (site,) = weight_sites(model)
    assert site.encoding is not None
    assert site.encoding.outliers is not None
    assert site.encoding.outliers.values.dtype == site.encoding.scales.dtype == np.float16


def test_text_form_round_trips() -> None:
    (item,) = parse_passes("quantize-easyquant{bits=3,outlier_sigma=2.5,optimizer=adam,steps=500,lr=0.0001}")
    assert item == QuantizeEasyQuant(bits=3, outlier_sigma=2.5, optimizer="adam", steps=500, lr=1e-4)

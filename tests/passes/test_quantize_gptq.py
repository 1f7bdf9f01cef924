"""quantize-gptq on graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.encodings import decode, recognise
from effic.ir.errors import UsageError
from effic.ir.evaluate import run_session, start_session
from effic.ir.model import Model
from effic.ir.verify import problems
from effic.ir.weights import weight_sites
from effic.passes.base import Remark, Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.gptq import gptq
from effic.passes.quantize.quantize_gptq import QuantizeGPTQ
from effic.passes.quantize.quantize_rtn import QuantizeRTN


def parse(text: str, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def correlated(rng: np.random.Generator, *shape: int) -> np.ndarray:
    size = shape[-1]
    mix = np.eye(size) + rng.standard_normal((size, size)) / np.sqrt(size)
    return (rng.standard_normal(shape) @ mix).astype(np.float32)


def weight(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


LINEAR = "g (float[t, 48] x) => (float[t, 40] y) <float[48, 40] w = {0}> { y = MatMul(x, w) }"


def apply(item: Any, model: Model, data: Calibration) -> list[Remark]:
    remarks = Remarks()
    item.apply_with(model, data, remarks)
    assert not list(problems(model))
    return remarks.items


def output(model: Model, **inputs: np.ndarray) -> np.ndarray:
    session = start_session(ir.to_proto(model.ir).SerializeToString())
    return next(iter(run_session(session, inputs).values()))


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 20, -1])
def test_the_file_means_what_the_arrays_say(axis: str, symmetric: bool, group_size: int) -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, 48, 40), correlated(rng, 300, 48)
    model = parse(LINEAR, w=w)
    item = QuantizeGPTQ(group_size=group_size, symmetric=symmetric, axis=axis)  # type: ignore[arg-type]
    (remark,) = apply(item, model, Calibration.of([{"x": x}]))
    assert remark.kind == "passed"
    result = gptq(w.T, (x.T @ x / 300)[None], Grid(4, group_size, symmetric), axis)  # type: ignore[arg-type]
    (site,) = weight_sites(model)
    encoding = site.encoding
    assert encoding is not None
    assert encoding.symmetric == symmetric
    exact = decode(encoding)
    noise = np.sum((x @ (w - exact)) ** 2)
    signal = np.sum((x @ w) ** 2)
    assert remark.data["output_sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), abs=0.02)
    assert noise == pytest.approx(
        result.loss * 300 - 0.01 * np.sum(x**2) / 48 * np.sum((w - exact) ** 2), rel=0.02
    )
    assert remark.data["method"] == "gptq"
    assert remark.data["damping"] == 0.01
    assert remark.data["fallback"] is None
    assert remark.data["axis"] == axis
    assert np.allclose(output(model, x=x), x @ exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize(
    "text",
    [
        LINEAR,
        "g (float[t, 48] x) => (float[t, 40] y) <float[40, 48] w = {0}> { y = Gemm <transB = 1> (x, w) }",
        "g (float[48, t] x) => (float[40, t] y) <float[40, 48] w = {0}> { y = MatMul(w, x) }",
        "g (float[48, t] x) => (float[t, 40] y) <float[48, 40] w = {0}> { y = Gemm <transA = 1> (x, w) }",
        "g (float[t, 48] x) => (float[t, 40] y) <float[40, 48] w = {0}> "
        "{ v = Transpose <perm = [1, 0]> (w) y = MatMul(x, v) }",
    ],
)
def test_better_than_rounding_to_nearest_whichever_way_the_weight_lies(text: str, axis: Any) -> None:
    rng = np.random.default_rng(0)
    shape = (40, 48) if "float[40, 48] w" in text else (48, 40)
    w, x = weight(rng, *shape), correlated(rng, 300, 48)
    feed = x.T.copy() if "[48, t] x" in text else x
    errors = []
    for item in (QuantizeGPTQ(group_size=16, axis=axis), QuantizeRTN(group_size=16, axis=axis)):
        model = parse(text, w=w)
        exact = output(model, x=feed)
        if isinstance(item, QuantizeGPTQ):
            apply(item, model, Calibration.of([{"x": feed}]))
        else:
            item.apply(model, Remarks())
        errors.append(np.mean((output(model, x=feed) - exact) ** 2))
    assert errors[0] < 0.8 * errors[1]


CONVOLUTIONS = [
    ("Conv", 1, (24, 16, 3, 3)),
    ("Conv", 4, (24, 4, 3, 3)),
    ("ConvTranspose", 1, (16, 24, 3, 3)),
    ("ConvTranspose", 4, (16, 6, 3, 3)),
]


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize(("kind", "groups", "shape"), CONVOLUTIONS)
def test_convolutions_have_a_second_moment_per_group(
    kind: str, groups: int, shape: tuple[int, ...], axis: Any
) -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, *shape)
    x = np.moveaxis(correlated(rng, 4, 8, 8, 16), -1, 1).copy()
    text = (
        f"g (float[n, 16, 8, 8] x) => (float[n, 24, h, v] y) <float{list(shape)} w = {{0}}> "
        f"{{ y = {kind} <group = {groups}> (x, w) }}"
    )
    errors = []
    for item in (
        QuantizeGPTQ(group_size=12, axis=axis, kinds=(kind,), min_size=0),
        QuantizeRTN(group_size=12, axis=axis, kinds=(kind,), min_size=0),
    ):
        model = parse(text, w=w)
        exact = output(model, x=x)
        if isinstance(item, QuantizeGPTQ):
            (remark,) = apply(item, model, Calibration.of([{"x": x}]))
            assert remark.kind == "passed"
            assert remark.data["fallback"] is None
        else:
            item.apply(model, Remarks())
        errors.append(np.mean((output(model, x=x) - exact) ** 2))
    assert errors[0] < errors[1]


def test_a_depthwise_convolution_with_silent_channels_says_so() -> None:
    rng = np.random.default_rng(0)
    x = weight(rng, 2, 16, 8, 8)
    x[:, [3, 5]] = 0
    w = weight(rng, 16, 1, 3, 3)
    text = (
        "g (float[n, 16, 8, 8] x) => (float[n, 16, h, v] y) <float[16, 1, 3, 3] w = {0}> "
        "{ y = Conv <group = 16> (x, w) }"
    )
    model = parse(text, w=w)
    item = QuantizeGPTQ(group_size=-1, kinds=("Conv",), min_size=0)
    (remark,) = apply(item, model, Calibration.of([{"x": x}]))
    assert remark.data["fallback"].startswith("2 of 16 groups rounded to nearest")
    assert remark.data["fallback"] in remark.text
    (site,) = weight_sites(model)
    assert site.encoding is not None
    assert decode(site.encoding)[3].any(), "what was never seen is not made zero"


CHAIN = (
    "g (float[t, 32] x) => (float[t, 32] y) <float[32, 32] a = {0}, float[32, 32] b = {0}> "
    "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
)


def test_propagation_calibrates_behind_quantized_layers() -> None:
    rng = np.random.default_rng(0)
    a, b, x = weight(rng, 32, 32), weight(rng, 32, 32), correlated(rng, 300, 32)
    codes = {}
    for propagate in (True, False):
        model = parse(CHAIN, a=a, b=b)
        apply(QuantizeGPTQ(bits=2, group_size=16, propagate=propagate), model, Calibration.of([{"x": x}]))
        first, second = weight_sites(model)
        assert first.encoding is not None
        assert second.encoding is not None
        hidden = np.maximum(x @ (decode(first.encoding) if propagate else a), 0)
        expected = gptq(b.T, (hidden.T @ hidden / 300)[None], Grid(2, 16), "oc")
        mine = decode(second.encoding)
        again = parse(LINEAR.replace("48", "32").replace("40", "32"), w=b)
        apply(QuantizeGPTQ(bits=2, group_size=16), again, Calibration.of([{"x": hidden}]))
        (alone,) = weight_sites(again)
        assert alone.encoding is not None
        assert np.mean(mine != decode(alone.encoding)) < 0.01
        assert expected.fallback is None
        codes[propagate] = mine
    assert np.mean(codes[True] != codes[False]) > 0.01


def test_a_tied_table_uses_the_statistics_of_its_matmul() -> None:
    rng = np.random.default_rng(0)
    text = (
        "g (int64[t] ids) => (float[t, 64] y) <float[64, 32] table = {0}> "
        "{ e = Gather(table, ids) v = Transpose <perm = [1, 0]> (table) y = MatMul(e, v) }"
    )
    data = Calibration.of([{"ids": rng.integers(0, 64, 200)}])
    model = parse(text, table=weight(rng, 64, 32))
    assert [r.kind for r in apply(QuantizeGPTQ(group_size=16), model, data)] == ["missed"]
    (remark,) = apply(QuantizeGPTQ(group_size=16, embeddings=True), model, data)
    assert remark.data["method"] == "gptq"
    assert remark.data["output_sqnr_db"] > 15


def test_a_table_that_is_only_looked_up_is_rounded_to_nearest() -> None:
    rng = np.random.default_rng(0)
    text = (
        "g (int64[t] ids) => (float[t, 40] y) <float[64, 32] table = {0}, float[32, 40] w = {0}> "
        "{ e = Gather(table, ids) y = MatMul(e, w) }"
    )
    model = parse(text, table=weight(rng, 64, 32), w=weight(rng, 32, 40))
    data = Calibration.of([{"ids": rng.integers(0, 64, 200)}])
    table, layer = apply(QuantizeGPTQ(group_size=16, embeddings=True), model, data)
    assert (table.data["method"], layer.data["method"]) == ("rtn", "gptq")
    assert table.data["fallback"] == "rounded to nearest: a table of rows, which no activation multiplies"


def test_a_weight_used_twice_has_the_statistics_of_both_uses() -> None:
    rng = np.random.default_rng(0)
    text = (
        "g (float[t, 48] x, float[t, 48] z) => (float[t, 40] y) <float[48, 40] w = {0}> "
        "{ a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }"
    )
    w, x, z = weight(rng, 48, 40), correlated(rng, 200, 48), correlated(rng, 200, 48)
    model = parse(text, w=w)
    (remark,) = apply(QuantizeGPTQ(group_size=16), model, Calibration.of([{"x": x, "z": z}]))
    (site,) = weight_sites(model)
    assert site.encoding is not None
    delta = w - decode(site.encoding)
    both = np.concatenate([x, z])
    expected = 10 * np.log10(np.sum((both @ w) ** 2) / np.sum((both @ delta) ** 2))
    assert remark.data["output_sqnr_db"] == pytest.approx(expected, abs=0.02)


def test_a_weight_in_a_subgraph_is_missed_with_the_reason() -> None:
    rng = np.random.default_rng(0)
    text = """
    g (float[4, 48] x, bool c) => (float[4, 40] y) <float[48, 40] w = {0}>
    { y = If (c) <
        then_branch = t () => (float[4, 40] p) { p = MatMul(x, w) },
        else_branch = e () => (float[4, 40] q) { q = MatMul(x, w) }
      > }"""
    model = parse(text, w=weight(rng, 48, 40))
    data = Calibration.of([{"x": weight(rng, 4, 48), "c": np.array(True)}])
    (remark,) = apply(QuantizeGPTQ(), model, data)
    assert remark.kind == "missed"
    assert "cannot be observed" in remark.text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_missed(bad: float) -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, 48, 40)
    w[3, 4] = bad
    (remark,) = apply(QuantizeGPTQ(), parse(LINEAR, w=w), Calibration.of([{"x": weight(rng, 9, 48)}]))
    assert (remark.kind, remark.text) == ("missed", "holds a weight that is infinite or not a number")


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_constant_layers_are_exact(value: float) -> None:
    rng = np.random.default_rng(0)
    w, x = np.full((48, 40), value, np.float32), correlated(rng, 20, 48)
    model = parse(LINEAR, w=w)
    (remark,) = apply(QuantizeGPTQ(), model, Calibration.of([{"x": x}]))
    assert remark.kind == "passed"
    assert np.allclose(output(model, x=x), x @ w, rtol=1e-5, atol=1e-5)


def test_fewer_rows_than_inputs_are_damped() -> None:
    rng = np.random.default_rng(0)
    x = weight(rng, 5, 48)
    model = parse(LINEAR, w=weight(rng, 48, 40))
    (remark,) = apply(QuantizeGPTQ(group_size=16), model, Calibration.of([{"x": x}]))
    assert remark.data["fallback"] is None
    assert remark.data["output_sqnr_db"] > remark.data["sqnr_db"]


def test_silent_inputs_fall_back_and_say_so() -> None:
    model = parse(LINEAR, w=weight(np.random.default_rng(0), 48, 40))
    rounded = model.clone()
    data = Calibration.of([{"x": np.zeros((5, 48), np.float32)}])
    (remark,) = apply(QuantizeGPTQ(group_size=16), model, data)
    assert remark.data["fallback"] == "rounded to nearest: its inputs were zero on all the data"
    QuantizeRTN(group_size=16).apply(rounded, Remarks())
    x = np.eye(48, dtype=np.float32)
    assert np.array_equal(output(model, x=x), output(rounded, x=x))


@pytest.mark.parametrize("dtype", [np.float16])
def test_half_precision_weights_keep_their_dtype(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = correlated(rng, 100, 48).astype(dtype)
    text = LINEAR.replace("float[", "float16[")
    model = parse(text, w=weight(rng, 48, 40, dtype=dtype))
    (remark,) = apply(QuantizeGPTQ(group_size=16), model, Calibration.of([{"x": x}]))
    assert remark.kind == "passed"
    encoding = recognise(weight_sites(model)[0].value)
    assert encoding is not None
    assert encoding.scales.dtype == dtype


def test_overrides_skip_and_a_second_run() -> None:
    rng = np.random.default_rng(0)
    model = parse(CHAIN, a=weight(rng, 32, 32), b=weight(rng, 32, 32))
    data = Calibration.of([{"x": correlated(rng, 100, 32)}])
    item = QuantizeGPTQ(overrides=("a=8g16",), skip=("b",))
    first = {r.where: r for r in apply(item, model, data)}
    assert (first["a"].data["bits"], first["a"].data["group_size"]) == (8, 16)
    assert first["b"].kind == "missed"
    assert not [r for r in apply(item, model, data) if r.kind == "passed"]


def test_refused_act_order_with_groups_that_are_not_static() -> None:
    with pytest.raises(UsageError, match="act_order=true needs static_groups=true"):
        QuantizeGPTQ(static_groups=False)
    assert QuantizeGPTQ(static_groups=False, act_order=False)


def test_refused_without_data() -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        QuantizeGPTQ().apply(parse(LINEAR, w=np.zeros((48, 40), np.float32)), Remarks())

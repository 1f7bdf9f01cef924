"""Compressed weights with exact outliers on ort-cpu: every form against the decoded weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import effic
from effic.backends.ort.decode_at_load import runtime_dequantized
from effic.backends.ort.outlier_forms import EXACT_FORMS, corrections, costs
from effic.ir.encodings import Encoding, Outliers, code_tensor, decode
from effic.ir.evaluate import start_session
from effic.ir.model import Model
from effic.passes.base import Remarks
from tests.backends.test_lower_encodings import activations, distance, lower, make_model, ops, run

SPLIT = ("coo", "gather", "ell")


def encoding_of(
    shape: tuple[int, int],
    count: int = 40,
    *,
    k_axis: int = 0,
    bits: int = 4,
    group: int = 0,
    zero_below: bool = True,
    dtype: type = np.float32,
    unsigned: bool = False,
    seed: int = 0,
) -> Encoding:
    """A scale per output channel (or groups), ``count`` outliers of about ten times the other weights."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    codes = rng.integers(0, 2 * half, shape) if unsigned else rng.integers(-half, half, shape)
    codes = codes.astype(np.uint8 if unsigned else np.int8)
    places = np.sort(rng.choice(codes.size, count, replace=False)).astype(np.int32)
    if zero_below:
        codes.reshape(-1)[places] = 0
    values = (rng.standard_normal(count) * 10).astype(dtype)
    channels = shape[1 - k_axis]
    parameter_shape: tuple[int, ...] = (channels,)
    if group:
        parameter_shape = tuple(-(-d // group) if i == k_axis else d for i, d in enumerate(shape))
    scales = ((rng.random(parameter_shape) + 0.5) / half).astype(dtype)
    zeros = rng.integers(0, 2 * half, parameter_shape).astype(np.uint8) if unsigned else None
    kind = {4: ir.DataType.UINT4 if unsigned else ir.DataType.INT4, 8: ir.DataType.INT8}[max(bits, 4)]
    return Encoding(
        code_tensor(codes, kind),
        scales,
        zeros,
        k_axis if group else 1 - k_axis,
        group,
        bits,
        shape,
        outliers=Outliers(places, values),
        weight="w",
    )


def linear(
    encoding: Encoding, op: str = "y = MatMul(x, w)", x_shape: str = "M,K", kind: str = "float"
) -> Model:
    rows, columns = encoding.shape
    text = f"g ({kind}[{x_shape}] x, {kind}[{rows},{columns}] w) => ({kind} y) {{ {op} }}"
    return make_model(text, {"w": encoding})


def forms_of(remarks: Remarks) -> list[str]:
    return [r.data["form"] for r in remarks.items if "form" in r.data]


@pytest.mark.parametrize("form", [*SPLIT, "requantize", "fold", "auto"])
@pytest.mark.parametrize(("k", "n"), [(256, 64), (300, 37), (700, 1), (1, 9), (33, 130)])
@pytest.mark.parametrize("k_axis", [0, 1])
def test_every_form_equals_the_decoded_weight(form: str, k: int, n: int, k_axis: int) -> None:
    encoding = encoding_of((k, n) if k_axis == 0 else (n, k), min(40, k * n // 3), k_axis=k_axis)
    op = "y = MatMul(x, w)" if k_axis == 0 else "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"
    weight = decode(encoding).astype(np.float64)
    weight = weight if k_axis == 0 else weight.T
    x = activations(3, k)
    for level, tolerance in ((0, 1e-5), (4, 2e-2)):
        if form == "requantize" and level == 0:
            continue
        model = linear(encoding, op)
        lower(model, f"ort-cpu{{outliers={form},accuracy_level={level}}}")
        assert distance(x @ weight, run(model, {"x": x})[0]) < tolerance
        assert distance(x @ weight, run(model, {"x": x}, optimize=False)[0]) < tolerance
        assert runtime_dequantized(model) == []
        if form in SPLIT:
            assert "MatMulNBits" in ops(model)
            assert "ScatterElements" in ops(model) or form != "coo"


@pytest.mark.parametrize("form", SPLIT)
def test_outliers_count_exactly_at_accuracy_level_4(form: str) -> None:
    # Zero codes: all that is left of the product are the outliers, which the kernel never sees.
    base = encoding_of((128, 24))
    encoding = Encoding(
        code_tensor(np.zeros((128, 24), np.int8), ir.DataType.INT4),
        base.scales,
        None,
        1,
        0,
        4,
        (128, 24),
        outliers=base.outliers,
        weight="w",
    )
    model = linear(encoding)
    lower(model, f"ort-cpu{{outliers={form}}}")
    x = activations(5, 128)
    assert distance(x.astype(np.float64) @ decode(encoding), run(model, {"x": x})[0]) < 1e-6


@pytest.mark.parametrize("form", [*SPLIT, "requantize"])
@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ("K", (64,)),
        ("1,K", (1, 64)),
        ("M,64", (0, 64)),
        ("M,64", (5, 64)),
        ("1,1,64", (1, 1, 64)),
        ("B,T,64", (2, 3, 64)),
        ("2,T,64", (2, 3, 64)),
        ("A,B,T,64", (2, 1, 3, 64)),
    ],
)
def test_batch_dimensions(form: str, declared: str, shape: tuple[int, ...]) -> None:
    encoding = encoding_of((64, 24))
    model = linear(encoding, x_shape=declared)
    lower(model, f"ort-cpu{{outliers={form}}}")
    x = activations(*shape)
    want = x.astype(np.float64) @ decode(encoding)
    got = run(model, {"x": x})[0]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-2 * max(np.abs(want).max(initial=0), 1))


@pytest.mark.parametrize("form", [*SPLIT, "requantize"])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm(form: str, trans_b: int, alpha: float, beta: float, bias: bool) -> None:
    encoding = encoding_of((24, 64) if trans_b else (64, 24), k_axis=trans_b)
    rows, columns = encoding.shape
    declared, third = (", float[24] c", ", c") if bias else ("", "")
    text = (
        f"g (float[M,64] x, float[{rows},{columns}] w{declared}) => (float[M,24] y) "
        f"{{ y = Gemm<transB={trans_b}, alpha={alpha}, beta={beta}>(x, w{third}) }}"
    )
    model = make_model(text, {"w": encoding})
    level = 4 if form == "requantize" else 0
    lower(model, f"ort-cpu{{outliers={form},accuracy_level={level}}}")
    feeds = {"x": activations(3, 64)}
    weight = decode(encoding).astype(np.float64)
    want = alpha * (feeds["x"] @ (weight.T if trans_b else weight))
    if bias:
        feeds["c"] = activations(24, seed=9)
        want = want + beta * feeds["c"]
    assert "Gemm" not in ops(model)
    assert distance(want, run(model, feeds)[0]) < (1e-5 if level == 0 else 2e-2)


@pytest.mark.parametrize("form", [*SPLIT, "requantize"])
def test_tied_products_share_codes_and_outliers(form: str) -> None:
    encoding = encoding_of((64, 64))
    model = linear(encoding, "a = MatMul(x, w) b = MatMul(a, w) y = Add(a, b)")
    remarks = lower(model, f"ort-cpu{{outliers={form}}}")
    assert forms_of(remarks) == [form]
    first, second = model.nodes("MatMulNBits", domain="com.microsoft")
    assert list(first.inputs[1:3]) == list(second.inputs[1:3])
    names = [
        name for name in model.graph.initializers if "outlier_values" in name or "outlier_matrix" in name
    ]
    # Channels full of outliers, and those of the other channels.
    assert len(names) == {"requantize": 0, "gather": 2}.get(form, 1)
    x = activations(2, 64)
    weight = decode(encoding).astype(np.float64)
    assert distance(x @ weight + x @ weight @ weight, run(model, {"x": x})[0]) < 3e-2


def test_one_weight_read_both_ways_round() -> None:
    encoding = encoding_of((64, 64))
    model = linear(encoding, "a = MatMul(x, w) t = Transpose<perm=[1,0]>(w) b = MatMul(a, t) y = Add(a, b)")
    weight = decode(encoding).astype(np.float64)
    x = activations(2, 64)
    want = x @ weight + x @ weight @ weight.T
    lower(model, "ort-cpu{outliers=coo,accuracy_level=0}")
    assert distance(want, run(model, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize("form", SPLIT)
def test_codes_below_outliers_need_not_be_zero(form: str) -> None:
    for unsigned in (False, True):
        encoding = encoding_of((64, 24), zero_below=False, unsigned=unsigned)
        model = linear(encoding)
        lower(model, f"ort-cpu{{outliers={form},accuracy_level=0}}")
        x = activations(2, 64)
        assert distance(x.astype(np.float64) @ decode(encoding), run(model, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize(("bits", "group"), [(3, 0), (4, 32), (4, 48), (2, 0), (8, 0)])
@pytest.mark.parametrize("form", SPLIT)
def test_other_widths_and_groups(bits: int, group: int, form: str) -> None:
    encoding = encoding_of((200, 24), bits=bits, group=group)
    model = linear(encoding)
    lower(model, f"ort-cpu{{outliers={form}}}")
    assert "MatMulNBits" in ops(model)
    x = activations(2, 200)
    assert distance(x.astype(np.float64) @ decode(encoding), run(model, {"x": x})[0]) < 2e-2


@pytest.mark.parametrize("form", [*SPLIT, "requantize"])
def test_fp16_model(form: str) -> None:
    encoding = encoding_of((64, 24), dtype=np.float16)
    model = linear(encoding, "y = MatMul(x, w)", "M,64", "float16")
    lower(model, f"ort-cpu{{outliers={form}}}")
    assert "MatMulNBits" in ops(model)
    x = activations(3, 64).astype(np.float16)
    got = run(model, {"x": x})[0]
    assert got.dtype == np.float16
    assert distance(x.astype(np.float64) @ decode(encoding).astype(np.float64), got) < 2e-2


def test_compact_types() -> None:
    encoding = encoding_of((64, 24))
    assert encoding.outliers is not None
    halves = Outliers(
        encoding.outliers.indices, encoding.outliers.values.astype(np.float16).astype(np.float32)
    )
    for outliers, kind in ((encoding.outliers, ir.DataType.FLOAT), (halves, ir.DataType.FLOAT16)):
        given = Encoding(encoding.codes, encoding.scales, None, 1, 0, 4, (64, 24), outliers, "w")
        model = linear(given)
        lower(model, "ort-cpu{outliers=coo}")
        values = model.graph.initializers
        kinds = sorted((name[:15], value.dtype.name) for name, value in values.items() if "outlier" in name)
        assert kinds == [
            ("w.outlier_colum", "UINT16"),
            ("w.outlier_rows", "UINT16"),
            ("w.outlier_value", kind.name),
        ]


def test_weight_without_outliers_is_not_touched() -> None:
    encoding = encoding_of((64, 24), 0)
    model = linear(encoding)
    lower(model, "ort-cpu{outliers=coo,accuracy_level=0}")
    assert ops(model) == ["MatMulNBits"]
    x = activations(2, 64)
    assert distance(x.astype(np.float64) @ decode(encoding), run(model, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("t = Gather(w, i) p = MatMul(x, w) y = Concat<axis=0>(t, p)", "decoded for Gather as well"),
        ("y = MatMul(w, x)", "left side of MatMul"),
        ("y = Gemm<transA=1>(x, w)", "transA"),
    ],
)
def test_weights_that_are_decoded_anyway_are_folded(op: str, reason: str) -> None:
    encoding = encoding_of((32, 32))
    text = f"g (float[32,32] x, int64[T] i, float[32,32] w) => (float y) {{ {op} }}"
    model, plain = make_model(text, {"w": encoding}), make_model(text, {"w": encoding})
    remarks = lower(model, "ort-cpu{outliers=coo}")
    assert reason in remarks.items[0].text
    assert runtime_dequantized(model) == []
    feeds = {"x": activations(32, 32), "i": np.array([3, 4])}
    want = run(plain, feeds, optimize=False)[0]
    np.testing.assert_allclose(run(model, feeds)[0], want, rtol=1e-4, atol=1e-4)


def test_weight_that_is_a_graph_output_keeps_its_outliers() -> None:
    encoding = encoding_of((64, 24))
    model = linear(encoding)
    (matmul,) = model.nodes("MatMul")
    model.graph.outputs.append(matmul.inputs[1])
    remarks = lower(model, "ort-cpu{outliers=requantize}")
    assert "graph's output" in remarks.items[0].text
    np.testing.assert_array_equal(run(model, {"x": activations(1, 64)})[1], decode(encoding))


def test_eight_bits_need_accuracy_level_4() -> None:
    for options in ("outliers=requantize,accuracy_level=0", "outliers=coo,accuracy_level=0"):
        encoding = encoding_of((64, 24), bits=8 if "coo" in options else 4)
        model = linear(encoding)
        remarks = lower(model, f"ort-cpu{{{options}}}")
        assert "accuracy level 0" in remarks.items[0].text
        assert "MatMulNBits" not in ops(model)
        x = activations(2, 64)
        assert distance(x.astype(np.float64) @ decode(encoding), run(model, {"x": x})[0]) < 1e-5


def test_weights_in_branches() -> None:
    encoding = encoding_of((64, 64))
    text = (
        "g (float[2,64] x, bool c, float[64,64] w) => (float[2,64] y) "
        "{ y = If (c) <then_branch = a () => (float[2,64] p) { p = MatMul(x, w) }, "
        "else_branch = b () => (float[2,64] q) { s = Neg(x) q = MatMul(s, w) }> }"
    )
    for form in (*SPLIT, "requantize"):
        model = make_model(text, {"w": encoding})
        lower(model, f"ort-cpu{{outliers={form}}}")
        assert ops(model).count("MatMulNBits") == 2
        x = activations(2, 64)
        for flag in (True, False):
            want = (1 if flag else -1) * (x.astype(np.float64) @ decode(encoding))
            assert distance(want, run(model, {"x": x, "c": np.array(flag)})[0]) < 2e-2


# -- the choice ----------------------------------------------------------------------------------


def test_auto_takes_the_cheapest_exact_form_and_says_what_the_others_cost() -> None:
    large = encoding_of((2048, 2048), 12000)
    for shape, form in (("M,2048", "coo"), ("1,2048", "coo"), ("1,200,2048", "fold")):
        (remark, *_) = lower(linear(large, x_shape=shape)).items
        assert f"form {form}" in remark.text
        assert "requantize" in remark.text
        assert ("does not say" in remark.text) == (shape[0] == "M")
        if form == "coo":
            assert min(EXACT_FORMS, key=remark.data["expected_us"].get) == form == remark.data["form"]
            assert "0.29 % exact weights" in remark.text
    # Outliers in few input channels.
    rng = np.random.default_rng(0)
    places = np.append(rng.choice(8 * 2048, 11999, replace=False), 2047 * 2048)
    places = np.sort(places).astype(np.int32)
    assert large.outliers is not None
    clustered = Encoding(
        large.codes, large.scales, None, 1, 0, 4, large.shape, Outliers(places, large.outliers.values), "w"
    )
    model = linear(clustered)
    assert forms_of(lower(model, "ort-cpu{accuracy_level=0}"))[0] == "gather"
    # All but the one in a channel of its own.
    assert {"MatMul", "ScatterElements"} <= set(ops(model))
    x = activations(2, 2048)
    assert distance(x.astype(np.float64) @ decode(clustered), run(model, {"x": x})[0]) < 1e-5
    # A small matrix is faster decoded.
    small = lower(linear(encoding_of((64, 24))))
    assert "form fold, expected to be faster" in small.items[0].text


def test_costs_grow_with_what_the_forms_work_on() -> None:
    sparse = corrections(encoding_of((512, 512), 900), 0)
    one, many = costs(sparse, 1, 4), costs(sparse, 64, 4)
    assert all(one[form] < many[form] for form in one)
    assert many["coo"] / one["coo"] > many["ell"] / one["ell"]
    assert set(costs(sparse, 1, 0)) == set(EXACT_FORMS)


# -- a real model --------------------------------------------------------------------------------


def test_forms_agree_on_a_real_model(tmp_path: Path, data_dir: Path) -> None:
    source = data_dir / "onnx" / "stories260k.onnx"
    passes = "eliminate-identities,fold-constants,canonicalize-linear,quantize-easyquant"
    ids = np.arange(64, dtype=np.int64).reshape(2, 32)
    outputs: dict[str, np.ndarray] = {}
    targets = ["portable", *(f"ort-cpu{{outliers={f},accuracy_level=0}}" for f in ("auto", *SPLIT, "fold"))]
    for target in [*targets, "ort-cpu{outliers=coo}", "ort-cpu{outliers=requantize}"]:
        out = tmp_path / "out.onnx"
        report = effic.optimize(source, passes, output=out, target=target, force=True)
        assert report.steps[3].passed == 35
        session = start_session(str(out))
        outputs[target] = session.run(None, {session.get_inputs()[0].name: ids})[0]
    want = outputs["portable"]
    for target, got in outputs.items():
        rounds = target in ("ort-cpu{outliers=coo}", "ort-cpu{outliers=requantize}")
        assert distance(want, got) < (5e-2 if rounds else 1e-5), target

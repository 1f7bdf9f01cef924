from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.backends.ort.artifact import OrtArtifact
from effic.backends.ort.decode_at_load import DecodeAtLoad, runtime_dequantized
from effic.backends.ort.input_groups import read_groups, speed
from effic.backends.ort.lower_encodings import LowerEncodings
from effic.backends.ort.lower_input_groups import LowerInputGroups
from effic.ir.encodings import Encoding, build, decode
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.passes.base import Remarks
from tests.backends.test_lower_encodings import (
    activations,
    check_no_cliff,
    distance,
    lower,
    make_encoding,
    make_model,
    ops,
    run,
)

# What the kernels' own rounding of activations may move outputs by, relative to their norm. One scale
# for all activations (prefill) costs more than one per block; few outputs leave much to chance.
ROUNDING = 1e-5
KERNEL_4 = 4e-2
KERNEL_PREFILL = 6e-2


def apply(model: Model, **options) -> Remarks:
    remarks = Remarks()
    LowerInputGroups(always=True, **options).apply(model, remarks)
    verify(model)
    check_no_cliff(model)
    return remarks


def linear(encoding: Encoding, op: str = "y = MatMul(x, w)", x_shape: str = "M,K", kind="float") -> Model:
    rows, columns = encoding.shape
    text = f"g ({kind}[{x_shape}] x, {kind}[{rows},{columns}] w) => ({kind} y) {{ {op} }}"
    return make_model(text, {"w": encoding})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 80),
    group=st.sampled_from([1, 2, 3, 8, 16, 17, 32, 64, 0]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4), (0,)]),
    transposed=st.booleans(),
    opset=st.sampled_from([21, 25]),
)
def test_every_form_gives_the_outputs_of_the_canonical_form(
    inputs, outputs, group, bits, symmetric, rows, transposed, opset
) -> None:
    shape, n_axis = ((outputs, inputs), 0) if transposed else ((inputs, outputs), 1)
    encoding = make_encoding(shape, bits=bits, group=group, k_axis=n_axis, symmetric=symmetric, opset=opset)
    op = "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)" if transposed else "y = MatMul(x, w)"
    names = ",".join([*(f"D{i}" for i in range(len(rows))), str(inputs)])
    x = activations(*rows, inputs)
    want = Oracle(linear(encoding, op, names)).run({"x": x})["y"]
    weight = decode(encoding).astype(np.float64)
    # Where terms cancel the outputs say little about the rounding: measured against the terms.
    size = max(float(np.linalg.norm(np.abs(x) @ np.abs(weight.T if transposed else weight))), 1e-9)
    for form, level, tolerance in (
        ("split", 0, ROUNDING),
        ("split", 4, KERNEL_4),
        ("prefill", 4, KERNEL_PREFILL),
    ):
        model = linear(encoding, op, names)
        remarks = apply(model, form=form, accuracy_level=level)
        kernel = "split" if form == "split" and level == 0 and encoding.stored_bits == 8 else None
        if kernel:
            assert remarks.items[0].kind == "missed"
            assert "4-bit codes only" in remarks.items[0].text
            continue
        assert remarks.items[0].kind == "passed"
        assert "Transpose" not in ops(model)
        assert "DequantizeLinear" not in ops(model)
        (got,) = run(model, {"x": x})
        assert got.shape == want.shape
        assert np.linalg.norm(got - want) < tolerance * size


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0), (2.0, 0.0)])
@pytest.mark.parametrize("bias", ["none", "[40]", "[1,40]", "[1]", "live", "[M,40]"])
@pytest.mark.parametrize(("group", "symmetric"), [(16, False), (0, True), (0, False)])
def test_gemm(trans_b: int, alpha: float, beta: float, bias: str, group: int, symmetric: bool) -> None:
    shape = (40, 64) if trans_b else (64, 40)
    encoding = make_encoding(shape, k_axis=1 - trans_b, group=group, symmetric=symmetric)
    feeds = {"x": activations(3, 64)}
    declared, third, c = "", "", np.zeros(40, np.float32)
    if bias in ("live", "[M,40]"):
        c = activations(40) if bias == "live" else activations(3, 40)
        declared, third, feeds["c"] = f", float{'[40]' if bias == 'live' else bias} c", ", c", c
    elif bias != "none":
        c, third = activations(*[int(d) for d in bias.strip("[]").split(",")]), ", c"
    constant = "" if not third or declared else f"<float{bias} c = {{{', '.join(map(str, c.ravel()))}}}>"
    text = (
        f"g (float[M,64] x, float[{shape[0]},{shape[1]}] w{declared}) => (float[M,40] y) {constant} "
        f"{{ y = Gemm<transB={trans_b}, alpha={alpha}, beta={beta}>(x, w{third}) }}"
    )
    model = make_model(text, {"w": encoding})
    apply(model, accuracy_level=0)
    assert "Gemm" not in ops(model)
    weight = decode(encoding).astype(np.float64)
    want = alpha * (feeds["x"] @ (weight.T if trans_b else weight)) + beta * c
    assert distance(want, run(model, feeds)[0]) < ROUNDING


@pytest.mark.parametrize(("group", "symmetric"), [(16, True), (16, False), (0, True), (0, False)])
@pytest.mark.parametrize("form", ["split", "prefill"])
def test_fp16_models_are_computed_in_fp32_between_two_casts(group: int, symmetric: bool, form: str) -> None:
    encoding = make_encoding((64, 40), k_axis=1, group=group, symmetric=symmetric, dtype=np.float16)
    # Small scales: x * scale is below what fp16 can hold well.
    small = Encoding(
        encoding.codes,
        (encoding.scales * np.float16(1e-3)),
        encoding.zero_points,
        encoding.axis,
        encoding.block_size,
        4,
        (64, 40),
        weight="w",
    )
    model = linear(small, kind="float16")
    apply(model, form=form, accuracy_level=0)
    x = activations(5, 64).astype(np.float16)
    want = x.astype(np.float64) @ decode(small).astype(np.float64)
    got = run(model, {"x": x})[0]
    assert got.dtype == np.float16
    assert distance(want, got) < (2e-3 if form == "split" else KERNEL_PREFILL)


def test_tied_weights_are_written_once() -> None:
    encoding = make_encoding((64, 64), k_axis=1, group=16, symmetric=False)
    model = linear(encoding, "a = MatMul(x, w) b = MatMul(a, w) y = Add(a, b)")
    apply(model, accuracy_level=0)
    nodes = list(model.nodes("MatMulNBits", domain="com.microsoft"))
    assert [n.inputs[1] for n in nodes[:4]] == [n.inputs[1] for n in nodes[4:]]
    # Every group is as large: one tensor of ones for all.
    assert len({n.inputs[2] for n in nodes}) == 1
    kinds = [v.dtype for v in model.graph.initializers.values()]
    assert kinds.count(ir.DataType.UINT8) == 4
    # Scales of four groups, the ones, and the offsets of the zero points.
    assert kinds.count(ir.DataType.FLOAT) == 6
    x, weight = activations(2, 64), decode(encoding).astype(np.float64)
    assert distance(x @ weight + x @ weight @ weight, run(model, {"x": x})[0]) < ROUNDING


@pytest.mark.parametrize("form", ["split", "prefill"])
def test_subgraphs_and_function_bodies(form: str) -> None:
    outer = make_encoding((64, 64), k_axis=1, group=24)
    inner = make_encoding((64, 64), k_axis=1, group=16, symmetric=False, seed=5)
    header = '<ir_version: 13, opset_import: ["" : 25, "local" : 1]>\n'
    text = (
        "g (float[2,64] x, bool c, float[64,64] w) => (float[2,64] y) "
        "{ y = If (c) <then_branch = a () => (float[2,64] p) { p = MatMul(x, w) }, "
        "else_branch = b () => (float[2,64] q) { q = local.f(x) }> }\n"
        '<domain: "local", opset_import: ["" : 25]> f (a) => (b) { b = Neg(a) }'
    )
    model = Model(ir.from_onnx_text(header + text))
    place = model.graph.inputs.pop()
    place.name = None
    place.replace_all_uses_with(build(model, model.graph, outer, "w"))
    (function,) = model.ir.functions.values()
    negate = function[0]
    value = build(model, function.graph, inner, "v", before=negate)
    matmul = ir.node("MatMul", [negate.inputs[0], value])
    matmul.outputs[0].name = "product"
    function.graph.insert_before(negate, matmul)
    negate.replace_input_with(0, matmul.outputs[0])
    model.forget_names()
    verify(model)
    apply(model, form=form, accuracy_level=0)
    assert function.opset_imports["com.microsoft"] == 1
    x = activations(2, 64)
    bound = ROUNDING if form == "split" else KERNEL_PREFILL
    for flag, want in ((True, x @ decode(outer)), (False, -(x @ decode(inner)))):
        assert distance(want.astype(np.float64), run(model, {"x": x, "c": np.array(flag)})[0]) < bound


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y = MatMul(x, w) z = Identity(w)", "decoded for Identity"),
        ("y = MatMul(x, w) e = Gather(w, ids) z = Identity(e)", "decoded for Gather"),
        ("y = MatMul(x, w) z = MatMul(w, x)", "decoded for MatMul"),
        ("y = Gemm<transA=1>(x, w) z = Neg(y)", "transA"),
    ],
)
def test_weights_that_are_decoded_anyway_are_not_copied(text: str, reason: str) -> None:
    encoding = make_encoding((64, 64), k_axis=1, group=16)
    model = make_model(
        f"g (float[64,64] x, int64[3] ids, float[64,64] w) => (float y, float z) {{ {text} }}",
        {"w": encoding},
    )
    remarks = apply(model)
    assert reason in remarks.items[0].text
    assert "MatMulNBits" not in ops(model)
    DecodeAtLoad().apply(model, remarks)
    assert runtime_dequantized(model) == []


def test_weight_on_the_left_is_left_to_be_decoded() -> None:
    encoding = make_encoding((64, 64), k_axis=1, group=16)
    model = linear(encoding, "y = MatMul(w, x)", "64,M")
    remarks = lower(model)
    assert [r.kind for r in remarks.items] == ["missed", "passed"]
    assert "left operand" in remarks.items[0].text


def test_input_that_others_read_stays_as_it_is() -> None:
    encoding = make_encoding((64, 40), k_axis=1, group=0)
    text = (
        "g (float[M,64] x, float[64,40] w) => (float[M,40] y, float[M,64] z) <float[64] s = {{{}}}> "
        "{{ h = Mul(x, s) y = MatMul(h, w) z = Exp(h) }}"
    ).format(", ".join(["0.5"] * 64))
    model, reference = make_model(text, {"w": encoding}), make_model(text, {"w": encoding})
    remarks = apply(model, accuracy_level=0)
    assert remarks.items[0].data["folded"] is False
    x = activations(3, 64)
    for got, want in zip(run(model, {"x": x}), Oracle(reference).run({"x": x}).values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


NORM = "g (float[M,64] x{}) => ({}) <float[64] gamma = {{{}}}, float[64] beta = {{{}}}> {{ {} }}"


def norm_model(body: str, weights: dict[str, Encoding], outputs: str = "float y") -> Model:
    rng = np.random.default_rng(9)
    numbers = [", ".join(f"{v:.4f}" for v in rng.standard_normal(64)) for _ in range(2)]
    declared = "".join(f", float[{e.shape[0]},{e.shape[1]}] {name}" for name, e in weights.items())
    full = f"h = LayerNormalization(x, gamma, beta) {body}"
    return make_model(NORM.format(declared, outputs, *numbers, full), weights)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_group_folds_its_scales_into_the_norm_before_it(symmetric: bool) -> None:
    encoding = make_encoding((64, 40), k_axis=1, group=0, symmetric=symmetric)
    model, reference = (norm_model("y = MatMul(h, w)", {"w": encoding}) for _ in range(2))
    remarks = apply(model, accuracy_level=0)
    assert remarks.items[0].data["folded"] is True
    assert "folded into what makes them" in remarks.items[0].text
    assert "Mul" not in ops(model)
    x = activations(3, 64)
    want = Oracle(reference).run({"x": x})["y"]
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("agree", [True, False])
def test_scales_fold_only_where_every_consumer_agrees(agree: bool) -> None:
    first = make_encoding((64, 40), k_axis=1, group=0)
    other = make_encoding((64, 24), k_axis=1, group=0, seed=3)
    scales = first.scales if agree else other.scales
    second = Encoding(other.codes, scales, None, other.axis, 0, 4, (64, 24), weight="v")
    body = "y = MatMul(h, w) z = MatMul(h, v)"
    weights = {"w": first, "v": second}
    model, reference = (norm_model(body, weights, "float y, float z") for _ in range(2))
    remarks = apply(model, accuracy_level=0)
    assert [r.data["folded"] for r in remarks.items] == [agree, agree]
    assert ops(model).count("Mul") == (0 if agree else 2)
    x = activations(3, 64)
    for got, want in zip(run(model, {"x": x}), Oracle(reference).run({"x": x}).values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_negative_scales_do_not_fold_through_a_relu() -> None:
    base = make_encoding((64, 40), k_axis=1, group=0)
    for sign, folded in ((1, True), (-1, False)):
        scales = base.scales.copy()
        scales[5] *= sign
        encoding = Encoding(base.codes, scales, None, base.axis, 0, 4, (64, 40), weight="w")
        model, reference = (norm_model("r = Relu(h) y = MatMul(r, w)", {"w": encoding}) for _ in range(2))
        remarks = apply(model, accuracy_level=0)
        assert remarks.items[0].data["folded"] is folded
        x = activations(3, 64)
        want = Oracle(reference).run({"x": x})["y"]
        np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=1e-4, atol=1e-4)


def test_statically_quantized_operators_are_left_to_the_runtime() -> None:
    encoding = make_encoding((16, 8), bits=8, k_axis=1, group=0)
    text = (
        "g (float[M,16] x, float[16,8] w) => (float y) <float s = {0.02}, uint8 z = {128}> "
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) p = MatMul(d, w) "
        "r = QuantizeLinear(p, s, z) y = DequantizeLinear(r, s, z) }"
    )
    model = make_model(text, {"w": encoding})
    before = ops(model)
    remarks = lower(model)
    assert ops(model) == before
    assert "quantized as well" in remarks.items[0].text


def test_target_chooses_what_is_expected_to_be_fastest_and_says_so() -> None:
    wide = make_encoding((512, 512), k_axis=1, group=128)
    fine = make_encoding((512, 512), k_axis=1, group=8)
    for encoding, target, kernels, says in (
        (wide, "ort-cpu", ["MatMulNBits"] * 4, "split into 4 groups of 128"),
        (wide, "ort-cpu{ic=prefill}", ["DynamicQuantizeMatMul"] * 4, "int8 in memory"),
        (wide, "ort-cpu{ic=exact}", [], "decoded to fp32 once"),
        (fine, "ort-cpu", [], "64 groups of 8 in the split form are expected to run at 0."),
        (fine, "ort-cpu{decode=call}", ["MatMulNBits"] * 64, "split into 64 groups of 8"),
        (make_encoding((32, 32), k_axis=1, group=16), "ort-cpu", [], "expected to run at 0."),
    ):
        model, reference = linear(encoding), linear(encoding)
        remarks = lower(model, target)
        assert [op for op in ops(model) if "MatMul" in op and op != "MatMul"] == kernels
        assert says in remarks.items[0].text
        assert runtime_dequantized(model) == []
        x = activations(2, encoding.shape[0])
        want = Oracle(reference).run({"x": x})["y"]
        assert distance(want, run(model, {"x": x})[0]) < (KERNEL_PREFILL if kernels else ROUNDING)


def test_rows_the_model_declares_decide_with() -> None:
    encoding = make_encoding((512, 512), k_axis=1, group=64)
    few = lower(linear(encoding, x_shape="1,512")).items[0]
    many = lower(linear(encoding, x_shape="B,128,512")).items[0]
    assert (few.kind, many.kind) == ("passed", "missed")
    assert "128 rows of activations" in many.text


def test_expected_speed_falls_with_groups_and_rows() -> None:
    sizes = [
        [
            speed(groups, "split", 4, rows)
            for group in (512, 128, 32, 8)
            if (groups := read_groups(make_encoding((512, 512), k_axis=1, group=group), 0))
        ]
        for rows in (1, 16, 128)
    ]
    for row in sizes:
        assert row == sorted(row, reverse=True)
    for column in zip(*sizes, strict=True):
        assert list(column) == sorted(column, reverse=True)


def test_per_output_channel_weights_are_not_touched() -> None:
    model = linear(make_encoding((64, 40), group=16))
    assert apply(model).items == []
    assert ops(model) == ["DequantizeLinear", "MatMul"]


def test_every_input_channel_group_gets_a_remark_from_exactly_one_pass() -> None:
    encoding = make_encoding((64, 40), k_axis=1, group=16)
    remarks = Remarks()
    LowerEncodings().apply(linear(encoding), remarks)
    assert remarks.items == []


@pytest.mark.parametrize(
    ("form", "bits", "k_axis"), list(itertools.product(["split", "prefill"], [3, 4, 8], [0, 1]))
)
def test_large_weights_through_a_file(tmp_path, form: str, bits: int, k_axis: int) -> None:
    shape = (1024, 2100) if k_axis else (2100, 1024)
    encoding = make_encoding(shape, k_axis=k_axis, group=512, bits=bits, symmetric=False)
    op = "y = MatMul(x, w)" if k_axis else "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"
    model = linear(encoding, op)
    remarks = apply(model, form=form)
    if bits == 3:
        assert "3-bit codes stored as 4" in remarks.items[0].text
    path = tmp_path / "large.onnx"
    model.save(path, external=True)
    stored = 1024 * 2100 * (8 if bits == 8 else 4) // 8
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    # Codes at their stored width; scales and offsets of five groups, and the ones, are a few percent.
    assert stored < size < 1.09 * stored
    x = activations(2, 1024)
    weight = decode(encoding).astype(np.float64)
    got = OrtArtifact.load(path).run({"x": x})["y"]
    assert distance(x @ (weight if k_axis else weight.T), got) < 2e-2


def test_names_and_metadata_survive() -> None:
    model = linear(make_encoding((64, 40), k_axis=1, group=16))
    (matmul,) = model.nodes("MatMul")
    matmul.name = "the_product"
    matmul.metadata_props["path"] = "layers.0"
    apply(model)
    (node,) = model.nodes("Concat")
    assert (node.name, node.metadata_props["path"], node.outputs[0].name) == ("the_product", "layers.0", "y")
    for part in model.nodes("MatMulNBits", domain="com.microsoft"):
        assert "effic.encoding" in part.metadata_props


def test_bfloat16_has_no_kernels() -> None:
    encoding = make_encoding((64, 40), k_axis=1, group=16, dtype=ir.DataType.BFLOAT16.numpy())
    model = linear(encoding, kind="bfloat16")
    remarks = apply(model)
    assert "not in BFLOAT16" in remarks.items[0].text

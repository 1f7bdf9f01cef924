"""fuse-conv-bn: every fold against the unfolded graph, every refusal with its reason."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from effic.ir.errors import InvalidModelError
from effic.ir.model import Model
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks
from effic.passes.fuse.fuse_conv_bn import FuseConvBN
from tests.passes.conv_bn_nets import RNG, X4, bn, f32, fuse, missed, net, norm, ops


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    axes=st.integers(1, 3),
    bias=st.booleans(),
    group=st.sampled_from([1, 2, 6]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["pads", "none", "SAME_UPPER", "VALID"]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolutions_of_every_kind(
    axes: int, bias: bool, group: int, stride: int, dilation: int, padding: str, transposed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (6, 12 // group) if transposed else (12, 6 // group)
    weight = rng.standard_normal((*shape, *[3] * axes)).astype(np.float32)
    pads = {"pads": f", pads = {[1] * 2 * axes}", "none": ""}.get(padding, f', auto_pad = "{padding}"')
    if padding == "SAME_UPPER" and (transposed or dilation > 1):
        pads = ""  # Neither form is one the runtime has.
    op = "ConvTranspose" if transposed else "Conv"
    attributes = f"<group = {group}, strides = {[stride] * axes}, dilations = {[dilation] * axes}{pads}>"
    dims = ",".join(["9", "8", "7"][:axes])
    model = net(
        f"(float[2,6,{dims}] x) => (float[{','.join('?' * (axes + 2))}] y)",
        f"c = {op}{attributes}(x, w{', b' if bias else ''})\n" + bn("c", "y"),
        w=weight,
        **({"b": f32(12)} if bias else {}),
        **norm(12),
    )
    fuse(model)
    assert ops(model) == {op: 1}
    (conv,) = model.nodes(op)
    assert len(conv.inputs) == 3
    assert len(model.graph.initializers) == 2


@pytest.mark.parametrize("name", list(BUILDERS))
def test_builders_keep_their_outputs(name: str) -> None:
    model = Model(BUILDERS[name]())
    fuse(model)
    assert ops(model)["BatchNormalization"] == 0


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ("Conv(x, k, b)", "Conv(h, p, b)", True),  # 3x3 then 1x1
        ("Conv(x, p)", "Conv<pads = [1, 1, 1, 1]>(h, k, b)", True),  # 1x1 then padded 3x3
        ("Conv(x, p, b)", "Conv(h, k, b)", True),  # 1x1 with a bias then 3x3
        ("Conv(x, p, b)", "Conv<pads = [1, 1, 1, 1]>(h, k, b)", False),  # the bias misses the border
        ("Conv<strides = [2, 2]>(x, k)", "Conv<group = 6>(h, d, b)", True),  # a scale and shift
        ("Conv<group = 6>(x, d)", "Conv<group = 2>(h, g)", True),
        ("Conv(x, narrow)", "Conv(h, wide)", False),  # a low-rank pair is smaller than its product
        ("Conv(x, k)", "Conv(h, k)", False),  # no 1x1
    ],
)
def test_pointwise_beside_a_convolution(first: str, second: str, merged: bool) -> None:
    weights = {
        "k": f32(6, 6, 3, 3), "p": f32(6, 6, 1, 1), "b": f32(6), "d": f32(6, 1, 1, 1), "g": f32(6, 3, 3, 3),
        "narrow": f32(2, 6, 1, 1), "wide": f32(6, 2, 1, 1),
    }  # fmt: skip
    body = f"h = {first}\nh2 = {second}\ny = Relu(h2)"
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", body)}
    model = net(X4, body, **used)
    fuse(model)
    assert ops(model) == {"Conv": 1 if merged else 2, "Relu": 1}
    model = net(X4, body, **used)
    fuse(model, fold_pointwise=False)
    assert ops(model) == {"Conv": 2, "Relu": 1}


def test_names_are_deterministic() -> None:
    model = net(X4, "c = Conv(x, w)\n" + bn("c", "y"), w=f32(4, 6, 3, 3), **norm(4))
    model.graph[0].name = "stem"
    fuse(model)
    assert list(model.graph.initializers) == ["stem.weight_fused", "stem.bias_fused"]


@pytest.mark.parametrize(
    ("text", "dtype", "tolerance"), [("double", np.float64, 1e-12), ("float16", np.float16, 4e-3)]
)
def test_double_and_half_precision(text: str, dtype: type, tolerance: float) -> None:
    # The runtime has no convolution of these types on a CPU; ONNX's own evaluator has.
    model = net(
        f"({text}[2,6,9,8] x) => ({text}[?,?,?,?] y)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        w=f32(4, 6, 3, 3).astype(dtype),
        **norm(4, dtype=dtype),
    )
    inputs = {"x": f32(2, 6, 9, 8).astype(dtype)}
    (want,) = ReferenceEvaluator(ir.to_proto(model.ir)).run(None, inputs)
    FuseConvBN().apply(model, Remarks())
    (got,) = ReferenceEvaluator(ir.to_proto(model.ir)).run(None, inputs)
    assert ops(model) == {"Conv": 1}
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.from_numpy(np.dtype(dtype))}
    assert got.dtype == want.dtype == dtype
    error = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    assert error <= tolerance * float(np.abs(want).max())


def test_half_weights_with_float_statistics() -> None:
    model = net(
        "(float16[2,6,9,8] x) => (float16[?,?,?,?] y)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        w=f32(4, 6, 3, 3).astype(np.float16),
        **norm(4),
    )
    remarks = Remarks()
    FuseConvBN().apply(model, remarks)
    assert ops(model) == {"Conv": 1}
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_overflow_of_half_precision_is_refused_and_a_large_scale_is_said() -> None:
    statistics = {
        "n_s": np.full(4, 8, np.float16), "n_b": np.zeros(4, np.float16),
        "n_m": np.zeros(4, np.float16), "n_v": np.zeros(4, np.float16),
    }  # fmt: skip
    text = "(float16[1,6,9,8] x) => (float16[?,?,?,?] y)"
    model = net(
        text, "c = Conv(x, w)\n" + bn("c", "y"), w=np.full((4, 6, 1, 1), 100, np.float16), **statistics
    )
    remarks = Remarks()
    FuseConvBN().apply(model, remarks)
    assert "would overflow float16" in missed(remarks)
    assert ops(model)["BatchNormalization"] == 1

    wide = {name: array.astype(np.float32) for name, array in statistics.items()}
    model = net(X4, "c = Conv(x, w)\n" + bn("c", "y"), w=f32(4, 6, 1, 1), **wide)
    remarks = fuse(model)
    assert "variance is almost zero" in remarks.items[0].text
    assert remarks.items[0].data["large_scale"] is True


def test_negative_variance_is_an_error() -> None:
    statistics = norm(4)
    statistics["n_v"][2] = -1e-3
    model = net(X4, "c = Conv(x, w)\n" + bn("c", "y"), w=f32(4, 6, 1, 1), **statistics)
    model.graph[1].name = "broken"
    with pytest.raises(InvalidModelError, match="'broken' has a negative variance"):
        FuseConvBN().apply(model, Remarks())


def test_not_finite_statistics_are_refused() -> None:
    statistics = norm(4)
    statistics["n_m"][0] = np.inf
    model = net(X4, "c = Conv(x, w)\n" + bn("c", "y"), w=f32(4, 6, 1, 1), **statistics)
    remarks = Remarks()
    FuseConvBN().apply(model, remarks)
    assert "not finite" in missed(remarks)


LINEAR = [
    ("y0 = MatMul(x, w)\n", {"w": f32(8, 5)}, {"MatMul": 1, "Add": 1}),
    ("m = MatMul(x, w)\ny0 = Add(m, b)\n", {"w": f32(8, 5), "b": f32(5)}, {"MatMul": 1, "Add": 1}),
    ("m = MatMul(x, w)\ny0 = Add(b, m)\n", {"w": f32(8, 5), "b": f32(1, 5)}, {"MatMul": 1, "Add": 1}),
    ("y0 = Gemm(x, w)\n", {"w": f32(8, 5)}, {"Gemm": 1}),
    ("y0 = Gemm<transB = 1>(x, w, b)\n", {"w": f32(5, 8), "b": f32(5)}, {"Gemm": 1}),
    ("y0 = Gemm<alpha = 0.5, beta = 3.0>(x, w, b)\n", {"w": f32(8, 5), "b": f32(1, 5)}, {"Gemm": 1}),
    ("y0 = Gemm<alpha = 2.0, beta = 0.5, transB = 1>(x, w, b)\n", {"w": f32(5, 8), "b": f32(1)}, {"Gemm": 1}),
    ("y0 = Gemm<beta = 0.0>(x, w, b)\n", {"w": f32(8, 5), "b": f32(5)}, {"Gemm": 1}),
    ("t = Transpose<perm = [1, 0]>(w)\ny0 = MatMul(x, t)\n", {"w": f32(5, 8)}, {"MatMul": 1, "Add": 1}),
    ("i = Identity(w)\nt = Transpose(i)\ny0 = Gemm(x, t)\n", {"w": f32(5, 8)}, {"Gemm": 1}),
]


@pytest.mark.parametrize(("body", "weights", "after"), LINEAR)
def test_linear_before_norm(body: str, weights: dict[str, np.ndarray], after: dict[str, int]) -> None:
    model = net("(float[N,8] x) => (float[N,5] y)", body + bn("y0", "y"), **weights, **norm(5))
    fuse(model)
    assert ops(model) == after
    assert all("fused" in name for name in model.graph.initializers)


@pytest.mark.parametrize(("body", "weights", "after"), LINEAR)
def test_norm_before_linear(body: str, weights: dict[str, np.ndarray], after: dict[str, int]) -> None:
    model = net(
        "(float[N,8] x0) => (float[N,5] y)", bn("x0", "x") + body + "y = Relu(y0)", **weights, **norm(8)
    )
    fuse(model)
    assert ops(model) == {**after, "Relu": 1}


def test_norm_after_embedding() -> None:
    model = net(
        "(int64[N] x) => (float[N,5] y)", "e = Gather(w, x)\n" + bn("e", "y"), w=f32(11, 5), **norm(5)
    )
    fuse(model)
    assert ops(model) == {"Gather": 1}


@pytest.mark.parametrize("padding", ["skip", "bias_map"])
@pytest.mark.parametrize("attributes", ["", "strides = [2, 1], dilations = [1, 2], ", "group = 3, "])
def test_norm_before_padded_convolution(padding: str, attributes: str) -> None:
    model = net(
        "(float[N,6,9,8] x) => (float[N,?,?,?] y)",
        bn("x", "a") + f"c = Conv<{attributes}pads = [1, 2, 0, 1]>(a, w, b)\ny = Relu(c)",
        w=f32(12, 2 if "group" in attributes else 6, 3, 3),
        b=f32(12),
        **norm(6),
    )
    remarks = fuse(model, bn_conv_padding=padding)
    if padding == "skip":
        assert ops(model)["BatchNormalization"] == 1
        assert "pads with zeros" in missed(remarks)
    else:
        assert ops(model) == {"Conv": 1, "Add": 1, "Relu": 1}


def test_a_bias_map_needs_a_fixed_size() -> None:
    model = net(
        "(float[N,6,H,W] x) => (float[N,?,?,?] y)",
        bn("x", "a") + "c = Conv<pads = [1, 1, 1, 1]>(a, w)\ny = Relu(c)",
        w=f32(4, 6, 3, 3),
        **norm(6),
    )
    assert "size is not fixed" in missed(fuse(model, bn_conv_padding="bias_map"))


@pytest.mark.parametrize("group", [1, 2])
def test_norm_before_unpadded_convolutions(group: int) -> None:
    body = (
        bn("x", "a") + f"c = Conv<group = {group}>(a, w)\nd = Conv<group = {group}>(a, v, b)\ny = Add(c, d)"
    )
    weights = {"w": f32(4, 6 // group, 3, 3), "v": f32(4, 6 // group, 3, 3), "b": f32(4)}
    model = net(X4, body, **weights, **norm(6))
    fuse(model)
    assert ops(model) == {"Conv": 2, "Add": 1}


def test_a_bias_map_on_a_graph_output() -> None:
    model = net(
        "(float[2,6,9,8] x) => (float[2,4,9,8] y)",
        bn("x", "a") + "y = Conv<pads = [1, 1, 1, 1]>(a, w)",
        w=f32(4, 6, 3, 3),
        **norm(6),
    )
    fuse(model, bn_conv_padding="bias_map")
    assert ops(model) == {"Conv": 1, "Add": 1}


def test_a_scale_without_shift_passes_padding_and_transposed_convolutions() -> None:
    statistics = norm(6)
    statistics["n_b"], statistics["n_m"] = np.zeros(6, np.float32), np.zeros(6, np.float32)
    for op, shape in (("Conv<pads = [1, 1, 1, 1]>", (4, 6, 3, 3)), ("ConvTranspose", (6, 4, 3, 3))):
        model = net(X4, bn("x", "a") + f"c = {op}(a, w)\ny = Relu(c)", w=f32(*shape), **statistics)
        fuse(model)
        assert ops(model)["BatchNormalization"] == 0


def test_norm_before_transposed_convolution_is_refused() -> None:
    model = net(X4, bn("x", "a") + "y = ConvTranspose(a, w)", w=f32(6, 4, 3, 3), **norm(6))
    assert "spreads its input" in missed(fuse(model))


def test_a_chain_of_scales_and_shifts() -> None:
    model = net(
        X4,
        "c = Conv(x, w)\nd = Mul(c, p)\ne = Add(q, d)\nf = Sub(one, e)\ng = Div(f, p)\nh = Neg(g)\n"
        "i = Identity(h)\nk = Dropout(i)\n" + bn("k", "l") + "y = Sub(l, q)",
        w=f32(4, 6, 3, 3),
        p=RNG.uniform(0.5, 2, (1, 4, 1, 1)).astype(np.float32),
        q=f32(4, 1, 1),
        one=np.float32(1),
        **norm(4),
    )
    remarks = fuse(model)
    assert ops(model) == {"Conv": 1}
    assert remarks.count("passed") == 7


def test_a_chain_before_a_convolution() -> None:
    model = net(
        X4,
        "a = Sub(x, m)\nb = Div(a, s)\nc = Conv(b, w)\ny = Relu(c)",
        w=f32(4, 6, 3, 3),
        m=f32(1, 6, 1, 1),
        s=np.full((6, 1, 1), 0.3, np.float32),
    )
    fuse(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_scale_after_matmul_of_any_rank() -> None:
    model = net(
        "(float[B,T,8] x) => (float[B,T,5] y)",
        "m = MatMul(x, w)\na = Add(m, b)\ny = Mul(a, g)",
        w=f32(8, 5),
        b=f32(5),
        g=f32(5),
    )
    fuse(model)
    assert ops(model) == {"MatMul": 1, "Add": 1}


def test_a_plain_bias_and_a_layer_norm_are_left_alone() -> None:
    model = net(
        "(float[B,T,8] x) => (float[B,T,5] y)",
        "s = Softmax(x)\nn = Mul(s, g)\nm = MatMul(n, w)\ny = Add(m, b)",
        w=f32(8, 5),
        b=f32(5),
        g=f32(8),
    )
    remarks = fuse(model)
    assert not remarks.items
    assert ops(model)["Mul"] == 1


def test_options_switch_folds_off() -> None:
    model = net(X4, bn("x", "a") + "y = Conv(a, w)", w=f32(4, 6, 3, 3), **norm(6))
    fuse(model, fold_bn_conv=False)
    assert ops(model)["BatchNormalization"] == 1
    model = net(X4, "c = ConvTranspose(x, w)\n" + bn("c", "y"), w=f32(6, 4, 3, 3), **norm(4))
    assert "switched off" in missed(fuse(model, fold_transposed=False))
    model = net("(float[N,8] x) => (float[N,5] y)", "c = Gemm(x, w)\n" + bn("c", "y"), w=f32(8, 5), **norm(5))
    assert "switched off" in missed(fuse(model, fold_linear=False))
    model = net(X4, "c = Conv(x, w)\ny = Mul(c, p)", w=f32(4, 6, 3, 3), p=f32(4, 1, 1))
    fuse(model, fold_scale_shift=False)
    assert ops(model)["Mul"] == 1


REFUSALS = [
    ("read elsewhere", "c = Conv(x, w)\n" + bn("c", "d") + "e = Relu(c)\ny = Add(d, e)", {}),
    ("varies within a channel", "c = Conv(x, w)\n" + bn("c", "d") + "y = Add(d, q)", {"q": f32(7, 6)}),
    ("constant has 3 channels and its neighbour 1", "c = Conv(x, w1)\ny = Mul(c, p)",
     {"w1": f32(1, 6, 3, 3), "p": f32(3, 1, 1)}),
    ("computed at run time (by Relu", "u = Relu(w)\nc = Conv(x, u)\n" + bn("c", "y"), {}),
    ("computed at run time (by Mul", "p = Mul(x, x)\ns = ReduceMean<keepdims = 0>(p)\n"
     "t = Mul(s, n_b)\nc = Conv(x, w)\ny = BatchNormalization(c, n_s, t, n_m, n_v)", {}),
    ("bias is computed at run time", "b = Relu(n_b)\nc = Conv(x, w, b)\n" + bn("c", "y"), {}),
    ("is quantized", "u = DequantizeLinear(q, s)\nc = Conv(x, u)\n" + bn("c", "y"),
     {"q": RNG.integers(-9, 9, (4, 6, 3, 3)).astype(np.int8), "s": np.float32(0.1)}),
    ("read by Relu", "c = Relu(x)\n" + bn("c", "d", "k") + "e = Relu(d)\nf = Conv(e, w)\ng = Conv(d, w)\ny = Add(f, g)",
     norm(6, "k")),
    ("no convolution or linear layer", "c = Relu(x)\n" + bn("c", "d", "k") + "y = MaxPool<kernel_shape = [2, 2]>(d)",
     norm(6, "k")),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "body", "weights"), REFUSALS)
def test_refusals(reason: str, body: str, weights: dict[str, np.ndarray]) -> None:
    weights = {"w": f32(4, 6, 3, 3), "v": f32(4, 4, 1, 1), **norm(4), **weights}
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", body)}
    model = net(X4, body, **used)
    before = ops(model)
    remarks = fuse(model)
    assert reason in missed(remarks)
    if "BatchNormalization" in body and "varies" not in reason:
        assert ops(model) == before


def test_a_graph_output_blocks() -> None:
    model = net(
        "(float[N,6,9,8] x) => (float[N,?,?,?] y, float[N,?,?,?] c)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        w=f32(4, 6, 3, 3),
        **norm(4),
    )
    assert "is an output of the graph" in missed(fuse(model))


def test_a_weight_that_is_a_graph_input_blocks() -> None:
    model = net(
        "(float[N,6,9,8] x, float[4,6,3,3] w) => (float[N,?,?,?] y)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        **norm(4),
    )
    assert "its weight is an input of the graph" in missed(fuse(model))


def test_linear_with_three_axes_before_a_norm_is_refused() -> None:
    model = net(
        "(float[N,5,8] x) => (float[N,5,5] y)", "c = MatMul(x, w)\n" + bn("c", "y"), w=f32(8, 5), **norm(5)
    )
    assert "its input has 3 axes" in missed(fuse(model))


def test_gemm_bias_per_row_is_refused() -> None:
    model = net(
        "(float[3,8] x) => (float[3,5] y)",
        "c = Gemm(x, w, b)\n" + bn("c", "y"),
        w=f32(8, 5),
        b=f32(3, 1),
        **norm(5),
    )
    assert "varies within a channel" in missed(fuse(model))


def test_training_mode_is_refused() -> None:
    for opset, attributes, outputs in (
        (15, "<training_mode = 1>", "y, m1, v1"),
        (9, "", "y, m1, v1, m2, v2"),
    ):
        shown = "y" if opset == 15 else "y, float[4] m1"
        model = net(
            f"(float[2,6,9,8] x) => (float[2,?,?,?] {shown})",
            f"c = Conv(x, w)\n{outputs} = BatchNormalization{attributes}(c, n_s, n_b, n_m, n_v)",
            opset=opset,
            w=f32(4, 6, 3, 3),
            **norm(4),
        )
        remarks = Remarks()
        FuseConvBN().apply(model, remarks)
        assert "training mode" in missed(remarks)
        assert ops(model)["BatchNormalization"] == 1


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 21])
def test_operator_sets(opset: int) -> None:
    model = net(X4, "c = Conv(x, w)\n" + bn("c", "y"), opset=opset, w=f32(4, 6, 3, 3), **norm(4))
    fuse(model)
    assert ops(model) == {"Conv": 1}


def test_old_norm_with_unused_training_outputs() -> None:
    model = net(
        "(float[2,6,9,8] x) => (float[2,?,?,?] y)",
        "c = Conv(x, w)\ny, m1, v1, m2, v2 = BatchNormalization(c, n_s, n_b, n_m, n_v)",
        opset=9,
        w=f32(4, 6, 3, 3),
        **norm(4),
    )
    FuseConvBN().apply(model, Remarks())
    assert ops(model) == {"Conv": 1}

"""fuse-conv-bn{mode=tune}: the arithmetic over live parameters, and that folding it gives deploy mode."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.torch_capture import ROLE_KEY
from effic.ir.verify import verify
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks
from effic.passes.pipeline import Checker, run_passes
from effic.passes.spec import parse_passes

TUNE, DEPLOY = "fuse-conv-bn{mode=tune}", "fuse-conv-bn"
FOLD = "fold-constants{max_growth=1000000}"  # A shared weight becomes two: the file grows.
RNG = np.random.default_rng(7)
X4 = "(float[2,6,9,8] x) => (float[2,?,?,?] y)"


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def norm(channels: int, name: str = "n", dtype: type = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{name}_s": (rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)).astype(dtype),
        f"{name}_b": rng.standard_normal(channels).astype(dtype),
        f"{name}_m": rng.standard_normal(channels).astype(dtype),
        f"{name}_v": rng.uniform(0.2, 3, channels).astype(dtype),
    }


def bn(x: str, y: str, name: str = "n", attributes: str = "") -> str:
    return f"{y} = BatchNormalization{attributes}({x}, {name}_s, {name}_b, {name}_m, {name}_v)\n"


def ops(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.nodes(domain=None))


def apply(model: Model, passes: str) -> Remarks:
    remarks = Remarks()
    for item in parse_passes(passes):
        item.apply(model, remarks)
        model.forget_names()
        verify(model)
    return remarks


def tune(model: Model) -> Remarks:
    """Apply tune mode, checked: outputs, structure, and that a second run changes nothing."""
    steps = run_passes(model, parse_passes(f"{TUNE},{TUNE}"), checker=Checker(model)).steps
    assert not steps[1].changed
    remarks = Remarks()
    remarks.items = steps[0].remarks
    return remarks


def texts(remarks: Remarks, kind: str = "missed") -> str:
    return " | ".join(item.text for item in remarks.items if item.kind == kind)


def layers(model: Model) -> list[tuple[str, list[bytes]]]:
    """Each layer with the bits of its constants, a bias of zeros being none."""
    found = []
    for node in model.nodes("Conv", "ConvTranspose", "Gemm", "MatMul", "Add"):
        arrays = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
        found.append((node.op_type, [f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays]))
    return found


def assert_folds_to_deploy(model: Model) -> None:
    other = model.clone()
    apply(other, f"{TUNE},{FOLD}")
    apply(model, DEPLOY)
    assert ops(other) == ops(model)
    assert layers(other) == layers(model)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    axes=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    group=st.sampled_from([1, 2, 6]),
    transposed=st.booleans(),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    wide_statistics=st.booleans(),
    epsilon=st.sampled_from([1e-5, 1e-3]),
    seed=st.integers(0, 1000),
)
def test_folding_the_constants_of_tune_gives_deploy_bit_for_bit(
    make_net, axes, bias, affine, group, transposed, dtype, wide_statistics, epsilon, seed
) -> None:
    rng = np.random.default_rng(seed)
    text = {np.float16: "float16", np.float32: "float", np.float64: "double"}[dtype]
    shape = (6, 12 // group) if transposed else (12, 6 // group)
    statistics = norm(12, dtype=np.float32 if wide_statistics and dtype is np.float16 else dtype, seed=seed)
    if not affine:  # As torch exports a norm without parameters.
        statistics["n_s"], statistics["n_b"] = (
            np.ones_like(statistics["n_s"]),
            np.zeros_like(statistics["n_b"]),
        )
    weights = {"w": rng.standard_normal((*shape, *[3] * axes)).astype(dtype)}
    if bias:
        weights["b"] = rng.standard_normal(12).astype(dtype)
    op = "ConvTranspose" if transposed else "Conv"
    model = make_net(
        f"({text}[2,6,{','.join('987'[:axes])}] x) => ({text}[{','.join('?' * (axes + 2))}] y)",
        f"c = {op}<group = {group}>(x, w{', b' if bias else ''})\n"
        + bn("c", "y", attributes=f"<epsilon = {epsilon}>"),
        **weights,
        **statistics,
    )
    assert_folds_to_deploy(model)
    assert ops(model) == {op: 1}


LINEAR = [
    ("y0 = MatMul(x, w)\n", {"w": f32(8, 5)}),
    ("m = MatMul(x, w)\ny0 = Add(m, b)\n", {"w": f32(8, 5), "b": f32(5)}),
    ("m = MatMul(x, w)\ny0 = Add(b, m)\n", {"w": f32(8, 5), "b": f32(1, 5)}),
    ("y0 = Gemm(x, w)\n", {"w": f32(8, 5)}),
    ("y0 = Gemm<transB = 1>(x, w, b)\n", {"w": f32(5, 8), "b": f32(5)}),
    ("y0 = Gemm<alpha = 0.5, beta = 3.0>(x, w, b)\n", {"w": f32(8, 5), "b": f32(1, 5)}),
    ("y0 = Gemm<alpha = 2.0, beta = 0.5, transB = 1>(x, w, b)\n", {"w": f32(5, 8), "b": f32(1)}),
    ("y0 = Gemm<beta = 0.0>(x, w, b)\n", {"w": f32(8, 5), "b": f32(5)}),
    ("t = Transpose<perm = [1, 0]>(w)\ny0 = MatMul(x, t)\n", {"w": f32(5, 8)}),
]


@pytest.mark.parametrize(("body", "weights"), LINEAR)
def test_linear_layers(make_net, body: str, weights: dict[str, np.ndarray]) -> None:
    model = make_net("(float[N,8] x) => (float[N,5] y)", body + bn("y0", "y"), **weights, **norm(5))
    tuned = model.clone()
    tune(tuned)
    assert ops(tuned)["BatchNormalization"] == 0
    assert set(weights) | {"n_s", "n_b", "n_m", "n_v"} >= set(tuned.graph.initializers) >= {"w", "n_s"}
    assert_folds_to_deploy(model)


def test_parameters_keep_their_names_and_statistics_are_marked(make_net) -> None:
    model = make_net(X4, "c = Conv(x, w, b)\n" + bn("c", "y"), w=f32(4, 6, 3, 3), b=f32(4), **norm(4))
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    remarks = tune(model)
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert {name: id(tensor) for name, tensor in after.items()} == {n: id(t) for n, t in before.items()}
    marked = {n for n, v in model.graph.initializers.items() if v.metadata_props.get(ROLE_KEY) == "buffer"}
    assert marked == {"n_m", "n_v"}
    assert "on every run" in texts(remarks, "passed")


def test_the_mark_outlives_a_file(make_net, tmp_path) -> None:
    model = make_net(X4, "c = Conv(x, w)\n" + bn("c", "y"), w=f32(4, 6, 3, 3), **norm(4))
    tune(model)
    model.save(tmp_path / "tuned.onnx")
    read = read_onnx(tmp_path / "tuned.onnx")
    marked = {n for n, v in read.graph.initializers.items() if v.metadata_props.get(ROLE_KEY) == "buffer"}
    assert marked == {"n_m", "n_v"}
    assert ops(read) == ops(model)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_builders_keep_their_outputs(name: str) -> None:
    model = Model(BUILDERS[name]())
    norms = ops(model)["BatchNormalization"]
    remarks = tune(model)
    left = ops(model)["BatchNormalization"]
    assert remarks.count("passed") >= norms - left
    assert left <= remarks.count("missed")


def test_a_convolution_called_twice_keeps_one_weight(make_net) -> None:
    body = "c = Conv(x, w)\n" + bn("c", "p") + "d = Conv(x, w)\n" + bn("d", "q", "k") + "y = Add(p, q)"
    model = make_net(X4, body, w=f32(4, 6, 3, 3), **norm(4), **norm(4, "k", seed=1))
    tuned = model.clone()
    tune(tuned)
    assert ops(tuned)["BatchNormalization"] == 0
    assert set(tuned.graph.initializers) == set(model.graph.initializers)
    assert_folds_to_deploy(model)


def test_rows_of_norms_scales_and_shifts(make_net) -> None:
    body = (
        "c = Conv(x, w)\ni = Identity(c)\nd = Mul(i, p)\n" + bn("d", "e")
        + "f = Sub(one, e)\ng = Div(f, p)\nh = Neg(g)\nk = Sub(h, p)\nl = Add(k, p)\nm = Mul(l, p)\n"
        + bn("m", "y", "k")
    )  # fmt: skip
    model = make_net(
        X4, body, w=f32(4, 6, 3, 3), p=RNG.uniform(0.5, 2, (1, 4, 1, 1)).astype(np.float32),
        one=np.float32(1), **norm(4), **norm(4, "k", seed=3),
    )  # fmt: skip
    tuned = model.clone()
    assert tune(tuned).count("passed") == 9
    assert ops(tuned)["BatchNormalization"] == 0
    assert_folds_to_deploy(model)


LEFT = [
    ("only into the layer whose output", bn("x", "a", "m") + "y = Conv(a, w)", norm(6, "m")),
    ("only into the layer whose output", bn("x", "a", "m") + "y = Relu(a)", norm(6, "m")),
    ("scales and shifts without a batch norm", "c = Conv(x, w)\ny = Mul(c, p)", {"p": f32(4, 1, 1)}),
    ("read elsewhere", "c = Conv(x, w)\n" + bn("c", "d") + "e = Relu(c)\ny = Add(d, e)", {}),
    ("computed at run time", "u = Relu(w)\nc = Conv(x, u)\n" + bn("c", "y"), {}),
]


@pytest.mark.parametrize(("reason", "body", "weights"), LEFT)
def test_what_has_no_tune_form_is_left_with_a_remark(make_net, reason, body, weights) -> None:
    pool = {"w": f32(4, 6, 3, 3), **norm(4), **weights}
    model = make_net(X4, body, **{name: array for name, array in pool.items() if name in body})
    before = ops(model)
    assert reason in texts(tune(model))
    assert ops(model) == before


def test_an_embedding_and_old_operator_sets_have_no_tune_form(make_net) -> None:
    model = make_net(
        "(int64[N] x) => (float[N,5] y)", "e = Gather(w, x)\n" + bn("e", "y"), w=f32(11, 5), **norm(5)
    )
    assert "an embedding has no tune form" in texts(tune(model))
    old = "c = Conv(x, w)\ny = BatchNormalization<is_test = 1>(c, n_s, n_b, n_m, n_v)"
    model = make_net(X4, old, opset=6, w=f32(4, 6, 3, 3), **norm(4))
    assert "needs operator set 7" in texts(apply(model, TUNE))


def test_a_graph_output_blocks(make_net) -> None:
    model = make_net(
        "(float[2,6,9,8] x) => (float[2,?,?,?] y, float[2,?,?,?] c)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        w=f32(4, 6, 3, 3),
        **norm(4),
    )
    assert "is an output of the graph" in texts(tune(model))


def test_inside_branches_with_captured_weights(make_net) -> None:
    then = "c = Conv(x, w)\n" + bn("c", "yt")
    model = make_net(
        "(bool b, float[2,6,9,8] x) => (float[2,?,?,?] y)",
        f"y = If(b) <then_branch = t () => (float[2,?,?,?] yt) {{ {then} }}, "
        "else_branch = e () => (float[2,?,?,?] yo) { yo = Conv(x, w) }>",
        w=f32(4, 6, 3, 3),
        **norm(4),
    )
    for choice in (True, False):
        copy, inputs = model.clone(), {"b": np.array(choice), "x": f32(2, 6, 9, 8)}
        want = Oracle(copy).run(inputs)["y"]
        apply(copy, TUNE)
        assert ops(copy)["BatchNormalization"] == 0
        assert "w" in copy.graph.initializers
        assert np.allclose(Oracle(copy).run(inputs)["y"], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_half_precision_computes_what_deploy_computes(make_net) -> None:
    # The runtime has no half convolution on a CPU; ONNX's own evaluator has.
    model = make_net(
        "(float16[2,6,9,8] x) => (float16[?,?,?,?] y)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        w=f32(4, 6, 3, 3).astype(np.float16),
        **norm(4, dtype=np.float16),
    )
    tuned, inputs = model.clone(), {"x": f32(2, 6, 9, 8).astype(np.float16)}
    apply(tuned, TUNE)
    apply(model, DEPLOY)
    want, got = (ReferenceEvaluator(ir.to_proto(m.ir)).run(None, inputs)[0] for m in (model, tuned))
    assert got.dtype == np.float16
    assert np.array_equal(got, want)


def test_overflow_is_refused_and_a_negative_variance_is_an_error(make_net) -> None:
    flat = {"n_s": np.full(4, 8, np.float16), **{f"n_{k}": np.zeros(4, np.float16) for k in "bmv"}}
    text = "(float16[1,6,9,8] x) => (float16[?,?,?,?] y)"
    w = np.full((4, 6, 1, 1), 100, np.float16)
    model = make_net(text, "c = Conv(x, w)\n" + bn("c", "y"), w=w, **flat)
    assert "would overflow float16" in texts(apply(model, TUNE))
    assert ops(model) == {"Conv": 1, "BatchNormalization": 1}
    flat["n_v"] = -np.ones(4, np.float16)
    model = make_net(text, "c = Conv(x, w)\n" + bn("c", "y"), w=w, **flat)
    with pytest.raises(InvalidModelError, match="negative variance"):
        apply(model, TUNE)


def test_the_report_counts_activation_bytes(make_net) -> None:
    model = make_net(
        "(float[2,6,9,8] x) => (float[2,4,7,6] y)",
        "c = Conv(x, w)\n" + bn("c", "y"), w=f32(4, 6, 3, 3), **norm(4),
    )  # fmt: skip
    model.graph[0].outputs[0].shape = ir.Shape([2, 4, 7, 6])
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    (remark,) = [r for r in tune(model).items if r.kind == "passed"]
    assert remark.data["activation_bytes"] == 2 * 4 * 7 * 6 * 4
    assert remark.data["max_abs_scale"] > 0


@pytest.mark.parametrize(
    "option", ["fold_bn_conv=false", "bn_conv_padding=bias_map", "fold_pointwise=false", "lone_norm=mul_add"]
)
def test_options_that_do_nothing_in_tune_mode_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match="does nothing with mode=tune"):
        parse_passes(f"fuse-conv-bn{{mode=tune,{option}}}")


def test_constant_nodes_after_the_convolution_come_before_its_arithmetic(make_net) -> None:
    vectors = "".join(f"n_{k} = Constant<value = float[2] {{1.5, 0.5}}>()\n" for k in "smv")
    late = "u = Constant<value = float[2] {0.25, -1.0}>()\nn_b = Identity(u)\n"
    model = make_net(
        "(float[N,1,4,4] x) => (float[N,2,4,4] y)",
        "c = Conv(x, w)\n" + vectors + late + bn("c", "y"),
        w=f32(2, 1, 1, 1),
    )
    tune(model)
    assert ops(model)["BatchNormalization"] == 0

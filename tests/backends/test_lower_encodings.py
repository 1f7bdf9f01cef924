from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effic.backends import get_backend
from effic.backends.ort.artifact import OrtArtifact
from effic.backends.ort.blocks import BLOCK_SIZES, pack_rows, transpose_codes
from effic.backends.ort.decode_at_load import runtime_dequantized
from effic.ir.encodings import Encoding, Outliers, build, code_tensor, code_type, decode
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.passes.base import Remarks

F32 = ir.DataType.FLOAT


def make_encoding(
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group: int = 32,
    k_axis: int = 0,
    symmetric: bool = True,
    opset: int = 25,
    seed: int = 0,
    dtype: type = np.float32,
    outliers: Outliers | None = None,
) -> Encoding:
    """Random codes; group 0 is per output channel, -1 per tensor. Groups run along ``k_axis``."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    kind = code_type(bits, symmetric, opset)
    low, high = (-half, half) if symmetric else (0, 2 * half)
    values = rng.integers(low, high, shape).astype(np.int8 if symmetric else np.uint8)
    if group > 0:
        parameter_shape = tuple(-(-d // group) if i == k_axis else d for i, d in enumerate(shape))
        axis = k_axis
    else:
        parameter_shape, axis = ((shape[1 - k_axis],), 1 - k_axis) if group == 0 else ((), 0)
    scales = np.asarray((rng.random(parameter_shape) + 0.5) / half, dtype)
    zeros = None if symmetric else np.asarray(rng.integers(0, 2 * half, parameter_shape), np.uint8)
    return Encoding(
        code_tensor(values, kind),
        scales,
        zeros,
        axis,
        max(group, 0),
        bits,
        shape,
        outliers=outliers,
        weight="w",
    )


def make_model(text: str, weights: dict[str, Encoding], *, opset: int = 25) -> Model:
    """A model from ONNX text in which ``weights`` (undefined names of the text) are encodings."""
    header = f'<ir_version: 13, opset_import: ["" : {opset}]>\n'
    declared = "{" + "}"
    model = Model(ir.from_onnx_text(header + text.replace("{}", declared)))
    for name, encoding in weights.items():
        placeholder = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(placeholder)
        placeholder.name = None
        value = build(model, model.graph, encoding, name)
        placeholder.replace_all_uses_with(value)
    verify(model)
    return model


def linear(encoding: Encoding, op: str = "y = MatMul(x, w)", x_shape: str = "M,K") -> Model:
    rows, columns = encoding.shape
    text = f"g (float[{x_shape}] x, float[{rows},{columns}] w) => (float y) {{ {op} }}"
    return make_model(text, {"w": encoding})


def run(model: Model, feeds: dict[str, np.ndarray], *, optimize: bool = True) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model.ir).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def lower(model: Model, target: str = "ort-cpu") -> Remarks:
    remarks = Remarks()
    assert get_backend(target).lower(model, remarks) is model
    verify(model)
    check_no_cliff(model)
    return remarks


def check_no_cliff(model: Model) -> None:
    """No form on the list of those that decode a whole weight at every call."""
    for node in model.nodes("MatMulNBits", domain="com.microsoft"):
        bits = node.attributes["bits"].as_int()
        block = node.attributes["block_size"].as_int()
        level = node.attributes["accuracy_level"].as_int()
        assert bits == 4 or level == 4
        assert block in BLOCK_SIZES[bits]
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            assert node.inputs[3].dtype == ir.DataType.UINT8
        assert len(node.inputs) <= 4 or node.inputs[4] is None
        assert "com.microsoft" in model.ir.opset_imports


def ops(model: Model) -> list[str]:
    return sorted(n.op_type for n in model.nodes(domain=None) if n.op_type != "Constant")


def distance(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def activations(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    list(itertools.product([2, 3, 4, 8], [16, 32, 48, 128, 512, 0, -1], [True, False])),
)
def test_matmul_equals_decoded_weight(bits: int, group: int, symmetric: bool) -> None:
    # 600 inputs: a short last group for each of these group sizes but none for per-channel.
    encoding = make_encoding((600, 40), bits=bits, group=group, symmetric=symmetric)
    x = activations(3, 600)
    want = x.astype(np.float64) @ decode(encoding).astype(np.float64)
    for level, tolerance in ((0, 1e-5), (4, 2e-2)):
        model = linear(encoding)
        remarks = lower(model, f"ort-cpu{{accuracy_level={level}}}")
        assert distance(want, run(model, {"x": x})[0]) < tolerance
        kernel = "MatMulNBits" in ops(model)
        assert kernel == (bits != 8 or level == 4)
        assert remarks.count("missed") == (not kernel)
        assert runtime_dequantized(model) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (64, 64), (2050, 300), (16, 700)])
def test_packed_codes_are_transposed(bits: int, shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, shape).astype(np.uint8)
    want = pack_rows(np.ascontiguousarray(codes.T), bits)
    got = transpose_codes(pack_rows(codes, bits), shape[1], bits)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert not got[:, want.shape[1] :].any()


@pytest.mark.parametrize("k", [1, 15, 16, 33, 250, 256, 257])
@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ragged_sizes(k: int, n: int, symmetric: bool) -> None:
    for group, k_axis in itertools.product((32, 0), (0, 1)):
        shape = (k, n) if k_axis == 0 else (n, k)
        encoding = make_encoding(shape, group=group, symmetric=symmetric, k_axis=k_axis)
        op = "y = MatMul(x, w)" if k_axis == 0 else "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"
        model = linear(encoding, op)
        lower(model, "ort-cpu{accuracy_level=0}")
        assert "Transpose" not in ops(model)
        weight = decode(encoding).astype(np.float64)
        x = activations(2, k)
        want = x @ (weight if k_axis == 0 else weight.T)
        assert distance(want, run(model, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_opset_21_stores_narrow_codes_wider_and_runs_them_narrow(bits: int) -> None:
    encoding = make_encoding((64, 24), bits=bits, opset=21)
    model = make_model(
        "g (float[M,64] x, float[64,24] w) => (float y) { y = MatMul(x, w) }", {"w": encoding}, opset=21
    )
    remarks = lower(model)
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    assert node.attributes["bits"].as_int() == {2: 2, 3: 4, 4: 4, 8: 8}[bits]
    if bits == 3:
        assert "3-bit codes stored as 4" in remarks.items[0].text
    x = activations(5, 64)
    assert distance(x.astype(np.float64) @ decode(encoding), run(model, {"x": x})[0]) < 2e-2


def test_2_bit_declaration_that_is_not_true_is_not_believed() -> None:
    encoding = make_encoding((64, 24), bits=4)
    lying = Encoding(encoding.codes, encoding.scales, None, 0, 32, 2, (64, 24), weight="w")
    model = linear(lying)
    lower(model, "ort-cpu")
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    assert node.attributes["bits"].as_int() == 4


@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 3, 64), (2, 1, 3, 64)])
def test_batch_dimensions(shape: tuple[int, ...]) -> None:
    encoding = make_encoding((64, 24))
    names = ",".join(f"D{i}" for i in range(len(shape) - 1))
    model = linear(encoding, x_shape=f"{names},64" if names else "64")
    lower(model, "ort-cpu{accuracy_level=0}")
    x = activations(*shape)
    got = run(model, {"x": x})[0]
    want = x @ decode(encoding)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0), (2.0, 0.0)])
@pytest.mark.parametrize("bias", ["none", "[24]", "[1,24]", "[1]", "live", "[M,24]"])
def test_gemm(trans_b: int, alpha: float, beta: float, bias: str) -> None:
    encoding = make_encoding((24, 64) if trans_b else (64, 24), k_axis=trans_b, symmetric=False)
    rows, columns = encoding.shape
    rng = np.random.default_rng(3)
    feeds = {"x": activations(3, 64)}
    declared, third, c = "", "", np.zeros(24, np.float32)
    if bias == "live":
        declared, third, c = ", float[24] c", ", c", rng.standard_normal(24).astype(np.float32)
        feeds["c"] = c
    elif bias == "[M,24]":
        declared, third, c = ", float[M,24] c", ", c", rng.standard_normal((3, 24)).astype(np.float32)
        feeds["c"] = c
    elif bias != "none":
        c = rng.standard_normal([int(d) for d in bias.strip("[]").split(",")]).astype(np.float32)
        third = ", c"
    text = (
        f"g (float[M,64] x, float[{rows},{columns}] w{declared}) => (float[M,24] y) "
        f"<float{bias if third and not declared else '[1]'} {'c' if third and not declared else 'unread'} = "
        f"{{{', '.join(str(float(v)) for v in (c.ravel() if third and not declared else [0]))}}}> "
        f"{{ y = Gemm<transB={trans_b}, alpha={alpha}, beta={beta}>(x, w{third}) }}"
    )
    model = make_model(text, {"w": encoding})
    lower(model, "ort-cpu{accuracy_level=0}")
    assert "Gemm" not in ops(model)
    weight = decode(encoding).astype(np.float64)
    want = alpha * (feeds["x"] @ (weight.T if trans_b else weight)) + beta * c
    assert distance(want, run(model, feeds)[0]) < 1e-5


def test_gemm_that_transposes_activations_is_decoded_once() -> None:
    encoding = make_encoding((64, 24))
    model = linear(encoding, "y = Gemm<transA=1>(x, w)", "64,M")
    remarks = lower(model)
    assert "transA" in remarks.items[0].text
    assert "when the file is loaded" in remarks.items[1].text
    x = activations(64, 3)
    assert distance(x.T @ decode(encoding).astype(np.float64), run(model, {"x": x})[0]) < 1e-5


def test_tied_matmuls_share_their_blocks() -> None:
    encoding = make_encoding((64, 64))
    model = linear(encoding, "a = MatMul(x, w) b = MatMul(a, w) y = Add(a, b)")
    lower(model, "ort-cpu{accuracy_level=0}")
    first, second = model.nodes("MatMulNBits", domain="com.microsoft")
    assert list(first.inputs[1:]) == list(second.inputs[1:])
    assert sum(v.dtype == ir.DataType.UINT8 for v in model.graph.initializers.values()) == 1
    x = activations(2, 64)
    weight = decode(encoding).astype(np.float64)
    assert distance(x @ weight + x @ weight @ weight, run(model, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"), list(itertools.product([2, 3, 4, 8], [True, False], [32, 48, 0, -1]))
)
def test_embedding_look_up_decodes_rows_only(bits: int, symmetric: bool, group: int) -> None:
    for columns in (64, 50):
        encoding = make_encoding((30, columns), bits=bits, symmetric=symmetric, group=group, k_axis=1)
        text = (
            f"g (int64[M,T] ids, float[30,{columns}] w) => (float[M,T,{columns}] y) {{ y = Gather(w, ids) }}"
        )
        model = make_model(text, {"w": encoding})
        remarks = lower(model)
        assert ops(model).count("GatherBlockQuantized") == 1, remarks.items
        assert "DequantizeLinear" not in ops(model)
        ids = np.array([[0, 29, -1], [5, 5, -30]])
        np.testing.assert_array_equal(run(model, {"ids": ids})[0], decode(encoding)[ids])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 0])
@pytest.mark.parametrize("columns", [64, 256, 80])
def test_tied_embedding_and_head(symmetric: bool, group: int, columns: int) -> None:
    encoding = make_encoding((50, columns), symmetric=symmetric, group=group, k_axis=1)
    text = (
        f"g (int64[M,T] ids, float[50,{columns}] w) => (float[M,T,50] y) "
        "{ e = Gather(w, ids) t = Transpose<perm=[1,0]>(w) y = MatMul(e, t) }"
    )
    model = make_model(text, {"w": encoding})
    lower(model, "ort-cpu{accuracy_level=0}")
    assert "DequantizeLinear" not in ops(model)
    assert "Transpose" not in ops(model)
    ids = np.array([[0, 49, -1]])
    weight = decode(encoding).astype(np.float64)
    assert distance(weight[ids] @ weight.T, run(model, {"ids": ids})[0]) < 1e-5
    (lookup,) = model.nodes("GatherBlockQuantized", domain="com.microsoft")
    (head,) = model.nodes("MatMulNBits", domain="com.microsoft")
    whole_blocks = columns % head.attributes["block_size"].as_int() == 0
    assert (lookup.inputs[0] is head.inputs[1]) == whole_blocks


def test_table_that_is_decoded_for_others_is_not_copied() -> None:
    encoding = make_encoding((50, 64), bits=8, k_axis=1)
    text = (
        "g (int64[M,T] ids, float[50,64] w) => (float[M,T,50] y) "
        "{ e = Gather(w, ids) t = Transpose<perm=[1,0]>(w) y = MatMul(e, t) }"
    )
    model = make_model(text, {"w": encoding})
    remarks = lower(model, "ort-cpu{accuracy_level=0}")
    assert [r.kind for r in remarks.items] == ["missed", "missed", "passed"]
    assert "decoded for Transpose as well" in remarks.items[1].text
    assert runtime_dequantized(model) == []
    ids, weight = np.array([[0, 49, -1]]), decode(encoding).astype(np.float64)
    assert distance(weight[ids] @ weight.T, run(model, {"ids": ids})[0]) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 24, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_per_input_channel_groups_are_decoded_once(symmetric: bool, group: int, bits: int) -> None:
    # Groups along axis 1 of [K, N]: output channels.
    encoding = make_encoding((48, 40), symmetric=symmetric, group=group, k_axis=1, bits=bits)
    model = linear(encoding)
    remarks = lower(model)
    assert [r.kind for r in remarks.items] == ["missed", "passed"]
    assert "output channels" in remarks.items[0].text
    assert runtime_dequantized(model) == []
    for value in model.nodes("Mul"):
        assert value.outputs[0].shape is not None
    x = activations(3, 48)
    reference = linear(encoding)
    want = run(reference, {"x": x}, optimize=False)[0]
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=1e-5, atol=1e-5)
    model.graph.outputs.clear()
    decoded = next(iter(model.nodes("Mul"))).outputs[0]
    model.graph.outputs.append(decoded)
    np.testing.assert_array_equal(run(model, {"x": x})[0], decode(encoding))


def test_the_runtime_folds_what_is_decoded_at_load(tmp_path) -> None:
    model = linear(make_encoding((48, 48), group=24, symmetric=False))
    lower(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    data = ir.to_proto(model.ir).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in ir.load(tmp_path / "seen.onnx").graph] == ["MatMul"]


def test_decode_at_call_leaves_the_form_and_says_what_it_costs() -> None:
    model = linear(make_encoding((48, 48), group=24))
    remarks = lower(model, "ort-cpu{decode=call}")
    assert ops(model) == ["DequantizeLinear", "MatMul"]
    assert "will run at every call" in remarks.items[-1].text
    assert len(runtime_dequantized(model)) == 1


@pytest.mark.parametrize(("group", "k_axis"), [(32, 0), (24, 0), (8, 0), (32, 1), (0, 0), (0, 1), (-1, 0)])
@pytest.mark.parametrize("bits", [4, 8])
def test_decode_at_call_says_where_the_runtime_rounds_activations(
    group: int, k_axis: int, bits: int, tmp_path: Path
) -> None:
    model = linear(make_encoding((64, 48), group=group, k_axis=k_axis, bits=bits))
    remarks = lower(model, "ort-cpu{accuracy_level=0,decode=call}")
    if ops(model) != ["DequantizeLinear", "MatMul"]:
        return  # A kernel of its own holds this one.
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    data = ir.to_proto(model.ir).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    fused = "MatMulNBits" in [n.op_type for n in ir.load(tmp_path / "seen.onnx").graph]
    assert ("makes it a MatMulNBits with 8-bit activations" in remarks.items[-1].text) == fused


def test_outliers_stay_exact() -> None:
    spots = Outliers(np.array([3, 700], np.int64), np.array([9.5, -7.25], np.float32))
    encoding = make_encoding((64, 24), outliers=spots)
    model = linear(encoding)
    remarks = lower(model)
    assert "outliers" in remarks.items[0].text
    assert runtime_dequantized(model) == []
    x = activations(3, 64)
    assert distance(x @ decode(encoding).astype(np.float64), run(model, {"x": x})[0]) < 1e-5


def test_convolution_is_decoded_once() -> None:
    base = make_encoding((8, 4 * 9), bits=8, group=0, k_axis=1)
    encoding = Encoding(base.codes, base.scales, None, 0, 0, 8, (8, 4, 3, 3), weight="w")
    text = "g (float[1,4,6,6] x, float[8,4,3,3] w) => (float y) { y = Conv(x, w) }"
    model, reference = make_model(text, {"w": encoding}), make_model(text, {"w": encoding})
    remarks = lower(model)
    assert "once" in remarks.items[0].text
    x = activations(1, 4, 6, 6)
    np.testing.assert_allclose(run(model, {"x": x})[0], run(reference, {"x": x})[0], rtol=1e-5, atol=1e-5)


def test_left_operand_and_stacked_weights_are_decoded_once() -> None:
    encoding = make_encoding((24, 64), k_axis=1)
    model = make_model("g (float[64,M] x, float[24,64] w) => (float y) { y = MatMul(w, x) }", {"w": encoding})
    remarks = lower(model)
    assert "left operand" in remarks.items[0].text
    x = activations(64, 3)
    assert distance(decode(encoding).astype(np.float64) @ x, run(model, {"x": x})[0]) < 1e-5
    flat = make_encoding((6, 40), group=0, k_axis=1)
    stacked = Encoding(flat.codes, flat.scales, None, 0, 0, 4, (2, 3, 40), weight="w")
    model = make_model(
        "g (float[2,M,3] x, float[2,3,40] w) => (float y) { y = MatMul(x, w) }", {"w": stacked}
    )
    remarks = lower(model)
    assert "no matrix" in remarks.items[0].text
    x = activations(2, 5, 3)
    assert distance(x @ decode(stacked).astype(np.float64), run(model, {"x": x})[0]) < 1e-5


def test_statically_quantized_operators_are_left_to_the_runtime() -> None:
    encoding = make_encoding((16, 8), bits=8, group=-1)
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


def test_scales_exact_in_fp16_are_stored_so() -> None:
    encoding = make_encoding((64, 24))
    halves = Encoding(
        encoding.codes,
        encoding.scales.astype(np.float16).astype(np.float32),
        None,
        0,
        32,
        4,
        (64, 24),
        weight="w",
    )
    model = linear(halves)
    lower(model, "ort-cpu{accuracy_level=0}")
    assert ops(model) == ["Cast", "MatMulNBits"]
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.UINT8, ir.DataType.FLOAT16}
    x = activations(3, 64)
    assert distance(x @ decode(halves).astype(np.float64), run(model, {"x": x})[0]) < 1e-5


def test_fp16_model() -> None:
    encoding = make_encoding((64, 24), dtype=np.float16)
    text = "g (float16[M,64] x, float16[64,24] w) => (float16[M,24] y) { y = MatMul(x, w) }"
    model = make_model(text, {"w": encoding})
    lower(model)
    assert ops(model) == ["MatMulNBits"]
    x = activations(3, 64).astype(np.float16)
    want = x.astype(np.float64) @ decode(encoding).astype(np.float64)
    assert distance(want, run(model, {"x": x})[0]) < 2e-2


def test_subgraphs_reading_outer_and_inner_weights() -> None:
    outer, inner = make_encoding((64, 64)), make_encoding((64, 64), seed=5, symmetric=False)
    text = (
        "g (float[2,64] x, bool c, float[64,64] w) => (float[2,64] y) "
        "{ y = If (c) <then_branch = a () => (float[2,64] p) { p = MatMul(x, w) }, "
        "else_branch = b () => (float[2,64] q) { q = Neg(x) }> }"
    )
    model = make_model(text, {"w": outer})
    branch = next(iter(model.nodes("If"))).attributes["else_branch"].as_graph()
    value = build(model, branch, inner, "v")
    (negate,) = [n for n in branch if n.op_type == "Neg"]
    matmul = ir.node("MatMul", [next(v for v in model.graph.inputs if v.name == "x"), value])
    branch.insert_before(negate, matmul)
    negate.replace_input_with(0, matmul.outputs[0])
    matmul.outputs[0].name = "m"
    model.forget_names()
    lower(model, "ort-cpu{accuracy_level=0}")
    assert ops(model).count("MatMulNBits") == 2
    assert "DequantizeLinear" not in ops(model)
    x = activations(2, 64)
    for flag, want in (
        (True, x @ decode(outer).astype(np.float64)),
        (False, -(x @ decode(inner).astype(np.float64))),
    ):
        assert distance(want, run(model, {"x": x, "c": np.array(flag)})[0]) < 1e-5


def test_function_bodies() -> None:
    header = '<ir_version: 13, opset_import: ["" : 25, "local" : 1]>\n'
    text = (
        "g (float[2,64] x) => (float[2,64] y) { y = local.f(x) }\n"
        '<domain: "local", opset_import: ["" : 25]> f (a) => (b) { b = Neg(a) }'
    )
    good, odd = make_encoding((64, 64)), make_encoding((64, 64), group=24, symmetric=False)
    model = Model(ir.from_onnx_text(header + text))
    (function,) = model.ir.functions.values()
    negate = function[0]
    for name, encoding in (("w", good), ("v", odd)):
        value = build(model, function.graph, encoding, name, before=negate)
        matmul = ir.node("MatMul", [negate.inputs[0], value])
        matmul.outputs[0].name = f"{name}_product"
        function.graph.insert_before(negate, matmul)
        negate.replace_input_with(0, matmul.outputs[0])
    verify(model)
    lower(model, "ort-cpu{accuracy_level=0}")
    assert "DequantizeLinear" not in ops(model)
    assert function.opset_imports["com.microsoft"] == 1
    x = activations(2, 64)
    want = -(x @ decode(good).astype(np.float64) @ decode(odd).astype(np.float64))
    assert distance(want, run(model, {"x": x})[0]) < 1e-5


def test_weight_that_is_a_graph_output_stays_one() -> None:
    encoding = make_encoding((64, 24))
    model = linear(encoding)
    decoded = next(iter(model.nodes("DequantizeLinear"))).outputs[0]
    model.graph.outputs.append(decoded)
    lower(model, "ort-cpu{accuracy_level=0}")
    x = activations(2, 64)
    y, weight = run(model, {"x": x})
    np.testing.assert_array_equal(weight, decode(encoding))
    assert distance(x @ decode(encoding).astype(np.float64), y) < 1e-5


def test_portable_changes_nothing_and_agrees_within_rounding() -> None:
    encoding = make_encoding((64, 24))
    portable, lowered = linear(encoding), linear(encoding)
    assert lower(portable, "portable").items == []
    assert ops(portable) == ["DequantizeLinear", "MatMul"]
    lower(lowered, "ort-cpu{accuracy_level=0}")
    x = activations(2, 64)
    want = run(portable, {"x": x}, optimize=False)[0]
    np.testing.assert_allclose(run(lowered, {"x": x})[0], want, rtol=1e-4, atol=1e-4)


def test_output_does_not_depend_on_session_options() -> None:
    model = linear(make_encoding((64, 24)))
    lower(model)
    x = activations(2, 64)
    np.testing.assert_array_equal(run(model, {"x": x})[0], run(model, {"x": x}, optimize=False)[0])


def test_large_weights_are_moved_while_they_are_written(tmp_path) -> None:
    encoding = make_encoding((2048, 1100), group=128)
    model = linear(encoding)
    lower(model, "ort-cpu{accuracy_level=0}")
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    assert isinstance(node.inputs[1].const_value, ir.LazyTensor)
    assert node.inputs[1].const_value.nbytes == 2048 * 1100 // 2
    path = tmp_path / "large.onnx"
    model.save(path, external=True)
    x = activations(2, 2048)
    assert distance(x @ decode(encoding).astype(np.float64), OrtArtifact.load(path).run({"x": x})["y"]) < 1e-5


def test_names_and_metadata_survive() -> None:
    model = linear(make_encoding((64, 24)))
    (matmul,) = model.nodes("MatMul")
    matmul.name = "the_product"
    matmul.metadata_props["path"] = "layers.0"
    lower(model)
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    assert (node.name, node.metadata_props["path"], node.outputs[0].name) == ("the_product", "layers.0", "y")
    assert "effic.encoding" in node.metadata_props

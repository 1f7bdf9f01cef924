from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.compressed import recognise_compressed
from effic.ir.encodings import stored_bytes
from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import Pattern, declare, declared, nm_mask
from effic.ir.verify import verify
from effic.ir.weights import weight_sites
from effic.passes.base import Remarks
from effic.passes.cleanup.fold_constants import FoldConstants
from effic.passes.quantize.quantize_rtn import QuantizeRTN
from effic.passes.sparsify import compress_nm
from effic.passes.sparsify.compress_nm import CompressNM
from effic.show import inspect_model

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
MATMUL = "y = MatMul(x, w)"


def pruned(shape: tuple[int, ...], axis: int, pattern: str = "2:4", dtype: type = np.float32) -> np.ndarray:
    weight = np.random.default_rng(sum(shape)).standard_normal(shape)
    return np.where(nm_mask(np.abs(weight), Pattern.parse(pattern), axis=axis), weight, 0).astype(dtype)


def compress(model: Model, **options: Any) -> Remarks:
    remarks = Remarks()
    CompressNM(**options).apply(model, remarks)
    model.forget_names()
    verify(model)
    return remarks


def sparse_net(
    make_net: Any, body: str, weight: np.ndarray, signature: str, *, pattern: str = "2:4"
) -> Model:
    model: Model = make_net(signature, body, opset=21, w=weight)
    declare(model, "w", Pattern.parse(pattern))
    return model


def run(path: Path, level: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def constant_bytes(model: Model) -> dict[str, int]:
    return {name: value.const_value.nbytes for name, value in model.graph.initializers.items()}


CASES = {
    "matmul": (MATMUL, (96, 64), 0, "(float[N,96] x) => (float[N,64] y)"),
    "gemm": ("y = Gemm(x, w)", (96, 64), 0, "(float[N,96] x) => (float[N,64] y)"),
    "gemm transB": ("y = Gemm<transB=1>(x, w)", (64, 96), 1, "(float[N,96] x) => (float[N,64] y)"),
    "transposed": ("v = Transpose(w) y = MatMul(x, v)", (64, 96), 1, "(float[N,96] x) => (float[N,64] y)"),
    "left": ("y = MatMul(w, x)", (64, 96), 1, "(float[96,N] x) => (float[64,N] y)"),
    "conv": ("y = Conv(x, w)", (32, 16, 3, 3), 1, "(float[N,16,6,6] x) => (float[N,32,4,4] y)"),
    "grouped conv": ("y = Conv<group=2>(x, w)", (32, 16, 3, 3), 1, "(float[N,32,6,6] x) => (float[N,32,4,4] y)"),
    "conv transpose": ("y = ConvTranspose(x, w)", (16, 32, 3, 3), 0, "(float[N,16,6,6] x) => (float[N,32,8,8] y)"),
    "ragged": (MATMUL, (94, 64), 0, "(float[N,94] x) => (float[N,64] y)"),
    "ragged conv": ("y = Conv(x, w)", (32, 18, 3, 3), 1, "(float[N,18,6,6] x) => (float[N,32,4,4] y)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_same_numbers_from_a_smaller_file(make_net: Any, tmp_path: Path, case: str, dtype: type) -> None:
    body, shape, axis, signature = CASES[case]
    if dtype is np.float16:
        signature = signature.replace("float", "float16")
    model = sparse_net(make_net, body, pruned(shape, axis, dtype=dtype), signature)
    before = {site.name: site.read() for site in weight_sites(model)}
    model.save(tmp_path / "dense.onnx")
    dims = [2 if not isinstance(d, int) else d for d in model.graph.inputs[0].shape]  # type: ignore[union-attr]
    inputs = {"x": np.random.default_rng(1).standard_normal(dims).astype(dtype)}
    remarks = compress(model)
    assert [(r.kind, r.where) for r in remarks.items] == [("passed", "w")]
    model.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "dense.onnx").stat().st_size
    for level in LEVELS:
        np.testing.assert_array_equal(
            run(tmp_path / "small.onnx", level, inputs), run(tmp_path / "dense.onnx", level, inputs)
        )
    back = read_onnx(tmp_path / "small.onnx")
    (site,) = weight_sites(back)
    np.testing.assert_array_equal(site.read(), before["w"])
    assert site.name == "w"
    assert site.compressed is not None
    assert site.compressed.describe() == "2:4 sparse, compressed"
    assert site.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    assert declared(back) == {"w": Pattern(2, 4)}


@pytest.mark.parametrize(
    ("dtype", "per_four"), [(np.float32, 68), (np.float16, 36), (ml_dtypes.bfloat16, 36)]
)
def test_the_file_has_the_bytes_of_the_formula(
    make_net: Any, tmp_path: Path, dtype: type, per_four: int
) -> None:
    kind = {np.float32: "float", np.float16: "float16", ml_dtypes.bfloat16: "bfloat16"}[dtype]
    weight = pruned((256, 128), 0, dtype=dtype)
    model = sparse_net(make_net, MATMUL, weight, f"({kind}[N,256] x) => ({kind}[N,128] y)")
    (remark,) = compress(model).items
    model.save(tmp_path / "small.onnx")
    stored = constant_bytes(read_onnx(tmp_path / "small.onnx"))
    want = per_four * weight.size // 4 // 8
    assert stored["w.nm_values"] + stored["w.nm_codes"] == want
    # Beside them the table of positions (16 codes of two int32) and the shapes that nodes read.
    assert sum(stored.values()) - want < 300
    assert remark.data["bytes_after"] == want
    assert remark.data["bytes_before"] == weight.nbytes
    assert remark.data["bits_per_weight"] == per_four / 4
    assert f"{per_four / 4:.2f} bits per weight" in remark.text
    (site,) = weight_sites(read_onnx(tmp_path / "small.onnx"))
    np.testing.assert_array_equal(site.read(), weight.T.astype(np.float32))


def test_nan_payloads_and_negative_zeros_stay(make_net: Any) -> None:
    weight = pruned((64, 48), 0)
    bits = weight.view(np.uint32)
    kept = np.argwhere(bits)
    bits[tuple(kept[0])], bits[tuple(kept[100])], bits[tuple(kept[200])] = 0x7FC0BEEF, 0xFFA00001, 0x80000000
    model = sparse_net(make_net, MATMUL, weight, "(float[N,64] x) => (float[N,48] y)")
    compress(model)
    with weight_sites(model)[0].matrix() as matrix:
        np.testing.assert_array_equal(matrix.view(np.uint32), bits)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "MatMul").inputs[1])
    (_, loaded) = Oracle(model).run({"x": np.zeros((1, 64), np.float32)}).values()
    np.testing.assert_array_equal(loaded.view(np.uint32), bits)


@st.composite
def nets(draw: st.DrawFn) -> tuple[np.ndarray, str]:
    m = draw(st.sampled_from([2, 4, 8, 16, 5]))
    n = draw(st.integers(1, max(1, m // 2)))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    shape = draw(st.integers(3, 50)), draw(st.integers(3, 50))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = random.standard_normal(shape)
    mask = nm_mask(random.random(shape), Pattern(n, m), axis=0) & (random.random(shape) < 0.9)
    return np.where(mask, weight, 0).astype(dtype), f"{n}:{m}"


@given(nets())
@settings(deadline=None, max_examples=40)
def test_any_shape_and_pattern(make_net: Any, case: tuple[np.ndarray, str]) -> None:
    weight, pattern = case
    kind = "float" if weight.dtype == np.float32 else "float16"
    signature = f"({kind}[2,{weight.shape[0]}] x) => ({kind}[2,{weight.shape[1]}] y)"
    model = sparse_net(make_net, MATMUL, weight, signature, pattern=pattern)
    inputs = {"x": np.random.default_rng(0).standard_normal((2, weight.shape[0])).astype(weight.dtype)}
    want = Oracle(model).run(inputs)["y"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_nm, "_GRAPH_BYTES", -10_000)  # however small
        assert compress(model).count("passed") == 1
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)
    np.testing.assert_array_equal(weight_sites(model)[0].read(), weight.T.astype(np.float32))


# -- quantized weights ----------------------------------------------------------------------------

QUANTIZED = {
    "4-bit": {},
    "4-bit asymmetric": {"symmetric": False},
    "4-bit ic": {"axis": "ic"},
    "4-bit ic asymmetric": {"axis": "ic", "symmetric": False},
    "4-bit ragged blocks": {"symmetric": False, "group_size": 40},
    "4-bit per channel": {"symmetric": False, "group_size": -1},
    "3-bit": {"bits": 3, "symmetric": False},
    "8-bit": {"bits": 8},
    "8-bit asymmetric": {"bits": 8, "symmetric": False},
}


@pytest.mark.parametrize("looked_up", [False, True], ids=["spread", "looked up"])
@pytest.mark.parametrize("case", QUANTIZED)
def test_codes_of_a_quantized_weight(
    make_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, looked_up: bool
) -> None:
    monkeypatch.setattr(compress_nm, "_LOOKED_UP", 1 if looked_up else 1 << 30)
    monkeypatch.setattr(compress_nm, "_GRAPH_BYTES", -30_000)
    weight = pruned((96, 64), 0)
    model = sparse_net(make_net, MATMUL, weight, "(float[N,96] x) => (float[N,64] y)")
    QuantizeRTN(**QUANTIZED[case]).apply(model, Remarks())  # type: ignore[arg-type]
    model.save(tmp_path / "dense.onnx")
    (before,) = weight_sites(model)
    read, plain = before.read(), before.encoding
    assert plain is not None
    (remark,) = compress(model).items
    assert remark.kind == "passed", remark.text
    wide = plain.stored_bits
    assert remark.data["bytes_after"] * 8 == weight.size // 4 * (2 * wide + 4)
    assert (remark.data["bits_per_weight"] == 3) == (wide == 4)
    model.save(tmp_path / "small.onnx")
    back = read_onnx(tmp_path / "small.onnx")
    stored = constant_bytes(back)
    assert stored["w.nm_values"] + stored["w.nm_codes"] == remark.data["bytes_after"]
    (site,) = weight_sites(back)
    np.testing.assert_array_equal(site.read(), read)
    assert site.encoding is not None
    assert (site.encoding.bits, site.encoding.codes.dtype) == (plain.bits, plain.codes.dtype)
    assert site.encoding.codes.tobytes() == plain.codes.tobytes()
    assert stored_bytes(site.encoding) < stored_bytes(plain)
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)}
    for level in LEVELS:
        np.testing.assert_array_equal(
            run(tmp_path / "small.onnx", level, inputs), run(tmp_path / "dense.onnx", level, inputs)
        )


def test_a_quantized_convolution(make_net: Any) -> None:
    weight = pruned((64, 32, 3, 3), 1)
    model = sparse_net(make_net, "y = Conv(x, w)", weight, "(float[N,32,6,6] x) => (float[N,64,4,4] y)")
    QuantizeRTN(kinds=("Conv",), symmetric=False, group_size=36).apply(model, Remarks())
    inputs = {"x": np.random.default_rng(1).standard_normal((2, 32, 6, 6)).astype(np.float32)}
    want = Oracle(model).run(inputs)["y"]
    assert compress(model).count("passed") == 1
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)


def test_large_weights_have_their_groups_looked_up(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((512, 512), 0), "(float[N,512] x) => (float[N,512] y)")
    QuantizeRTN().apply(model, Remarks())
    compress(model)
    operators = [node.op_type for node in model.graph]
    assert "ScatterElements" not in operators
    assert len(operators) <= 11, "the chain is to stay short: the runtime keeps every step while it loads"


# -- where it applies -----------------------------------------------------------------------------


def test_a_shared_weight_is_stored_once(make_net: Any) -> None:
    body = "a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)"
    model = sparse_net(make_net, body, pruned((96, 64), 0), "(float[2,96] x) => (float[2,64] y)")
    inputs = {"x": np.ones((2, 96), np.float32)}
    want = Oracle(model).run(inputs)["y"]
    assert compress(model).count("passed") == 1
    assert sum(node.op_type == "ScatterElements" for node in model.graph) == 1
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)
    assert len(weight_sites(model)[0].uses) == 2


def test_weights_share_their_tables(make_net: Any) -> None:
    body = "a = MatMul(x, w) y = MatMul(a, v)"
    weights = {"w": pruned((96, 64), 0), "v": pruned((64, 96), 0)}
    model = make_net("(float[2,96] x) => (float[2,96] y)", body, opset=21, **weights)
    assert compress(model, detect="2:4").count("passed") == 2
    assert sum("nm_positions" in name for name in model.graph.initializers) == 1


def test_weights_of_one_shape_share_their_zeros(make_net: Any) -> None:
    body = "a = MatMul(x, w) b = MatMul(a, v) c = Constant<value_float=2.0>() y = Mul(b, c)"
    weights = {"w": pruned((96, 96), 0), "v": pruned((96, 96), 0)}
    model = make_net("(float[2,96] x) => (float[2,96] y)", body, opset=21, **weights)
    inputs = {"x": np.ones((2, 96), np.float32)}
    want = Oracle(model).run(inputs)["y"]
    assert compress(model, detect="2:4").count("passed") == 2
    assert sum(node.op_type == "Expand" for node in model.graph) == 1
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)


def test_in_a_branch(make_net: Any) -> None:
    body = """y = If (c) <then_branch = t () => (float[2,64] p) { p = MatMul(x, w) },
                        else_branch = e () => (float[2,64] q) { q = MatMul(x, w) }>"""
    model = sparse_net(make_net, body, pruned((96, 64), 0), "(bool c, float[2,96] x) => (float[2,64] y)")
    inputs = {"c": np.array(True), "x": np.ones((2, 96), np.float32)}
    want = Oracle(model).run(inputs)["y"]
    assert compress(model).count("passed") == 1
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)


def test_in_a_function(make_net: Any) -> None:
    functions = """<domain: "f", opset_import: ["": 21]> layer (a) => (b) {
        w = Constant<value = float[4, 2] {1, 0, 0, 2, 0, 0, 3, 0}>() b = MatMul(a, w) }"""
    model = make_net("(float[2,64] x) => (float[2,64] y)", "y = f.layer(x)", opset=21, functions=functions)
    function = next(iter(model.ir.functions.values()))
    constant = function[0]
    constant.attributes["value"] = ir.AttrTensor("value", ir.Tensor(pruned((64, 64), 0), name="w"))
    inputs = {"x": np.ones((2, 64), np.float32)}
    want = Oracle(model).run(inputs)["y"]
    assert compress(model, detect="2:4").count("passed") == 1
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)


def test_detect_finds_what_is_not_declared(make_net: Any) -> None:
    body = "a = MatMul(x, w) y = MatMul(a, v)"
    dense = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    weights = {"w": pruned((96, 64), 0), "v": dense}
    model = make_net("(float[2,96] x) => (float[2,96] y)", body, opset=21, **weights)
    (remark,) = compress(model.clone()).items
    assert remark.kind == "missed"
    assert "2 weights follow no declared pattern" in remark.text
    assert "detect=2:4" in remark.text
    passed, missed = compress(model, detect="2:4").items
    assert (passed.kind, passed.where, missed.kind, missed.where) == ("passed", "w", "missed", "v")
    assert "1536 of 1536 groups have more than 2 non-zeros" in missed.text


def test_an_impossible_pattern_is_refused() -> None:
    with pytest.raises(UsageError, match="is no sparsity pattern"):
        CompressNM(detect="4:2")


REFUSALS = {
    "small": ("(float[N,16] x) => (float[N,16] y)", MATMUL, (16, 16), "would not get smaller: 1024 bytes dense"),
    "output": ("(float[N,64] x) => (float[N,64] y, float[64,64] w)", MATMUL, (64, 64), "graph output 'w' as well"),
    "table": ("(int64[N] x) => (float[N,64] y)", "y = Gather(w, x)", (64, 64), "no weight"),
    "read twice": (
        "(float[N,64] x) => (float[N,64] y, float[64,64] z)",
        "y = MatMul(x, w) z = Relu(w)",
        (64, 64),
        "is read by Relu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(make_net: Any, case: str) -> None:
    signature, body, shape, text = REFUSALS[case]
    model = sparse_net(make_net, body, pruned(shape, 0), signature)
    before = [node.op_type for node in model.graph]
    remarks = compress(model)
    assert remarks.count("passed") == 0
    assert case == "table" or text in remarks.items[0].text
    assert [node.op_type for node in model.graph] == before


def test_tied_to_a_table_is_left(make_net: Any) -> None:
    body = "a = Gather(w, i) y = Gemm<transB=1>(a, w)"
    model = sparse_net(make_net, body, pruned((64, 96), 1), "(int64[N] i) => (float[N,64] y)")
    assert "a table whose rows Gather looks up" in compress(model).items[0].text


def test_two_bit_codes_are_left(make_net: Any) -> None:
    model = make_net("(float[N,96] x) => (float[N,64] y)", MATMUL, opset=25, w=pruned((96, 64), 0))
    declare(model, "w", Pattern(2, 4))
    QuantizeRTN(bits=2, group_size=32).apply(model, Remarks())
    assert "has codes of type INT2" in compress(model).items[0].text


def test_named_in_skip(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    assert compress(model, skip=("w",)).items[0].text == "is named in skip"
    missed = compress(model, skip=("nothing",)).items[0]
    assert "skip names 'nothing', which matches no weight" in missed.text


def test_once_is_enough_and_later_passes_leave_it(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    again = compress(model.clone())
    assert again.count("passed") == 0
    assert again.items[0].text == "is 2:4 sparse, compressed already"
    remarks = Remarks()
    QuantizeRTN().apply(model, remarks)
    assert remarks.count("passed") == 0
    assert remarks.items[0].text.startswith("is stored 2:4 sparse, compressed; passes that change weights go")
    FoldConstants().apply(model, remarks)
    assert weight_sites(model)[0].compressed is not None


def test_show_tells_how_it_is_stored(make_net: Any, tmp_path: Path) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    model.save(tmp_path / "small.onnx")
    (row,) = inspect_model(tmp_path / "small.onnx").sites
    assert row.storage == "float32, 2:4 sparse, compressed"
    assert 17 <= row.bits < 17.5


def test_other_graphs_are_not_taken_for_compressed_weights(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    (site,) = weight_sites(model)
    assert site.compressed is not None
    core = site.compressed.core
    core.attributes["reduction"] = ir.AttrString("reduction", "add")
    assert recognise_compressed(site.value) is None
    del core.attributes["reduction"]
    zero = core.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
    zero.const_value = ir.Tensor(np.ones((), np.float32))  # type: ignore[union-attr]
    assert recognise_compressed(site.value) is None
    assert "is computed at run time" in str(weight_sites(model)[0].why_not)


def test_a_broken_file_is_refused_in_a_sentence(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    (site,) = weight_sites(model)
    assert site.compressed is not None
    places = model.graph.initializers["nm_positions_4"]
    places.const_value = ir.Tensor(np.full((16, 2), 9, np.int32))
    with pytest.raises(InvalidModelError, match="cannot be decompressed"):
        site.read()


def test_sizes_are_not_taken_on_trust(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    (site,) = weight_sites(model)
    assert site.compressed is not None
    expand = site.compressed.core.inputs[0].producer()  # type: ignore[union-attr]
    expand.inputs[1].const_value = ir.Tensor(np.array([1 << 40, 4], np.int64))  # type: ignore[union-attr]
    assert recognise_compressed(site.value) is None


def compressed_node(model: Model, op_type: str) -> ir.Node:
    (site,) = weight_sites(model)
    assert site.compressed is not None
    return next(node for node in site.compressed.nodes if node.op_type == op_type)


def test_what_grows_on_the_way_is_not_computed(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    gather = compressed_node(model, "Gather")
    gather.inputs[0].const_value = ir.Tensor(np.zeros((1, 1 << 20), np.int32))  # type: ignore[union-attr]
    with pytest.raises(InvalidModelError, match="Gather makes 1610612736 elements of far fewer"):
        weight_sites(model)[0].read()


def test_what_is_used_twice_is_computed_once(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    want = weight_sites(model)[0].read()
    gather = compressed_node(model, "Gather")
    codes = gather.inputs[1]
    assert codes is not None
    zero = model.add_initializer(model.graph, "zero", np.zeros((), np.int32))
    value = codes
    for number in range(20):  # 2 to the power of 20 sums of nothing, if each were made anew
        factor = zero if number == 0 else value
        node = ir.node("Mul" if number == 0 else "Add", [value, factor])
        node.outputs[0].name = f"twice{number}"
        model.graph.insert_before(gather, node)
        value = node.outputs[0]
    total = ir.node("Add", [codes, value])
    total.outputs[0].name = "total"
    model.graph.insert_before(gather, total)
    gather.replace_input_with(1, total.outputs[0])
    (site,) = weight_sites(model)
    assert site.compressed is not None
    began = time.perf_counter()
    np.testing.assert_array_equal(site.read(), want)
    assert time.perf_counter() - began < 5


def test_a_cast_to_nothing_is_refused(make_net: Any) -> None:
    model = sparse_net(make_net, MATMUL, pruned((96, 64), 0), "(float[N,96] x) => (float[N,64] y)")
    compress(model)
    compressed_node(model, "Cast").attributes["to"] = ir.AttrInt64("to", 0)
    with pytest.raises(InvalidModelError, match="cannot be decompressed"):
        weight_sites(model)[0].read()

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from effic.backends import get_backend
from effic.backends.ort.lower_compressed import NO_FASTER
from effic.backends.ort.sparse_blocks import block_table
from effic.ir.encodings import unpack
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import Pattern, declare, nm_mask
from effic.ir.verify import verify
from effic.passes.base import Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.quantize_int8 import QuantizeInt8
from effic.passes.quantize.quantize_rtn import QuantizeRTN
from effic.passes.sparsify.compress_nm import CompressNM
from effic.show import inspect_model

SIZE = 512  # large enough for groups to be looked up
ROWS = {"x": np.random.default_rng(5).standard_normal((3, SIZE)).astype(np.float32)}
MATMUL = "y = MatMul(x, w)"
TRANSPOSED = "y = Gemm<transB=1>(x, w)"


def sparse(shape: tuple[int, ...] = (SIZE, SIZE), axis: int = 0, seed: int = 0) -> np.ndarray:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.where(nm_mask(np.abs(weight), Pattern(2, 4), axis=axis), weight, 0).astype(np.float32)


def net(body: str = MATMUL, signature: str = "", **weights: np.ndarray) -> Model:
    signature = signature or f"(float[N,{SIZE}] x) => (float[N,{SIZE}] y)"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {signature} {{ {body} }}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = Model(ir.from_proto(proto))
    for name in weights:
        declare(model, name, Pattern(2, 4))
    return model


def lowered(model: Model, target: str, path: Path, *, compress: bool) -> tuple[Path, Remarks]:
    remarks, copy = Remarks(), model.clone()
    if compress:
        CompressNM().apply(copy, Remarks())
        copy.forget_names()
    get_backend(target).lower(copy, remarks)
    copy.forget_names()
    verify(copy)
    copy.save(path, force=True)
    return path, remarks


def run(path: Path, inputs: dict[str, np.ndarray] = ROWS, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


QUANTIZED: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "4-bit": {},
    "4-bit asymmetric": {"symmetric": False},
    "4-bit per channel": {"group_size": -1, "symmetric": False},
    "4-bit ic": {"axis": "ic"},
    "8-bit": {"bits": 8},
}
KEPT = ("fp32", "4-bit", "4-bit asymmetric", "4-bit per channel")


@pytest.mark.parametrize("target", ["portable", "ort-cpu", "ort-cpu{nm=dense}", "ort-cpu{decode=call}"])
@pytest.mark.parametrize("body", [MATMUL, TRANSPOSED])
@pytest.mark.parametrize("case", QUANTIZED)
def test_the_lowered_file_gives_the_numbers_of_the_dense_one(
    tmp_path: Path, case: str, body: str, target: str
) -> None:
    model = net(body, w=sparse(axis=int(body == TRANSPOSED)))
    options = QUANTIZED[case]
    if options is not None:
        QuantizeRTN(**options).apply(model, Remarks())
    small, remarks = lowered(model, target, tmp_path / "small.onnx", compress=True)
    plain = target.replace("{nm=dense}", "")
    dense, _ = lowered(model, plain, tmp_path / "dense.onnx", compress=False)
    np.testing.assert_array_equal(run(small), run(dense))
    kept = target == "portable" or ("dense" not in target and case in KEPT)
    assert (small.stat().st_size < 0.9 * dense.stat().st_size) == kept
    texts = " ".join(remark.text for remark in remarks.items)
    assert ("stored dense again" in texts) == (not kept)


@pytest.mark.parametrize(
    "level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_are_looked_up_when_the_file_is_loaded(tmp_path: Path, level: str, symmetric: bool) -> None:
    model = net(w=sparse())
    QuantizeRTN(symmetric=symmetric).apply(model, Remarks())
    small, remarks = lowered(model, "ort-cpu", tmp_path / "small.onnx", compress=True)
    operators = [node.op_type for node in read_onnx(small).graph]
    assert operators.count("MatMulNBits") == 1
    assert "DequantizeLinear" not in operators
    assert any("2:4, decompressed when the file is loaded: 3 bits" in r.text for r in remarks.items)
    dense, _ = lowered(model, "ort-cpu", tmp_path / "dense.onnx", compress=False)
    if level == "ORT_DISABLE_ALL":
        # Blocks that are no constants yet go to the kernel that computes in fp32.
        np.testing.assert_allclose(run(small, level=level), run(dense, level=level), rtol=0, atol=1.0)
    else:
        np.testing.assert_array_equal(run(small, level=level), run(dense, level=level))
    bytes_of = {v.name: v.const_value.nbytes for v in read_onnx(small).graph.initializers.values()}  # type: ignore[union-attr]
    assert bytes_of["w.nm_values"] + bytes_of["w.nm_codes"] == SIZE * SIZE * 3 // 8


def test_a_shared_weight_has_one_table_and_one_set_of_blocks(tmp_path: Path) -> None:
    model = net(
        "a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, v) y = Add(a, c)", w=sparse(), v=sparse(seed=1)
    )
    QuantizeRTN().apply(model, Remarks())
    small, _ = lowered(model, "ort-cpu", tmp_path / "small.onnx", compress=True)
    dense, _ = lowered(model, "ort-cpu", tmp_path / "dense.onnx", compress=False)
    np.testing.assert_array_equal(run(small), run(dense))
    back = read_onnx(small)
    assert sum(name.startswith("nm_blocks_") and value.const_value.nbytes == 8192  # type: ignore[union-attr]
               for name, value in back.graph.initializers.items()) == 1  # fmt: skip
    assert sum(node.op_type == "Gather" for node in back.graph) == 2


def test_the_table_of_blocks_holds_all_groups() -> None:
    table = block_table(signed=True)
    # Code 0x8 (positions 0 and 2), values 7 and -1.
    row = table[0x8 * 256 + 0xF7]
    assert unpack(row, ir.DataType.UINT4, 4).tolist() == [7 + 8, 8, -1 + 8, 8]
    assert unpack(block_table(signed=False)[0xE * 256 + 0x21], ir.DataType.UINT4, 4).tolist() == [0, 0, 1, 2]


def test_zeros_bring_no_speed_is_said_once(tmp_path: Path) -> None:
    model = net("a = MatMul(x, w) y = MatMul(a, v)", w=sparse(), v=sparse(seed=1))
    for target in ("portable", "ort-cpu"):
        for compress in (False, True):
            _, remarks = lowered(model, target, tmp_path / "m.onnx", compress=compress)
            said = [r for r in remarks.items if NO_FASTER in r.text]
            assert [r.text for r in said] == [f"2 weights are sparse, but {NO_FASTER}"]
            assert said[0].kind == "missed"
    for name in ("w", "v"):
        declare(model, name, None)
    _, remarks = lowered(model, "ort-cpu", tmp_path / "m.onnx", compress=False)
    assert not any("sparse" in remark.text for remark in remarks.items)


def test_what_it_costs_to_decompress_is_said(tmp_path: Path) -> None:
    model = net("a = MatMul(x, w) y = MatMul(a, v)", w=sparse(), v=sparse(seed=1))
    _, remarks = lowered(model, "ort-cpu", tmp_path / "m.onnx", compress=True)
    (cost,) = [r for r in remarks.items if NO_FASTER not in r.text]
    assert "2 sparse weights are decompressed once, when the file is loaded" in cost.text
    assert "nm=dense" in cost.text
    _, remarks = lowered(model, "ort-cpu{nm=dense}", tmp_path / "m.onnx", compress=False)
    assert any(r.text == "nm=dense does nothing: no weight is compressed" for r in remarks.items)


def test_an_integer_convolution_stays_one(tmp_path: Path) -> None:
    signature = "(float[N,32,8,8] x) => (float[N,64,6,6] y)"
    model = net("a = Conv(x, w) y = Relu(a)", signature, w=sparse((64, 32, 3, 3), 1))
    QuantizeInt8().apply_with(model, Calibration.load("random", model, samples=8), Remarks())
    inputs = {"x": np.random.default_rng(2).standard_normal((2, 32, 8, 8)).astype(np.float32)}
    small, _ = lowered(model, "ort-cpu", tmp_path / "small.onnx", compress=True)
    dense, _ = lowered(model, "ort-cpu", tmp_path / "dense.onnx", compress=False)
    np.testing.assert_array_equal(run(small, inputs), run(dense, inputs))
    assert small.stat().st_size < dense.stat().st_size
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "QLinearConv" in operators
    assert "ScatterElements" not in operators


def test_show_knows_the_kernels_form(tmp_path: Path) -> None:
    model = net(w=sparse())
    QuantizeRTN().apply(model, Remarks())
    small, _ = lowered(model, "ort-cpu", tmp_path / "small.onnx", compress=True)
    rows = [row for row in inspect_model(small).sites if row.kind == "MatMulNBits"]
    assert [row.storage for row in rows] == ["4-bit symmetric, blocks of 128, 2:4 sparse, compressed"]
    assert 3.2 < rows[0].bits < 3.3

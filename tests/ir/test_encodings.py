from __future__ import annotations

import tempfile

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir import encodings
from effic.ir.encodings import Encoding, Outliers, build, code_tensor, code_type, decode, recognise
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx


def empty_model(opset: int = 21) -> Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="g")
    return Model(ir.Model(graph, ir_version=9))


def finish(model: Model, value: ir.Value) -> None:
    """Make ``value`` the model's output, through a node so that it is an ordinary weight."""
    node = ir.node("Identity", [value])
    out = node.outputs[0]
    out.name, out.type, out.shape = "out", value.type, value.shape
    model.graph.append(node)
    model.graph.outputs.append(out)


def run(model: Model, level: str = "ORT_DISABLE_ALL") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    data = ir.to_proto(model.ir).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def through_file(model: Model) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        model.save(path, external=True)
        loaded = read_onnx(path).ir
        ir.external_data.load_to_model(loaded)
        return Model(loaded)


@st.composite
def encoded(draw: st.DrawFn) -> tuple[Encoding, int]:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    symmetric = draw(st.booleans())
    opset = draw(st.sampled_from([21, 25]))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 19))
    axis = draw(st.sampled_from([0, 1]))
    dim = (rows, columns)[axis]
    form = draw(st.sampled_from(["blocked", "blocked", "channel", "tensor"]))
    block = draw(st.integers(1, dim)) if form == "blocked" else 0
    if form == "blocked":
        scale_shape = tuple(-(-d // block) if i == axis else d for i, d in enumerate((rows, columns)))
    else:
        scale_shape = (dim,) if form == "channel" else ()
        axis = axis if form == "channel" else 0
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if symmetric else (0, 2**bits)
    kind = np.int8 if symmetric else np.uint8
    codes = random.integers(low, high, (rows, columns)).astype(kind)
    zero = None if symmetric else random.integers(low, high, scale_shape).astype(kind).reshape(scale_shape)
    if zero is not None and not zero.any():
        zero = np.ones_like(zero)
    shape = draw(st.sampled_from([(rows, columns), (rows, columns, 1, 1), (rows * columns,)]))
    outliers = None
    if draw(st.booleans()):
        count = draw(st.integers(1, rows * columns))
        places = np.sort(random.choice(rows * columns, count, replace=False)).astype(np.int32)
        codes.reshape(-1)[places] = 0
        outliers = Outliers(places, random.standard_normal(count).astype(dtype))
    # Negative scales are part of the format: the symmetric quantizer uses the sign.
    scales = random.standard_normal(scale_shape).astype(dtype).reshape(scale_shape)
    tensor = code_tensor(codes, code_type(bits, symmetric, opset))
    return Encoding(tensor, scales, zero, axis, block, bits, shape, outliers), opset


@settings(max_examples=120, deadline=None)
@given(encoded())
def test_encode_write_read_decode_is_exact_and_is_what_runs(case: tuple[Encoding, int]) -> None:
    encoding, opset = case
    model = empty_model(opset)
    value = build(model, model.graph, encoding, "w", axis_name="oc")
    finish(model, value)
    expected = decode(encoding)
    assert expected.shape == encoding.shape

    loaded = through_file(model)
    found = recognise(loaded.graph.outputs[0])
    assert found is not None
    assert (found.bits, found.axis, found.block_size, found.weight) == (
        encoding.bits,
        encoding.axis,
        encoding.block_size,
        "w",
    )
    assert found.codes.dtype == encoding.codes.dtype
    assert found.symmetric == encoding.symmetric
    np.testing.assert_array_equal(encodings.code_values(found), encodings.code_values(encoding))
    np.testing.assert_array_equal(found.scales, encoding.scales)
    np.testing.assert_array_equal(decode(found), expected)
    assert decode(found).dtype == expected.dtype
    assert encodings.stored_bytes(found) == encodings.stored_bytes(encoding)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        np.testing.assert_array_equal(run(loaded, level), expected)


@given(st.sampled_from(encodings.CODE_TYPES), st.integers(0, 40), st.integers(0, 2**32))
def test_pack_and_unpack_are_inverse_and_agree_with_onnx(dtype: ir.DataType, size: int, seed: int) -> None:
    signed = dtype.name.startswith("INT")
    low, high = (
        (-(1 << (dtype.bitwidth - 1)), 1 << (dtype.bitwidth - 1)) if signed else (0, 1 << dtype.bitwidth)
    )
    values = np.random.default_rng(seed).integers(low, high, size).astype(np.int8 if signed else np.uint8)
    packed = encodings.pack(values, dtype)
    np.testing.assert_array_equal(encodings.unpack(packed, dtype, size), values)
    assert packed.tobytes() == ir.Tensor(values.astype(dtype.numpy()), dtype=dtype).tobytes()


def test_bfloat16_weights_decode_to_bfloat16() -> None:
    scales = np.array([[0.1, 0.3]], dtype=ir.DataType.BFLOAT16.numpy())
    codes = np.array([[1, -8], [7, 3]], np.int8)
    encoding = Encoding(code_tensor(codes, ir.DataType.INT4), scales, None, 0, 2, 4, (2, 2))
    model = empty_model()
    finish(model, build(model, model.graph, encoding, "w"))
    found = recognise(through_file(model).graph.outputs[0])
    assert found is not None
    assert found.dtype == ir.DataType.BFLOAT16
    expected = (codes * scales.astype(np.float32)).astype(scales.dtype)
    np.testing.assert_array_equal(decode(found), expected)


def parse(nodes: str, extra: str = "") -> Model:
    return Model(
        ir.from_onnx_text(
            f'<ir_version: 10, opset_import: ["" : 21]>\ng () => (float[N] y)\n<{extra}>\n{{ {nodes} }}'
        )
    )


def value_named(model: Model, name: str) -> ir.Value:
    return next(v for node in model.nodes() for v in node.outputs if v.name == name)


def test_reads_other_tools_per_channel_int8() -> None:
    model = parse(
        "w = DequantizeLinear <axis = -1> (q, s, z)  y = Identity (w)",
        "int8[2,3] q = {1, 2, 3, -4, -5, -6}, float[3] s = {1, 0.5, 2}, int8[3] z = {0, 1, 0}",
    )
    found = recognise(value_named(model, "y"))
    assert found is not None
    assert (found.axis, found.block_size, found.bits, found.run_axis, found.group_size) == (1, 0, 8, 0, -1)
    np.testing.assert_array_equal(decode(found), [[1, 0.5, 6], [-4, -3, -12]])
    np.testing.assert_array_equal(run(model), decode(found))


def test_reads_a_scale_of_one_element_as_per_tensor() -> None:
    model = parse(
        "w = DequantizeLinear (q, s) y = Identity (w)",
        "uint8[2,2] q = {1, 2, 3, 4}, float[1] s = {2}",
    )
    found = recognise(value_named(model, "w"))
    assert found is not None
    assert found.run_axis is None
    np.testing.assert_array_equal(decode(found), [[2, 4], [6, 8]])


def test_reads_scales_stored_as_fp16_behind_a_cast() -> None:
    model = parse(
        "s = Cast <to = 1> (h)  w = DequantizeLinear <axis = 0, block_size = 2> (q, s)  y = Identity (w)",
        "int8[4,1] q = {1, 2, 3, 4}, float16[2,1] h = {14336, 16384}",
    )
    found = recognise(value_named(model, "w"))
    assert found is not None
    assert found.scales.dtype == np.float32
    np.testing.assert_array_equal(decode(found), [[0.5], [1], [6], [8]])


@pytest.mark.parametrize(
    "nodes",
    [
        "w = DequantizeLinear (q, s, z)",  # zero point computed at run time
        "w = DequantizeLinear <axis = 5> (q, s1)",
        "w = DequantizeLinear <axis = 0, block_size = 3> (q, sb)",  # scale of another block size
        "d = DequantizeLinear (q, s0) w = Relu (d)",
        "d = DequantizeLinear (q, s0) f = Reshape (d, flat) w = ScatterElements <axis=0> (f, twice, v)",
        'd = DequantizeLinear (q, s0) f = Reshape (d, flat) w = ScatterElements <reduction="add"> (f, i, v)',
        "d = DequantizeLinear (q, s0) f = Reshape (d, flat) w = ScatterElements <axis=0> (f, far, v)",
        "d = DequantizeLinear (q, s0) w = Reshape (d, wrong)",
        "w = Relu (v)",
    ],
)
def test_leaves_what_is_no_encoding(nodes: str) -> None:
    model = parse(
        f"z = Neg (zz) {nodes} y = Identity (w)",
        "int8[2,2] q = {1,2,3,4}, float s = {1}, float[2] s1 = {1,1}, float s0 = {1}, "
        "float[2,2] sb = {1,1,1,1}, "
        "int8 zz = {1}, int64[1] flat = {-1}, int64[2] twice = {1,1}, int64[2] i = {0,1}, "
        "int64[2] far = {0,9}, float[2] v = {5,6}, int64[1] wrong = {3}",
    )
    assert recognise(value_named(model, "w")) is None


@pytest.mark.parametrize("text", ["not json", "[1]", '{"bits": 99}', '{"bits": "4", "weight": 3}'])
def test_foreign_metadata_under_our_key_is_ignored(text: str) -> None:
    model = parse("w = DequantizeLinear (q, s) y = Identity (w)", "int8[2] q = {1, 2}, float s = {2}")
    next(model.nodes("DequantizeLinear")).metadata_props[encodings.ENCODING_KEY] = text
    found = recognise(value_named(model, "w"))
    assert found is not None
    assert (found.bits, found.weight) == (8, None)


def test_bits_per_weight_counts_everything() -> None:
    codes = code_tensor(np.zeros((128, 4), np.uint8), ir.DataType.UINT4)
    scales, zeros = np.ones((1, 4), np.float16), np.ones((1, 4), np.uint8)
    encoding = Encoding(codes, scales, zeros, 0, 128, 3, (128, 4))
    assert encodings.effective_bits(encoding) == 3 + (16 + 3) / 128
    assert encodings.stored_bytes(encoding) == 128 * 4 // 2 + 8 + 2


def test_float_codes_are_refused() -> None:
    model = empty_model()
    encoding = Encoding(
        ir.tensor(np.ones((2, 2), np.float32)), np.ones((), np.float32), None, 0, 0, 8, (2, 2)
    )
    with pytest.raises(UnsupportedError, match="codes of type FLOAT"):
        build(model, model.graph, encoding, "w")

"""The lowering for ONNX Runtime's CUDA provider: its form, and its numbers on the CPU."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import effic
from effic.backends import get_backend
from effic.backends.ort.lower_cuda import COLUMNS, FAST_BLOCKS, LowerCuda
from effic.ir.encodings import Encoding, Outliers, decode
from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks
from tests.backends.test_lower_encodings import activations, make_encoding, make_model, run

# fp16 has 11 bits; 8 bits in blocks of 64 keep a random weight to half a percent.
HALF, REQUANTIZED, SAME = 3e-3, 1e-2, 1e-5


def linear(
    encoding: Encoding, op: str = "y = MatMul(x, w)", x_shape: str = "M,K", kind: str = "float"
) -> Model:
    rows, columns = encoding.shape
    return make_model(
        f"g ({kind}[{x_shape}] x, {kind}[{rows},{columns}] w) => ({kind} y) {{ {op} }}", {"w": encoding}
    )


def lowered(model: Model, **options: str) -> Remarks:
    remarks = Remarks()
    LowerCuda(**options).apply(model, remarks)
    verify(model)
    return remarks


def error(got: np.ndarray, want: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    """Relative to the terms that are added, which may cancel."""
    size = max(float(np.linalg.norm(np.abs(x.astype(float)) @ np.abs(weight.astype(float)))), 1e-9)
    return float(np.linalg.norm(got.astype(float) - want.astype(float))) / size


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 140),
    group=st.sampled_from([16, 32, 48, 64, 128, 0, -1]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    transposed=st.booleans(),
    half=st.booleans(),
)
def test_weights_per_output_channel(inputs, outputs, group, bits, symmetric, rows, transposed, half) -> None:
    kind = np.float16 if half else np.float32
    shape, k_axis = ((outputs, inputs), 1) if transposed else ((inputs, outputs), 0)
    encoding = make_encoding(shape, bits=bits, group=group, k_axis=k_axis, symmetric=symmetric, dtype=kind)
    op = "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)" if transposed else "y = MatMul(x, w)"
    model = linear(encoding, op, f"M,{inputs}", "float16" if half else "float")
    x = activations(rows, inputs).astype(kind)
    weight = decode(encoding)
    want = x.astype(float) @ (weight.T if transposed else weight).astype(float)
    for precision in ("fp16", "model"):
        copy = model.clone()
        remarks = lowered(copy, precision=precision)
        (node,) = copy.nodes("MatMulNBits", domain="com.microsoft")
        width, block = node.attributes.get_int("bits"), node.attributes.get_int("block_size")
        assert width == (8 if bits == 8 else 4)
        assert node.attributes.get_int("N") % COLUMNS[width] == 0
        narrow = half or precision == "fp16"
        assert node.inputs[2].dtype == (ir.DataType.FLOAT16 if narrow else ir.DataType.FLOAT)
        slow = "not for the provider's fast kernels" in remarks.items[0].text
        assert slow == (block not in FAST_BLOCKS or inputs % block != 0)
        assert next(copy.nodes("DequantizeLinear"), None) is None
        got = run(copy, {"x": x})[0]
        assert got.shape == want.shape
        assert got.dtype == kind
        w = weight.T if transposed else weight
        assert error(got, want, x, w) < (HALF if narrow else SAME)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 200),
    outputs=st.integers(2, 90),
    group=st.sampled_from([1, 8, 17, 32, 0]),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
)
def test_weights_per_input_channel(inputs, outputs, group, bits, symmetric) -> None:
    encoding = make_encoding((inputs, outputs), bits=bits, group=group, k_axis=1, symmetric=symmetric)
    x = activations(3, inputs)
    weight = decode(encoding)
    want = x.astype(float) @ weight.astype(float)
    model = linear(encoding, x_shape=f"M,{inputs}")
    remarks = lowered(model)
    assert error(run(model, {"x": x})[0], want, x, weight) < REQUANTIZED
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    single = (group == 0 or group >= outputs) and symmetric
    assert ("moved to the activations" in remarks.items[0].text) == single
    assert node.attributes.get_int("bits") == (8 if bits == 8 or not single else 4)
    exact = linear(encoding, x_shape=f"M,{inputs}")
    missed = lowered(exact, ic="exact")
    assert next(exact.nodes("MatMulNBits", domain="com.microsoft"), None) is None
    assert "as asked (ic=exact)" in missed.items[0].text
    got = run(exact, {"x": x})[0]
    assert error(got, want, x, weight) < SAME


def test_gemm_with_bias_and_factors() -> None:
    encoding = make_encoding((40, 64), group=32, k_axis=1)
    op = "y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b)"
    b = ",".join(map(str, range(40)))
    text = f"g (float[M,64] x, float[40,64] w) => (float y) <float[40] b = {{{b}}}> {{ {op} }}"
    model = make_model(text, {"w": encoding})
    x = activations(4, 64)
    want = Oracle(model).run({"x": x})["y"]
    lowered(model)
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    assert node.attributes.get_int("N") == 64
    got = run(model, {"x": x})[0]
    assert np.abs(got - want).max() < HALF * np.abs(want).max()


def test_products_of_one_activation_share_its_cast() -> None:
    both = "y = MatMul(x, w) z = MatMul(x, v)"
    text = f"g (float[M,64] x, float[64,64] w, float[64,64] v) => (float y, float z) {{ {both} }}"
    model = make_model(text, {"w": make_encoding((64, 64)), "v": make_encoding((64, 64), seed=1)})
    lowered(model)
    assert len([node for node in model.nodes("Cast") if node.inputs[0].name == "x"]) == 1


def test_scales_out_of_reach_of_fp16_keep_the_type() -> None:
    encoding = make_encoding((64, 64))
    encoding.scales[0, 0] = 1e9
    model = linear(encoding, x_shape="M,64")
    remarks = lowered(model)
    (node,) = model.nodes("MatMulNBits", domain="com.microsoft")
    assert node.inputs[2].dtype == ir.DataType.FLOAT
    assert "out of reach of fp16" in remarks.items[0].text


def test_outliers_are_decoded_at_load() -> None:
    outliers = Outliers(np.array([0, 65], np.int64), np.array([3.0, -2.0], np.float32))
    model = linear(make_encoding((64, 64), outliers=outliers), x_shape="M,64")
    x = activations(2, 64)
    want = Oracle(model).run({"x": x})["y"]
    remarks = Remarks()
    get_backend("ort-cuda").lower(model, remarks)
    assert "exact weights beside the codes" in remarks.items[0].text
    assert next(model.nodes("DequantizeLinear"), None) is None
    assert np.allclose(run(model, {"x": x})[0], want, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_the_whole_job_says_that_it_is_unverified(name, tmp_path) -> None:
    path = tmp_path / "out.onnx"
    report = effic.optimize(
        Model(BUILDERS[name]()), passes="quantize-rtn{bits=4,group_size=32}", target="ort-cuda", output=path
    )
    assert any("unverified until it runs on a GPU" in remark.text for remark in report.steps[-1].remarks)
    assert "within" in report.verdict or report.distance is not None
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(
            NotMeasuredError, match="CUDAExecutionProvider, which the ONNX Runtime here does not"
        ):
            get_backend("ort-cuda").load(path)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="allowed are requantize, exact"):
        get_backend("ort-cuda{ic=split}")

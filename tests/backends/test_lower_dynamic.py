from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.backends.ort.artifact import OrtArtifact
from effic.ir.encodings import Encoding, decode
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from tests.backends.test_lower_encodings import (
    activations,
    distance,
    lower,
    make_encoding,
    make_model,
    ops,
    run,
)

ROUND = "c, s, z = DynamicQuantizeLinear(x) r = DequantizeLinear(c, s, z) "


def dynamic(encoding: Encoding, body: str = "y = MatMul(r, w)", x: str = "M,K", more: str = "") -> Model:
    rows, columns = encoding.shape
    text = f"g (float[{x}] x, float[{rows},{columns}] w) => (float y) {more} {{ {ROUND} {body} }}"
    return make_model(text, {"w": encoding})


def column_encoding(shape: tuple[int, int], k_axis: int = 0, seed: int = 0, **more) -> Encoding:
    return make_encoding(shape, group=0, k_axis=k_axis, bits=more.pop("bits", 8), seed=seed, **more)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 7, 8]),
    symmetric=st.booleans(),
    per_tensor=st.booleans(),
    rows=st.sampled_from([(1,), (5,), (2, 3), (2, 1, 4)]),
    transposed=st.booleans(),
)
def test_the_kernel_gives_the_outputs_of_the_canonical_form(
    inputs, outputs, bits, symmetric, per_tensor, rows, transposed
) -> None:
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    encoding = make_encoding(
        shape, bits=bits, group=-1 if per_tensor else 0, k_axis=int(transposed), symmetric=symmetric
    )
    body = "t = Transpose<perm=[1,0]>(w) y = MatMul(r, t)" if transposed else "y = MatMul(r, w)"
    names = ",".join([*(f"D{i}" for i in range(len(rows))), str(inputs)])
    x = activations(*rows, inputs)
    model = dynamic(encoding, body, names)
    want = Oracle(model).run({"x": x})["y"]
    remarks = lower(model)
    assert [r.kind for r in remarks.items] == ["passed"]
    assert set(ops(model)) <= {"DynamicQuantizeMatMul", "Cast"}
    # The canonical form adds up floats, the kernel integers.
    scale = max(1e-6, float(np.abs(want).max()), float(np.abs(decode(encoding)).max()) * np.sqrt(inputs))
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=0, atol=1e-5 * scale)


def test_layers_that_share_their_input_round_it_once() -> None:
    q, k = column_encoding((64, 40)), column_encoding((64, 24), seed=3)
    text = (
        f"g (float[M,64] x, float[64,40] w, float[64,24] v) => (float y, float t) "
        f"{{ {ROUND} y = MatMul(r, w) t = MatMul(r, v) }}"
    )
    model, reference = (make_model(text, {"w": q, "v": k}) for _ in range(2))
    lower(model)
    assert ops(model) == ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]
    x = activations(3, 64)
    for got, want in zip(run(model, {"x": x}), Oracle(reference).run({"x": x}).values(), strict=True):
        assert distance(want, got) < 1e-6


@pytest.mark.parametrize("order", ["p, b", "b, p"])
def test_bias_becomes_the_kernels(order: str) -> None:
    encoding = column_encoding((64, 4))
    bias = "<float[4] b = {1.0, -2.0, 3.0, 4.0}>"
    body = f"p = MatMul(r, w) y = Add({order})"
    model, reference = dynamic(encoding, body, more=bias), dynamic(encoding, body, more=bias)
    lower(model)
    assert ops(model) == ["DynamicQuantizeMatMul"]
    x = activations(3, 64)
    want = Oracle(reference).run({"x": x})["y"]
    assert distance(want, run(model, {"x": x})[0]) < 1e-6


@pytest.mark.parametrize(
    "body", ["p = MatMul(r, w) y = Add(p, b)", "p = MatMul(r, w) q = Add(p, b) y = Mul(p, q)"]
)
def test_what_is_no_bias_stays_an_add(body: str) -> None:
    encoding = column_encoding((64, 4))
    constant = "<float[1] b = {1.0}>" if "Mul(p" not in body else "<float[4] b = {1.0, 2.0, 3.0, 4.0}>"
    model, reference = dynamic(encoding, body, more=constant), dynamic(encoding, body, more=constant)
    lower(model)
    assert "Add" in ops(model)
    x = activations(3, 64)
    assert distance(Oracle(reference).run({"x": x})["y"], run(model, {"x": x})[0]) < 1e-6


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0)])
def test_gemm(trans_b: int, alpha: float, beta: float) -> None:
    encoding = column_encoding((4, 64) if trans_b else (64, 4), k_axis=trans_b)
    body = f"y = Gemm<transB={trans_b}, alpha={alpha}, beta={beta}>(r, w, b)"
    constant = "<float[4] b = {1.0, 2.0, 3.0, 4.0}>"
    model, reference = dynamic(encoding, body, more=constant), dynamic(encoding, body, more=constant)
    lower(model)
    assert ops(model) == ["DynamicQuantizeMatMul"]
    x = activations(3, 64)
    assert distance(Oracle(reference).run({"x": x})["y"], run(model, {"x": x})[0]) < 1e-6


def test_tied_weights_are_written_once() -> None:
    encoding = column_encoding((64, 64), k_axis=1)
    text = (
        f"g (float[M,64] x, float[64,64] w) => (float y) {{ {ROUND} t = Transpose<perm=[1,0]>(w) "
        "p = MatMul(r, t) c2, s2, z2 = DynamicQuantizeLinear(p) r2 = DequantizeLinear(c2, s2, z2) "
        "y = MatMul(r2, t) }"
    )
    model, reference = (make_model(text, {"w": encoding}) for _ in range(2))
    lower(model)
    assert ops(model) == ["DynamicQuantizeMatMul"] * 2
    assert [v.dtype for v in model.graph.initializers.values()].count(ir.DataType.INT8) == 1
    x = activations(3, 64)
    # The second rounding may meet a value in the middle between two codes.
    assert distance(Oracle(reference).run({"x": x})["y"], run(model, {"x": x})[0]) < 1e-3


@pytest.mark.parametrize(
    ("encoding", "body", "reason"),
    [
        (make_encoding((64, 24), bits=8, group=16), "y = MatMul(r, w)", "several scales per output channel"),
        (make_encoding((64, 24), bits=8, group=0, k_axis=1), "y = MatMul(r, w)", "scales per input channel"),
        (make_encoding((24, 64), bits=8, group=0), "y = Gemm<transA=1>(r, w)", "transA"),
    ],
)
def test_refusals(encoding: Encoding, body: str, reason: str) -> None:
    shape = "24,M" if "transA" in body else "M,64"
    model = dynamic(encoding, body, shape)
    remarks = lower(model)
    assert reason in remarks.items[0].text
    assert remarks.items[0].kind == "missed"
    assert "DynamicQuantizeLinear" in ops(model)


def test_weight_that_is_not_compressed_stays() -> None:
    text = f"g (float[M,2] x, float[2,3] v) => (float y) {{ {ROUND} y = MatMul(r, v) }}"
    model = make_model(text, {})
    remarks = lower(model)
    assert "not compressed" in remarks.items[0].text


def test_large_transposed_weight_through_a_file(tmp_path) -> None:
    encoding = column_encoding((1024, 1100), k_axis=1)
    model = dynamic(encoding, "t = Transpose<perm=[1,0]>(w) y = MatMul(r, t)", "M,1100")
    x = activations(2, 1100)
    want = Oracle(model).run({"x": x})["y"]
    lower(model)
    (node,) = model.nodes("DynamicQuantizeMatMul", domain="com.microsoft")
    assert isinstance(node.inputs[1].const_value, ir.LazyTensor)
    path = tmp_path / "large.onnx"
    model.save(path, external=True)
    assert distance(want, OrtArtifact.load(path).run({"x": x})["y"]) < 1e-5

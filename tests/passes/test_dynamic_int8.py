from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effic.backends import get_backend
from effic.ir.encodings import recognise
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks
from effic.passes.quantize.dynamic_int8 import quantize_dynamic
from effic.passes.quantize.quantize_int8 import QuantizeInt8


def parse(text: str) -> Model:
    return Model(ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\n' + text))


def with_weight(text: str, shape: tuple[int, ...], seed: int = 0, dtype: type = np.float32) -> Model:
    """A model whose input ``w`` becomes a constant of random numbers."""
    model = parse(text)
    value = next(v for v in model.graph.inputs if v.name == "w")
    model.graph.inputs.remove(value)
    array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    value.const_value = ir.Tensor(array, name="w")
    model.graph.register_initializer(value)
    return model


def quantize(model: Model, **options) -> Remarks:
    remarks = Remarks()
    quantize_dynamic(model, remarks, **options)
    verify(model)
    return remarks


def ops(model: Model) -> list[str]:
    return sorted(n.op_type for n in model.nodes(domain=None) if n.op_type != "Constant")


LINEAR = "g (float[M,64] x, float[64,48] w) => (float[M,48] y) { y = MatMul(x, w) }"


def test_canonical_form_is_standard_onnx_with_one_scale_per_output_channel() -> None:
    model = with_weight(LINEAR, (64, 48))
    weight = model.graph.initializers["w"].const_value.numpy()
    remarks = quantize(model)
    assert ops(model) == ["DequantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMul"]
    (matmul,) = model.nodes("MatMul")
    encoding = recognise(matmul.inputs[1])
    assert encoding is not None
    assert encoding.codes.dtype == ir.DataType.INT8
    assert encoding.symmetric
    np.testing.assert_allclose(encoding.scales, np.abs(weight).max(0) / 127, rtol=1e-6)
    data = remarks.items[0].data
    assert (data["method"], data["bits"], data["axis"]) == ("int8-dynamic", 8, "oc")
    assert data["sqnr_db"] > 40


def test_canonical_form_computes_what_the_formulas_say() -> None:
    model = with_weight(LINEAR, (64, 48))
    weight = model.graph.initializers["w"].const_value.numpy().astype(np.float64)
    quantize(model)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32(high - low) / np.float32(255)
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
    steps = np.abs(weight).max(0) / 127
    want = rounded.astype(np.float64) @ (np.round(weight / steps) * steps)
    got = Oracle(model).run({"x": x})["y"]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_reduced_range_has_7_bit_codes_and_says_so() -> None:
    model = with_weight(LINEAR, (64, 48))
    remarks = quantize(model, reduce_range=True)
    (matmul,) = model.nodes("MatMul")
    encoding = recognise(matmul.inputs[1])
    assert encoding is not None
    assert encoding.bits == 7
    assert np.abs(encoding.codes.numpy()).max() == 63
    assert "7 bits, stored as 8" in remarks.items[0].text


def test_layers_that_share_their_input_share_its_rounding() -> None:
    model = with_weight(
        "g (float[M,64] x, float[64,64] w) => (float y, float z) { y = MatMul(x, w) n = Neg(x) z = MatMul(n, w) "
        "p = MatMul(x, w) }",
        (64, 64),
    )
    quantize(model)
    assert ops(model).count("DynamicQuantizeLinear") == 2
    (negate,) = model.nodes("Neg")
    # What else reads x gets it as it was.
    assert negate.inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize(
    ("text", "shape", "options", "reason"),
    [
        (LINEAR, (64, 48), {"skip": ("w",)}, "named in skip"),
        (LINEAR, (64, 48), {"min_size": 10**6}, "fewer than min_size"),
        ("g (float[64,M] x, float[48,64] w) => (float y) { y = MatMul(w, x) }", (48, 64), {}, "left operand"),
        (
            "g (float[64,M] x, float[64,48] w) => (float y) { y = Gemm<transA=1>(x, w) }",
            (64, 48),
            {},
            "transA=1",
        ),
        (
            "g (float[2,M,64] x, float[2,64,48] w) => (float y) { y = MatMul(x, w) }",
            (2, 64, 48),
            {},
            "rank 3",
        ),
        (
            "g (float[M,64] x, float[64,64] w, int64[3] i) => (float y, float z) "
            "{ y = MatMul(x, w) z = Gather(w, i) }",
            (64, 64),
            {},
            "read by Gather as well",
        ),
        (
            "g (float[M,64] x, float[64,48] w) => (float y, float z) { y = MatMul(x, w) z = Neg(w) }",
            (64, 48),
            {},
            "as well",
        ),
        (
            "g (float[M,48] x, float[48,64] w) => (float y) "
            "{ a = MatMul(x, w) t = Transpose<perm=[1,0]>(w) y = MatMul(a, t) }",
            (48, 64),
            {},
            "both ways round",
        ),
        (
            "g (float[1,4,8,8] x, float[32,4,3,3] w) => (float y) { y = Conv(x, w) }",
            (32, 4, 3, 3),
            {},
            "use mode=static",
        ),
    ],
)
def test_refusals(text: str, shape: tuple[int, ...], options: dict, reason: str) -> None:
    model = with_weight(text, shape)
    before = ops(model)
    remarks = quantize(model, **options)
    assert [r.kind for r in remarks.items] == ["missed"]
    assert reason in remarks.items[0].text
    assert ops(model) == before


def test_fp16_and_non_finite_weights_are_refused() -> None:
    half = LINEAR.replace("float[", "float16[")
    remarks = quantize(with_weight(half, (64, 48), dtype=np.float16))
    assert "fp32 activations only" in remarks.items[0].text
    model = with_weight(LINEAR, (64, 48))
    array = model.graph.initializers["w"].const_value.numpy().copy()
    array[3, 4] = np.nan
    model.graph.initializers["w"].const_value = ir.Tensor(array, name="w")
    remarks = quantize(model)
    assert "not a number" in remarks.items[0].text
    assert ops(model) == ["MatMul"]


def test_second_run_changes_nothing() -> None:
    model = with_weight(LINEAR, (64, 48))
    quantize(model)
    before = ops(model)
    remarks = quantize(model)
    assert "already encoded" in remarks.items[0].text
    assert ops(model) == before


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_seeded_models_stay_near_and_the_lowered_file_agrees_with_the_canonical_one(name: str) -> None:
    model = Model(BUILDERS[name]())
    if model.opset < 13:
        pytest.skip("the pass raises the opset itself")
    oracle = Oracle(model)
    inputs, want = runnable_inputs(model, oracle)
    remarks = quantize(model)
    if not remarks.count("passed"):
        return
    canonical = Oracle(model).run(inputs)
    far = compare_outputs(want, canonical)
    assert far.new_nonfinite == 0
    assert far.cosine > 0.98
    get_backend("ort-cpu").lower(model, Remarks())
    verify(model)
    near = compare_outputs(canonical, Oracle(model, optimized=True).run(inputs))
    assert near.cosine > 0.999
    assert near.sqnr_db > far.sqnr_db


def test_it_is_the_dynamic_mode_of_quantize_int8() -> None:
    model = with_weight(LINEAR, (64, 48))
    remarks = Remarks()
    QuantizeInt8(mode="dynamic", reduce_range=True).apply(model, remarks)
    assert remarks.items[0].data["method"] == "int8-dynamic"
    assert remarks.items[0].data["bits"] == 7
    verify(model)

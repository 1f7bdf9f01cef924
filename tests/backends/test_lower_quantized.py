from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from effic.backends.ort.lower_quantized import LowerQuantized
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.passes.base import Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.quantize_int8 import QuantizeInt8


def quantized(
    text: str, shape: tuple[int, ...], **weights: np.ndarray
) -> tuple[Model, dict[str, np.ndarray]]:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    made, feed = Model(model), {"x": random(*shape, seed=9)}
    QuantizeInt8(bias_correction=False).apply_with(made, Calibration.of([feed]), Remarks())
    made.forget_names()
    return made, feed


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lower(model: Model) -> Remarks:
    remarks = Remarks()
    LowerQuantized().apply(model, remarks)
    model.forget_names()
    verify(model)
    again = Remarks()
    LowerQuantized().apply(model.clone(), again)
    assert not again.count("passed")
    return remarks


def image(
    size: int, kernel: int, stride: int, pads: list[int], channels: int = 3
) -> tuple[Model, dict[str, np.ndarray]]:
    return quantized(
        f"""
        g (float[N,{channels},{size},{size}] x) => (float[N,4,H,W] y)
        <float[8,{channels},{kernel},{kernel}] w = {{0}}, float[4,8,1,1] v = {{0}}, float[8] b = {{0}}>
        {{ a = Conv <strides=[{stride},{stride}], pads={pads}> (x, w, b)  r = Relu (a)  y = Conv (r, v) }}
        """,
        (2, channels, size, size),
        w=random(8, channels, kernel, kernel),
        v=random(4, 8, 1, 1),
        b=random(8),
    )


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        (16, 7, 2, [3, 3, 3, 3]),
        (16, 3, 2, [1, 1, 1, 1]),
        (16, 3, 2, [0, 0, 1, 1]),
        (16, 5, 2, [2, 1, 2, 3]),
        (16, 4, 4, [0, 0, 0, 0]),
        (16, 4, 2, [1, 1, 1, 1]),
        (18, 7, 3, [3, 2, 3, 1]),
        (8, 2, 2, [0, 0, 0, 0]),
    ],
)
def test_strided_convolutions_over_images_compute_the_same_sums(
    size: int, kernel: int, stride: int, pads: list[int]
) -> None:
    model, feed = image(size, kernel, stride, pads)
    want = Oracle(model).run(feed)["y"]
    assert lower(model).count("passed") == 1
    assert "SpaceToDepth" in {node.op_type for node in model.graph}
    got = Oracle(model).run(feed)["y"]
    assert got.shape == want.shape
    # The same integers; the oracle adds them up as floats, in another order.
    assert np.abs(got - want).max() <= 2e-2 * np.abs(want).max()
    assert np.mean(got == want) > 0.9


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads", "channels"),
    [
        (15, 3, 2, [1, 1, 1, 1], 3),
        (16, 3, 1, [1, 1, 1, 1], 3),
        (16, 3, 2, [1, 1, 1, 1], 8),
        (16, 1, 2, [0, 0, 0, 0], 3),
    ],
)
def test_other_convolutions_stay_as_they_are(
    size: int, kernel: int, stride: int, pads: list[int], channels: int
) -> None:
    model, _ = image(size, kernel, stride, pads, channels)
    assert lower(model).count("passed") == 0


def test_pads_move_the_codes(tmp_path: Path) -> None:
    model, feed = quantized(
        """
        g (float[N,3,8,8] x) => (float[N,4,H,W] y)
        <float[6,3,3,3] w = {0}, float[4,12,1,1] v = {0}, int64[8] p = {0,3,0,0,0,3,0,0}>
        { a = Conv (x, w)  b = Pad (a, p)  y = Conv (b, v) }
        """,
        (2, 3, 8, 8),
        w=random(6, 3, 3, 3),
        v=random(4, 12, 1, 1),
    )
    want = Oracle(model).run(feed)["y"]
    remarks = lower(model)
    assert "pads the codes" in remarks.items[0].text
    np.testing.assert_array_equal(Oracle(model).run(feed)["y"], want)
    found = optimized(model, tmp_path)
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1


def test_a_gemm_runs_in_integers_with_floats_at_its_end(tmp_path: Path) -> None:
    model, feed = quantized(
        """
        g (float[N,16] x) => (float[N,4] y)
        <float[16,8] w = {0}, float[4,8] v = {0}, float[8] b = {0}>
        { a = Gemm (x, w, b)  r = Relu (a)  y = Gemm <transB=1> (r, v) }
        """,
        (5, 16),
        w=random(16, 8),
        v=random(4, 8),
        b=random(8),
    )
    want = Oracle(model).run(feed)["y"]
    assert optimized(model, tmp_path)["QGemm"] == 0
    assert lower(model).count("passed") == 2
    np.testing.assert_array_equal(Oracle(model).run(feed)["y"], want)
    assert optimized(model, tmp_path)["QGemm"] == 2


def optimized(model: Model, folder: Path) -> Counter[str]:
    source, out = folder / "model.onnx", folder / "optimized.onnx"
    model.save(source, force=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(out).graph.node)

"""Small models, and AdaDim applied to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from effic.ir.encodings import decode
from effic.ir.model import Model
from effic.ir.weights import weight_sites
from effic.passes.base import Remark, Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.quantize_adadim import QuantizeAdaDim


def parse(text: str, **weights: np.ndarray) -> Model:
    names = ", ".join(f"float[{','.join(map(str, w.shape))}] {n} = {{0}}" for n, w in weights.items())
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\n{text.replace("WEIGHTS", f"<{names}>")}'
    )
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear(weight: np.ndarray, node: str = "MatMul (x, w)") -> Model:
    """``weight`` as the file stores it."""
    return parse(f"g (float[N,K] x) => (float[N,M] y) WEIGHTS {{ y = {node} }}", w=weight)


def apply(model: Model, *feeds: dict[str, np.ndarray], **options: Any) -> Remarks:
    remarks = Remarks()
    options = {"min_size": 0, **options}
    QuantizeAdaDim(**options).apply_with(model, Calibration.of(feeds), remarks)
    return remarks


def passed(remarks: Remarks) -> dict[str, Remark]:
    return {r.where: r for r in remarks.items if r.kind == "passed"}


def run(model: Model, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = ir.to_proto(model.ir).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def decoded(model: Model, name: str = "w") -> np.ndarray:
    site = next(s for s in weight_sites(model) if s.name == name)
    assert site.encoding is not None
    return decode(site.encoding)


def output_error(weight: np.ndarray, quantized: np.ndarray, x: np.ndarray) -> float:
    """By the definition, in float64; weights ``[in, out]``."""
    delta = weight.astype(np.float64) - quantized.astype(np.float64)
    return float(np.mean((x.astype(np.float64) @ delta) ** 2))

"""Convolutions with batch norms, and the fold applied to them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

from effic.ir.evaluate import Oracle, runnable_inputs
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.passes.base import Remarks
from effic.passes.fuse.fuse_conv_bn import FuseConvBN

RNG = np.random.default_rng(0)


def net(signature: str, body: str, opset: int = 18, functions: str = "", **weights: np.ndarray) -> Model:
    """A model from the ONNX text format; weights become initializers."""
    domains = f'"": {opset}' + (', "f": 1' if functions else "")
    text = f"<ir_version: 8, opset_import: [{domains}]> g {signature} {{ {body} }} {functions}"
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return Model(ir.from_proto(proto))


def f32(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def norm(channels: int, name: str = "n", dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {
        f"{name}_s": (RNG.uniform(0.5, 2, channels) * RNG.choice([-1, 1], channels)).astype(dtype),
        f"{name}_b": RNG.standard_normal(channels).astype(dtype),
        f"{name}_m": RNG.standard_normal(channels).astype(dtype),
        f"{name}_v": RNG.uniform(0.2, 3, channels).astype(dtype),
    }


def bn(x: str, y: str, name: str = "n", attributes: str = "") -> str:
    return f"{y} = BatchNormalization{attributes}({x}, {name}_s, {name}_b, {name}_m, {name}_v)\n"


def fuse(model: Model, tolerance: float = 1e-4, **options: object) -> Remarks:
    """Run the pass; check structure, outputs, and that a second run changes nothing."""
    before = Oracle(model)
    inputs, want = runnable_inputs(model, before)
    remarks = Remarks()
    FuseConvBN(**options).apply(model, remarks)
    verify(model)
    got = Oracle(model).run(inputs)
    assert list(got) == list(want)
    for name, reference in want.items():
        assert got[name].shape == reference.shape
        assert got[name].dtype == reference.dtype
        limit = tolerance * max(1e-6, float(np.abs(reference.astype(np.float64)).max(initial=0)))
        assert np.abs(got[name].astype(np.float64) - reference).max(initial=0) <= limit
    again = Remarks()
    text = ir.to_proto(model.ir).SerializeToString()
    FuseConvBN(**options).apply(model, again)
    assert again.count("passed") == 0
    assert ir.to_proto(model.ir).SerializeToString() == text
    return remarks


def ops(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.nodes(domain=None))


def missed(remarks: Remarks) -> str:
    return " | ".join(item.text for item in remarks.items if item.kind == "missed")


X4 = "(float[N,6,9,8] x) => (float[N,?,?,?] y)"

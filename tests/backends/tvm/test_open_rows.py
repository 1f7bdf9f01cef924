"""Products whose number of rows stays open: effic's kernels at any number, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.codegen import compile_kernel
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.dense import OPEN_PANEL, DenseMatMul
from effic.backends.tvm.kernels.open_rows import OpenRows
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes
from tests.backends.tvm.kernel_runs import called, close, random
from tests.backends.tvm.module_runs import Lowered


def net(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model(ir.from_proto(proto))


def check(model: Model, batches: tuple[int, ...] = (1, 3, 17), **options: Any) -> Lowered:
    """The model with its first dimension open, against the oracle at some sizes of it."""
    lowered, oracle = Lowered(model, **options), Oracle(model)
    for batch in batches:
        feeds = {
            value.name or "": random(i, *(d if isinstance(d, int) else batch for d in value.shape or ()))
            for i, value in enumerate(model.graph.inputs)
        }
        distance = compare_outputs(oracle.run(feeds), lowered.run(feeds))
        assert distance.shape_mismatch is None
        assert distance.max_rel < (0.02 if options else 1e-4)
    return lowered


# -- kernels --------------------------------------------------------------------------------------


def test_every_number_of_rows_is_covered_by_kernels_for_some() -> None:
    base = DenseMatMul(1, 200, 150, bias=True, panel=OPEN_PANEL)
    cpu = Cpu.host(2)
    made = OpenRows("open_dense", lambda m: replace(base, m=m), sizes=(1, 2, 8)).prim_func(cpu)
    function = compile_kernel(made, cpu)
    x, w, b = random(1, 41, 200), random(2, 200, 150), random(3, 150)
    packed = base.pack(w, b)
    exact, scale = x.astype(np.float64) @ w + b, np.abs(x.astype(np.float64)) @ np.abs(w) + 1
    for rows in (1, 2, 3, 5, 7, 8, 9, 11, 15, 24, 41):
        close(called(function, [x[:rows], *packed], (rows, 150)), exact[:rows], scale[:rows])


# -- models ---------------------------------------------------------------------------------------

MATRIX = {"w": random(4, 96, 80), "b": random(5, 80)}


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,96] x) => (float[N,80] y) { y = Gemm<alpha=0.5>(x, w, b) }",
        "(float[N,3,96] x) => (float[N,3,80] y) { a = MatMul(x, w) c = Add(a, b) y = Relu(c) }",
    ],
)
def test_plain_weights(text: str) -> None:
    assert check(net(text, **MATRIX)).kernels == {"dense"}


@pytest.mark.parametrize(
    ("passes", "kernel", "options"),
    [
        ("quantize-rtn{bits=4,group_size=32}", "quantized", {}),
        ("quantize-rtn{bits=8,axis=ic,group_size=16}", "quantized", {"activations": "int8"}),
        ("quantize-easyquant", "quantized", {}),
        ("prune-magnitude{n=2,m=4},compress-nm", "sparse", {}),
    ],
)
def test_compressed_weights(passes: str, kernel: str, options: dict[str, Any]) -> None:
    model = net("(float[N,3,96] x) => (float[N,3,80] y) { a = MatMul(x, w) y = Add(a, b) }", **MATRIX)
    run_passes(model, parse_passes(passes), check="off")
    assert kernel in check(model, **options).kernels


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,2,5,24] x, float[N,2,24,33] z) => (float[N,2,5,33] y) { y = MatMul(x, z) }",
        "(float[N,2,5,24] x, float[1,2,24,33] z) => (float[N,2,5,33] y) { y = MatMul(x, z) }",
        "(float[2,5,24] x, float[N,2,24,33] z) => (float[N,2,5,33] y) { y = MatMul(x, z) }",
        "(float[N,2,5,24] x, float[24,33] z) => (float[N,2,5,33] y) { y = MatMul(x, z) }",
        "(float[4,2,5,24] x, float[1,1,24,33] z) => (float[4,2,5,33] y) { y = MatMul(x, z) }",
        "(float[4,2,5,24] x, float[2,24,33] z) => (float[4,2,5,33] y) { y = MatMul(x, z) }",
    ],
)
def test_products_of_activations(text: str) -> None:
    batches = (1, 3, 17) if "N" in text else (4,)
    assert check(net(text), batches).kernels == {"batch"}


def test_attention() -> None:
    model = net(
        "(float[N,2,7,16] q, float[N,2,16,9] k, float[N,2,9,16] v, float[N,1,1,9] mask) => (float[N,2,7,16] y) "
        "{ s = MatMul(q, k) m = Add(s, mask) p = Softmax<axis=-1>(m) y = MatMul(p, v) }"
    )
    assert "attention" in check(model).kernels

"""Random graphs through the whole pipeline, against ONNX Runtime; what random graphs have found, by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("tvm", reason="needs the tvm extra")

import tvm
from tvm import relax

from effic.backends.tvm.coverage import coverage
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.relax_builder import build_relax
from effic.backends.tvm.schedule.pipeline import compile_module
from effic.ir.errors import NotMeasuredError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from tests.backends.tvm.random_graphs import RandomGraph

TOLERANCE = 1e-4
CPU = Cpu.host(1)


def run(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a build does, in this process."""
    module, parameters, signature = build_relax(model, CPU)
    executable, _ = compile_module(module, CPU)
    (bucket,) = signature.buckets
    arrays = [*(feeds[one.name] for one in bucket.inputs), *(parameters[n] for n in bucket.parameters)]
    result = relax.VirtualMachine(executable, tvm.cpu())[bucket.function](
        *(tvm.runtime.tensor(np.array(a, order="C")) for a in arrays)
    )
    results = [result] if len(bucket.outputs) == 1 else list(result)
    return {one.name: got.numpy() for one, got in zip(bucket.outputs, results, strict=True)}


def agree(want: np.ndarray, got: np.ndarray) -> bool:
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    found = compare_outputs({"y": want}, {"y": got})
    same = want.dtype.kind != "f" or np.array_equal(np.isfinite(want), np.isfinite(got))
    return bool(found.max_rel < TOLERANCE and not found.wrong_integers and same)


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_random_graphs(first: int) -> None:
    ran = 0
    for seed in range(first, first + 8):
        graph = RandomGraph(seed, special=seed % 4 == 3)
        try:
            want = Oracle(graph.model).run(graph.feeds)
        except NotMeasuredError:
            continue  # not everything that ONNX allows is in ONNX Runtime
        if coverage(graph.model, CPU):
            continue
        ran += 1
        got = run(graph.model, graph.feeds)
        for name, array in want.items():
            # Where ONNX Runtime differs from ONNX (a minimum of NaN), ONNX's own implementation is right.
            assert agree(array, got[name]) or agree(graph.values[name], got[name]), f"seed {seed}\n{graph}"
    assert ran >= 3


X = np.array(
    [np.nan, np.inf, -np.inf, 0, 1e-8, 0.3, -0.3, 0.999, -1.5, 10, -10, 88.9, -88.9, 100], np.float32
)


def net(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model(ir.from_proto(proto))


@pytest.mark.parametrize("op", ["Sinh", "Cosh", "Sign", "ThresholdedRelu<alpha=0.5>"])
def test_functions_of_one_number(op: str) -> None:
    model = net(f"(float[14] x) => (float[14] y) {{ y = {op}(x) }}")
    want, got = Oracle(model).run({"x": X})["y"], run(model, {"x": X})["y"]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize(
    "op", ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceSum", "ReduceMax"]
)
def test_reductions_of_no_axes(op: str) -> None:
    model = net(f"(float[3] x) => (float[3] y) {{ y = {op}<noop_with_empty_axes=1>(x) }}")
    feeds = {"x": np.array([1.5, -2, 3], np.float32)}
    np.testing.assert_allclose(run(model, feeds)["y"], Oracle(model).run(feeds)["y"], rtol=1e-6)


def test_truth_values_are_compared() -> None:
    model = net("(bool[2,33] a, bool[33] b) => (bool[2,33] y) { y = Equal(a, b) }")
    rng = np.random.default_rng(0)
    feeds = {"a": rng.random((2, 33)) < 0.5, "b": rng.random(33) < 0.5}
    np.testing.assert_array_equal(run(model, feeds)["y"], feeds["a"] == feeds["b"])


def test_the_largest_come_first() -> None:
    # A sorting function is called with pointers, which have no element type.
    model = net("(float[3,9] x) => (float[3,4] y, int64[3,4] i) { y, i = TopK(x, k) }", k=np.array([4]))
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 9)).astype(np.float32)}
    want, got = Oracle(model).run(feeds), run(model, feeds)
    np.testing.assert_array_equal(got["y"], want["y"])
    np.testing.assert_array_equal(got["i"], want["i"])

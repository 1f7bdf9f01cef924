"""What can only be tried where an NVIDIA GPU is: skipped, with the reason, elsewhere.

Everything here has been built and its arithmetic tried on CPUs (tests/backends/tvm/test_cuda_kernels.py,
tests/backends/test_lower_cuda.py); until these tests have passed, the targets ``tvm-cuda`` and ``ort-cuda``
are called unverified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effic.backends.tvm.cuda import Gpu, Nvcc, find_nvcc, has_driver

if not has_driver():
    pytest.skip("no NVIDIA driver is here", allow_module_level=True)
tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
if not tvm.cuda(0).exist:
    pytest.skip("CUDA finds no device here", allow_module_level=True)

import effic  # noqa: E402
from effic.backends import get_backend  # noqa: E402
from effic.backends.tvm.kernels.quantized_cuda import CudaQuantizedMatMul  # noqa: E402
from effic.backends.tvm.kernels.sparse_cuda import CudaSparseMatMul  # noqa: E402
from effic.backends.tvm.manifest import read_manifest  # noqa: E402
from effic.ir.evaluate import Oracle, seeded_inputs  # noqa: E402
from effic.ir.model import Model  # noqa: E402
from effic.models.builders import BUILDERS  # noqa: E402
from effic.passes.base import Remarks  # noqa: E402
from tests.backends.test_lower_encodings import activations, make_encoding, make_model  # noqa: E402
from tests.backends.tvm.test_cuda_kernels import check, quantized, two_of_four  # noqa: E402


def arch() -> str:
    """The architecture of the GPU here."""
    return "sm_" + str(tvm.cuda(0).compute_version).replace(".", "")


@pytest.fixture(scope="module")
def nvcc() -> None:
    """TVM's compiler calls led to nvcc."""
    path = find_nvcc()
    if path is None:
        pytest.skip("nvcc is not here")
    Nvcc(path, arch())


def on_gpu(spec: Any, x: np.ndarray, packed: list[np.ndarray]) -> np.ndarray:
    target, device = Gpu(arch()).target(), tvm.cuda(0)
    with target:
        kernel = tvm.compile(spec.cuda_func(arch()), target)[spec.name]
    y = tvm.runtime.tensor(np.full((spec.m, spec.n), np.nan, spec.dtype), device)
    kernel(*(tvm.runtime.tensor(array, device) for array in (x, *packed)), y)
    return y.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m", [1, 4, 5, 17, 64, 100])
@pytest.mark.parametrize(
    ("bits", "group", "grouping", "symmetric"),
    [
        (4, 128, "oc", False),
        (4, 32, "ic", True),
        (4, -1, "ic", False),
        (8, 64, "oc", True),
        (3, 24, "oc", False),
    ],
)
def test_quantized_products(nvcc, dtype, m, bits, group, grouping, symmetric) -> None:
    spec = CudaQuantizedMatMul(m, 1000, 333, bits, group, grouping, symmetric, dtype, True)
    packed, weight, bias = quantized(spec, m)
    x = np.random.default_rng(m).standard_normal((m, spec.k)).astype(dtype)
    check(spec, on_gpu(spec, x, packed), x, weight, bias)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m", [1, 4, 5, 64])
def test_sparse_products(nvcc, dtype, m) -> None:
    rng = np.random.default_rng(m)
    spec = CudaSparseMatMul(m, 1000, 333, dtype)
    weight = two_of_four(rng, spec.k, spec.n, dtype)
    x = rng.standard_normal((m, spec.k)).astype(dtype)
    check(spec, on_gpu(spec, x, spec.pack(weight)), x, weight, np.zeros(spec.n, np.float32))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("cnn", "N=2"), ("encoder", "batch=1,sequence=16"), ("llama", "batch=1,sequence=16")],
)
def test_whole_models_are_checked_on_the_gpu(nvcc, name: str, shapes: str, tmp_path: Path) -> None:
    path = tmp_path / "out.tvm"
    effic.optimize(
        Model(BUILDERS[name]()),
        passes="quantize-rtn{bits=4,group_size=32}",
        target=f'tvm-cuda{{arch={arch()},shapes="{shapes}"}}',
        output=path,
    )
    assert read_manifest(path).verified == "run"


@pytest.mark.parametrize("group", [32, 128, 0])
@pytest.mark.parametrize("per_input", [False, True])
def test_ort_cuda_against_the_oracle(group: int, per_input: bool, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    encoding = make_encoding((256, 100), group=group, k_axis=1 if per_input else 0)
    model = make_model(
        "g (float[M,256] x, float[256,100] w) => (float[M,100] y) { y = MatMul(x, w) }", {"w": encoding}
    )
    x = activations(7, 256)
    want = Oracle(model).run({"x": x})["y"]
    backend = get_backend("ort-cuda")
    backend.lower(model, Remarks())
    backend.build(model, tmp_path / "out.onnx")
    got = backend.load(tmp_path / "out.onnx").run({"x": x})["y"]
    assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)


def test_ort_cuda_runs_a_seeded_model(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    model = Model(BUILDERS["encoder"]())
    inputs = seeded_inputs(model, 0)
    want = Oracle(model).run(inputs)
    effic.optimize(model, target="ort-cuda", output=tmp_path / "out.onnx")
    got = get_backend("ort-cuda").load(tmp_path / "out.onnx").run(inputs)
    for key, array in want.items():
        assert np.allclose(got[key], array, atol=1e-3 * max(1.0, float(np.abs(array).max())))

"""Kernels for GPUs against exact products: their threads one after the other on the CPU, and their source by nvcc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends.tvm.cpu import Cpu  # noqa: E402
from effic.backends.tvm.cuda import find_nvcc  # noqa: E402
from effic.backends.tvm.kernels.lanes import function  # noqa: E402
from effic.backends.tvm.kernels.launch_cuda import MMA_K, MMA_M, MMA_N, WARP, SerialLaunch  # noqa: E402
from effic.backends.tvm.kernels.quantized_cuda import CudaQuantizedMatMul  # noqa: E402
from effic.backends.tvm.kernels.sparse_cuda import CudaSparseMatMul, is_two_of_four  # noqa: E402
from effic.ir.errors import UsageError  # noqa: E402

FP32, FP16 = 2e-6, 3e-3
"""Against the sum of the magnitudes that are added."""

SLOW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(spec: Any, x: np.ndarray, packed: list[np.ndarray]) -> np.ndarray:
    """The kernel on the CPU; its output begins as NaN, so that what is not written shows."""
    kernel = tvm.compile(spec.serial_func(), Cpu.host(1).target())[spec.name]
    y = tvm.runtime.tensor(np.full((spec.m, spec.n), np.nan, spec.dtype))
    kernel(tvm.runtime.tensor(x), *map(tvm.runtime.tensor, packed), y)
    return y.numpy()


def check(spec: Any, got: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> None:
    exact = x.astype(float) @ weight.astype(float) + bias
    size = np.abs(x).astype(float) @ np.abs(weight).astype(float) + np.abs(bias)
    assert (np.abs(got - exact) <= (FP32 if spec.dtype == "float32" else FP16) * size + 1e-6).all()


def quantized(spec: CudaQuantizedMatMul, seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A random weight as the kernel takes it, as it decodes, and a bias."""
    rng = np.random.default_rng(seed)
    half = 1 << (spec.bits - 1)
    low, high, kind = (-half, half, np.int8) if spec.symmetric else (0, 2 * half, np.uint8)
    codes = rng.integers(low, high, (spec.k, spec.n)).astype(kind)
    of_outputs = spec.grouping == "oc"
    groups = (spec.n, spec.k_groups) if of_outputs else (spec.k, spec.n_groups)
    scales = (rng.random(groups) + 0.5).astype(np.float32) / half
    zeros = None if spec.symmetric else rng.integers(0, 2 * half, groups).astype(np.uint8)

    def spread(values: np.ndarray) -> np.ndarray:
        if of_outputs:
            return values[:, np.arange(spec.k) // spec.k_group].T
        return values[:, np.arange(spec.n) // spec.n_group]

    offsets = 0 if zeros is None else spread(zeros).astype(int)
    weight = (codes.astype(int) - offsets) * spread(scales)
    bias = rng.standard_normal(spec.n).astype(np.float32)
    return (
        spec.pack(codes, scales, zeros, bias if spec.bias else None),
        weight,
        bias if spec.bias else 0 * bias,
    )


@SLOW
@given(
    m=st.integers(1, 4),
    k=st.integers(1, 300),
    n=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 1, 7, 16, 24, 32, 100, 128]),
    grouping=st.sampled_from(["oc", "ic"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
    bias=st.booleans(),
)
def test_few_rows_of_quantized(m, k, n, bits, group, grouping, symmetric, dtype, bias) -> None:
    spec = CudaQuantizedMatMul(m, k, n, bits, group, grouping, symmetric, dtype, bias)
    packed, weight, row = quantized(spec, k)
    x = np.random.default_rng(n).standard_normal((m, k)).astype(dtype)
    check(spec, run(spec, x, packed), x, weight, row)


@SLOW
@given(
    m=st.sampled_from([5, 16, 17, 33, 65, 70]),
    k=st.integers(1, 140),
    n=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 1, 7, 16, 32, 64]),
    grouping=st.sampled_from(["oc", "ic"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_tiles_of_quantized(m, k, n, bits, group, grouping, symmetric, dtype) -> None:
    spec = CudaQuantizedMatMul(m, k, n, bits, group, grouping, symmetric, dtype)
    packed, weight, row = quantized(spec, k)
    x = np.random.default_rng(n).standard_normal((m, k)).astype(dtype)
    check(spec, run(spec, x, packed), x, weight, row)


def two_of_four(rng: np.random.Generator, k: int, n: int, dtype: str) -> np.ndarray:
    """A random 2:4 weight; some groups keep one weight or none."""
    order = rng.random((-(-k // 4), 4, n)).argsort(axis=1)
    kept = (order < rng.integers(0, 3, (order.shape[0], 1, n))).reshape(-1, n)[:k]
    return (rng.standard_normal((k, n)) * kept).astype(dtype)


@SLOW
@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 20]),
    k=st.integers(1, 200),
    n=st.integers(1, 70),
    dtype=st.sampled_from(["float32", "float16"]),
    bias=st.booleans(),
)
def test_sparse(m, k, n, dtype, bias) -> None:
    rng = np.random.default_rng(k)
    spec = CudaSparseMatMul(m, k, n, dtype, bias)
    weight, row = two_of_four(rng, k, n, dtype), rng.standard_normal(n).astype(np.float32) * bias
    x = rng.standard_normal((m, k)).astype(dtype)
    check(spec, run(spec, x, spec.pack(weight, row if bias else None)), x, weight, row)


def test_the_matrix_instruction_has_each_element_once() -> None:
    """The definition of mma.m16n8k16 that the serial form is written from: a product of numbered matrices."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (MMA_M, MMA_K)), rng.integers(-9, 9, (MMA_K, MMA_N))
    # PTX ISA, "Matrix fragments for mma.m16n8k16": row and column of each register of each thread.
    fragments = np.zeros((WARP, 8), np.float16), np.zeros((WARP, 4), np.float16)
    for lane in range(WARP):
        group, within = lane >> 2, lane & 3
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            fragments[0][lane, i] = a[row, within * 2 + (i & 1) + (0 if i < 4 else 8)]
        for i in range(4):
            fragments[1][lane, i] = b[within * 2 + (i & 1) + (0 if i < 2 else 8), group]
    result: list[Any] = []
    with function("product", result) as T:
        a_in = T.arg("a", T.Buffer((WARP, 8), "float16"))
        b_in = T.arg("b", T.Buffer((WARP, 4), "float16"))
        out = T.arg("out", T.Buffer((WARP, 4), "float32"))
        launch = SerialLaunch(T, WARP)
        a_reg, b_reg = launch.registers(8, "float16"), launch.registers(4, "float16")
        c_reg = launch.registers(4)

        def load(thread: Any) -> None:
            for i in range(8):
                a_reg.set(thread, i, a_in[thread, i])
            for i in range(4):
                b_reg.set(thread, i, b_in[thread, i])
                c_reg.set(thread, i, T.float32(0))

        def store(thread: Any) -> None:
            for i in range(4):
                T.buffer_store(out, c_reg.get(thread, i), [thread, i])

        launch.each(load)
        launch.mma(a_reg, 0, b_reg, 0, c_reg, 0)
        launch.each(store)
    kernel = tvm.compile(result[0], Cpu.host(1).target())["product"]
    y = tvm.runtime.tensor(np.zeros((WARP, 4), np.float32))
    kernel(*map(tvm.runtime.tensor, fragments), y)
    exact = a @ b
    for lane in range(WARP):
        for i in range(4):
            row, column = (lane >> 2) + (0 if i < 2 else 8), (lane & 3) * 2 + (i & 1)
            assert y.numpy()[lane, i] == exact[row, column]


def test_what_is_packed_is_as_small_as_it_should_be() -> None:
    spec = CudaQuantizedMatMul(1, 256, 64, 4, 128)
    packed, _, _ = quantized(spec, 0)
    assert packed[0].nbytes == 256 * 64 // 2
    assert packed[1].nbytes == 2 * 64 * 4
    sparse = CudaSparseMatMul(1, 256, 64, "float16").pack(np.zeros((256, 64), np.float16))
    assert sum(array.nbytes for array in sparse) == 256 * 64 * 2 * 9 // 16


def test_what_is_not_two_of_four_is_told() -> None:
    weight = np.zeros((6, 2), np.float32)
    weight[3:6, 0] = 1
    assert is_two_of_four(weight)
    weight[0:2, 0] = 1
    assert not is_two_of_four(weight)
    with pytest.raises(UsageError, match="is not 2:4"):
        CudaSparseMatMul(1, 6, 2).pack(weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 5}, "none of 2, 3, 4 and 8"),
        ({"m": 0}, "has no elements"),
        ({"group_size": 0}, "have no scale"),
        ({"dtype": "bfloat16"}, "neither float32 nor float16"),
        ({"grouping": "both"}, "neither oc nor ic"),
    ],
)
def test_what_is_refused(changes, said) -> None:
    spec = CudaQuantizedMatMul(**{"m": 1, "k": 8, "n": 8, **changes})
    assert said in (spec.why_not() or "")
    with pytest.raises(UsageError, match=said):
        spec.cuda_func("sm_90")


def test_arrays_that_do_not_fit_are_refused() -> None:
    spec = CudaQuantizedMatMul(1, 8, 4, 4)
    codes, scales = np.zeros((8, 4), np.int8), np.ones((4, 1), np.float32)
    with pytest.raises(UsageError, match="of more than 4 bits"):
        spec.pack(codes + np.int8(9), scales)
    with pytest.raises(UsageError, match="scales are"):
        spec.pack(codes, np.ones((1, 4), np.float32))
    with pytest.raises(UsageError, match="no zero points"):
        spec.pack(codes, scales, np.zeros((4, 1), np.int8))
    with pytest.raises(UsageError, match="a bias of"):
        spec.pack(codes, scales, bias=np.zeros(4, np.float32))


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not here")
def test_nvcc_takes_the_source(tmp_path) -> None:
    """Each form once, in a process that nothing else is loaded in."""
    script = Path(__file__).with_name("cuda_sources.py")
    done = subprocess.run(
        [sys.executable, "-P", script, tmp_path], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    taken, wanted = done.stdout.split()[-2:]
    assert taken == wanted

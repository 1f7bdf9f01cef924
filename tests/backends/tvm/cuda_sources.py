"""A process of a test's: every form of the kernels for GPUs through nvcc; prints how many sources it took, and of
how many."""

from __future__ import annotations

import sys

from effic.backends.tvm.cuda import Gpu, Nvcc, find_nvcc, has_driver, stand_in_driver


def compile_all(scratch: str) -> tuple[int, int]:
    """Compile the kernels; how many sources nvcc took, and how many there were."""
    if not has_driver():
        stand_in_driver(scratch)
    import tvm

    from effic.backends.tvm.kernels.quantized_cuda import CudaQuantizedMatMul
    from effic.backends.tvm.kernels.sparse_cuda import CudaSparseMatMul

    nvcc_path = find_nvcc()
    assert nvcc_path is not None
    gpu = Gpu("sm_90")
    nvcc = Nvcc(nvcc_path, gpu.arch)
    specs = [
        CudaQuantizedMatMul(1, 1024, 100, 4, 128, "oc", False, "float16", True),
        CudaQuantizedMatMul(3, 1000, 100, 4, 32, "ic", False, "float32"),
        CudaQuantizedMatMul(40, 1024, 100, 4, 32, "ic", False, "float16"),
        CudaQuantizedMatMul(100, 1000, 100, 8, 24, "oc", True, "float32", True),
        CudaSparseMatMul(2, 1000, 100, "float16"),
        CudaSparseMatMul(20, 1000, 100, "float32"),
    ]
    target = gpu.target()
    for spec in specs:
        with target:
            tvm.compile(spec.cuda_func(gpu.arch), target)
    return nvcc.sources, len(specs)


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]
    print(*compile_all(sys.argv[1]))

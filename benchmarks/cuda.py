"""effic's kernels for GPUs beside ONNX Runtime's CUDA provider and torch: one matrix product, where a GPU is.

Milliseconds per product, the median over rounds in which all take turns; a round launches each many times and
waits for the device once, with everything on the device already. GB/s counts the packed weight. What is not
installed has no column; without a GPU this says so and ends.

    python -m benchmarks.cuda [SIZE …]
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import machine, table

SIZES = (4096, 8192)
ROWS = (1, 4, 16, 64, 256)
GROUP = 128
ROUNDS, LAUNCHES = 15, 50

Launch = Callable[[], object]


def main(sizes: Sequence[int] = ()) -> None:
    """Print the tables of docs/tvm.md."""
    from effic.backends.tvm.cuda import Gpu, Nvcc, find_nvcc, has_driver

    nvcc = find_nvcc()
    if not has_driver() or nvcc is None:
        print("Nothing was measured: this benchmark needs an NVIDIA GPU with its driver, and nvcc.")
        return
    import tvm

    device = tvm.cuda(0)
    if not device.exist:
        print("Nothing was measured: CUDA finds no device.")
        return
    gpu = Gpu("sm_" + str(device.compute_version).replace(".", ""))
    Nvcc(nvcc, gpu.arch)
    sizes = sizes or [int(text) for text in sys.argv[1:] if text.isdecimal()] or SIZES
    print(machine("apache-tvm", "onnxruntime-gpu", "torch"))
    print(f"{device.device_name}, {gpu.arch}")
    for size in sizes:
        rows = []
        for m in ROWS:
            launches = {**effic_launches(m, size, gpu), **torch_launches(m, size), **ort_launches(m, size)}
            times = interleaved(launches, device.sync)
            rows.append([m, *(f"{1e3 * seconds:.4f}" for seconds, _ in times.values())])
            names = [f"{name} ({bytes_ / 2**20:.0f} MiB)" for name, (_, bytes_) in times.items()]
        table(f"[M, {size}] x [{size}, {size}], ms", ["M", *names], rows)


def interleaved(
    launches: dict[str, tuple[Launch, int]], wait: Callable[[], object]
) -> dict[str, tuple[float, int]]:
    """Median seconds of one launch, and the bytes of the weight, by name."""
    taken: dict[str, list[float]] = {name: [] for name in launches}
    for number, (name, (launch, _)) in itertools.product(range(ROUNDS + 1), launches.items()):
        wait()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            launch()
        wait()
        if number:  # the first round warms up
            taken[name].append((time.perf_counter() - began) / LAUNCHES)
    return {name: (statistics.median(found), launches[name][1]) for name, found in taken.items()}


def effic_launches(m: int, size: int, gpu: Any) -> dict[str, tuple[Launch, int]]:
    """effic's kernels in fp16: 4 bits in both groupings, and 2:4."""
    import tvm

    from effic.backends.tvm.kernels.quantized_cuda import CudaQuantizedMatMul
    from effic.backends.tvm.kernels.sparse_cuda import CudaSparseMatMul

    rng, device, target = np.random.default_rng(0), tvm.cuda(0), gpu.target()
    x = rng.standard_normal((m, size)).astype(np.float16)
    found = {}
    specs: list[tuple[str, Any]] = [
        (f"4 bits {grouping}", CudaQuantizedMatMul(m, size, size, 4, GROUP, grouping, True, "float16"))
        for grouping in ("oc", "ic")
    ]
    specs.append(("2:4", CudaSparseMatMul(m, size, size, "float16")))
    for name, spec in specs:
        if isinstance(spec, CudaSparseMatMul):
            weight = rng.standard_normal((size, size)).astype(np.float16)
            weight.reshape(-1, 4, size)[:, 2:] = 0
            packed = spec.pack(weight)
        else:
            codes = rng.integers(-8, 8, (size, size)).astype(np.int8)
            packed = spec.pack(codes, np.full((size, size // GROUP), 0.01, np.float32))
        with target:
            kernel = tvm.compile(spec.cuda_func(gpu.arch), target)[spec.name]
        arrays = [tvm.runtime.tensor(array, device) for array in (x, *packed)]
        arrays.append(tvm.runtime.tensor(np.zeros((m, size), np.float16), device))
        found[name] = (
            (lambda kernel=kernel, arrays=arrays: kernel(*arrays)),
            sum(one.nbytes for one in packed),
        )
    return found


def torch_launches(m: int, size: int) -> dict[str, tuple[Launch, int]]:
    """torch's fp16 product, none where torch or its CUDA part is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    if not torch.cuda.is_available():
        return {}
    x = torch.randn(m, size, dtype=torch.float16, device="cuda")
    weight = torch.randn(size, size, dtype=torch.float16, device="cuda")
    return {"torch fp16": (lambda: x @ weight, 2 * size * size)}


def ort_launches(m: int, size: int) -> dict[str, tuple[Launch, int]]:
    """ONNX Runtime's MatMulNBits as the target ort-cuda writes it, none without its CUDA provider."""
    import onnx_ir as ir
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return {}
    from effic.backends import get_backend
    from effic.ir.model import Model
    from effic.passes.base import Remarks
    from effic.passes.pipeline import run_passes
    from effic.passes.spec import parse_passes

    text = f"g (float16[{m},{size}] x, float16[{size},{size}] w) => (float16[{m},{size}] y) {{ y = MatMul(x, w) }}"
    model = Model(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}'))
    declared = model.graph.inputs.pop()
    declared.name = None
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float16)
    declared.replace_all_uses_with(model.add_initializer(model.graph, "w", weight))
    run_passes(model, parse_passes(f"quantize-rtn{{bits=4,group_size={GROUP}}}"), check="off")
    get_backend("ort-cuda").lower(model, Remarks())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        model.save(path)
        options = ort.SessionOptions()
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
        session = ort.InferenceSession(path, options, providers=["CUDAExecutionProvider"])
        size_of_file = os.path.getsize(path)
    binding = session.io_binding()
    binding.bind_ortvalue_input(
        "x", ort.OrtValue.ortvalue_from_numpy(np.ones((m, size), np.float16), "cuda", 0)
    )
    binding.bind_output("y", "cuda", 0)
    return {"ORT 4 bits": (lambda: session.run_with_iobinding(binding), size_of_file)}


if __name__ == "__main__":
    main()

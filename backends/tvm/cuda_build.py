"""Compile a model for a GPU to an artifact's folder, in a child process.

As :mod:`effic.backends.tvm.build` does for a CPU; what is built can be run only where a GPU is, so each build
says how far it was verified.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from effic.backends import get_backend
from effic.backends.base import Built
from effic.backends.tvm import build as cpu_build
from effic.backends.tvm.build_steps import (
    Clock,
    answer,
    manifest_of,
    need_compiler,
    remarks_of,
    run_result,
    write_weights,
)
from effic.backends.tvm.child import Tell
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.cuda import (
    Gpu,
    Nvcc,
    compile_for_gpu,
    find_nvcc,
    has_driver,
    nvcc_version,
    refused_by_nvcc,
    stand_in_driver,
)
from effic.backends.tvm.manifest import LIBRARY
from effic.ir.errors import NotMeasuredError
from effic.ir.memory import reset_peak_memory
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.passes.base import Remarks

if TYPE_CHECKING:
    from effic.backends.tvm.targets import TvmCuda

NO_DEVICE = "no CUDA device is here"


class _Tools(NamedTuple):
    """What there is to compile with.

    Attributes:
        nvcc: its path, or None.
        driver: whether NVIDIA's driver is here.
    """

    nvcc: str | None
    driver: bool


def build(
    backend: TvmCuda,
    model: Model,
    path: str,
    inputs: Mapping[str, np.ndarray] | None,
    tell: Tell | None = None,
) -> Built:
    """Compile ``model`` into the folder ``path``; see :meth:`TvmCuda.build`."""
    return cpu_build.build(
        backend, model, path, inputs, tell, function="effic.backends.tvm.cuda_build:build_in_child"
    )


def build_in_child(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The child's side: all of the work."""
    reset_peak_memory()
    clock = Clock(tell)
    clock.stage("reading the model")
    backend: TvmCuda = get_backend(request["target"])  # type: ignore[assignment]
    gpu, folder, wanted = backend.gpu(), request["folder"], request["inputs"]
    tools = _Tools(find_nvcc(), has_driver())
    if wanted is not None:
        _need_device(gpu, tools)
    if not tools.driver and tools.nvcc is not None:
        # Before tvm is imported, which looks for the driver then.
        stand_in_driver(request["scratch"])
    need_compiler()
    model = read_onnx(request["model"])
    from effic.backends.tvm.relax_builder import build_relax

    nvcc = None if tools.nvcc is None else Nvcc(tools.nvcc, gpu.arch)
    clock.stage("lowering")
    module, parameters, signature = build_relax(model, None, backend.shapes, backend.converter_options)
    clock.stage("compiling")
    try:
        executable = compile_for_gpu(module, gpu)
    except (RuntimeError, ValueError) as error:
        if (refused := refused_by_nvcc(error)) is None:
            raise
        raise refused from error
    del module
    clock.stage("linking")
    executable.export_library(os.path.join(folder, LIBRARY))
    clock.stage("writing the weights")
    write_weights(folder, parameters, signature)
    remarks = remarks_of(signature)
    del parameters
    verified = "compiled" if nvcc is not None and nvcc.sources else "built"
    # The host's part is for any CPU of its kind.
    manifest = manifest_of(folder, model, backend, Cpu("generic"), signature, request["source"])
    manifest = manifest.for_gpu(gpu.arch, verified)
    manifest.write(folder)
    names: list[str] = []
    if wanted is not None:
        clock.stage("running the result")
        names = run_result(request)
        verified = "run"
        manifest.for_gpu(gpu.arch, verified).write(folder)
    _tell_verified(remarks, gpu, verified, tools)
    return answer(names, remarks, clock)


def _tell_verified(remarks: Remarks, gpu: Gpu, verified: str, tools: _Tools) -> None:
    """How far the build was verified, and what was not."""
    by = "" if tools.nvcc is None else f"compiled by nvcc {nvcc_version(tools.nvcc)} for {gpu.arch}"
    not_run = "not run: it was not checked" if tools.driver else f"not run: {NO_DEVICE}"
    if verified == "run":
        remarks.passed("the build", f"{by or 'compiled'} and run on the GPU here")
    elif verified == "compiled":
        remarks.missed("the build", f"{by}; {not_run}; unverified until it runs on a GPU")
    elif tools.nvcc is None:
        remarks.missed(
            "the build",
            f"not compiled by nvcc, which is not here: it holds CUDA source; {not_run}; unverified",
        )
    else:
        remarks.missed(
            "the build",
            f"not compiled by nvcc: TVM's CUDA runtime cannot be loaded (is libcudart here?), so it holds CUDA "
            f"source; {not_run}; unverified",
        )


def _need_device(gpu: Gpu, tools: _Tools) -> None:
    """Refuse to check a build that cannot be run.

    Raises:
        NotMeasuredError: there is no GPU, or another kind.
    """
    reason: str | None = NO_DEVICE
    if tools.driver:
        import tvm

        device = tvm.cuda(0)
        if device.exist:
            major, _, minor = str(device.compute_version).partition(".")
            misfit = gpu.why_not_on((int(major), int(minor)))
            reason = None if misfit is None else f"it {misfit}"
    if reason is not None:
        raise NotMeasuredError(
            f"a build for {gpu.arch} cannot be run here to be checked: {reason}; give --check off to build it all the "
            "same, unverified"
        )

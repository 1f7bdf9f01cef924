"""Compile a model to an artifact's folder, in a child process.

The parent writes the model to a temporary file, weights streamed; the child lowers it to Relax, schedules and
compiles it, links the library, writes weights and manifest, and runs the finished artifact once on the
inputs of the check.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.backends import get_backend
from effic.backends.base import Built
from effic.backends.tvm.build_steps import (
    INPUTS,
    OUTPUTS,
    Clock,
    answer,
    load_arrays,
    manifest_of,
    need_compiler,
    remarks_of,
    run_result,
    save_arrays,
    write_weights,
)
from effic.backends.tvm.child import Tell, run_in_child
from effic.backends.tvm.features import features_of, why_not_here
from effic.backends.tvm.manifest import LIBRARY
from effic.ir.errors import NotMeasuredError
from effic.ir.memory import reset_peak_memory
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.passes.base import Remark, Remarks

if TYPE_CHECKING:
    from effic.backends.tvm.cpu import Cpu
    from effic.backends.tvm.relax_builder import Signature
    from effic.backends.tvm.targets import TvmCpu, TvmCuda
    from effic.backends.tvm.tune_records import TunedKernels

_MODEL = "model.onnx"
# Beside the file, so that the child maps the weights instead of reading them.
_EXTERNAL_BYTES = 1 << 20


def build(
    backend: TvmCpu | TvmCuda,
    model: Model,
    path: str,
    inputs: Mapping[str, np.ndarray] | None,
    tell: Tell | None = None,
    function: str = "effic.backends.tvm.build:build_in_child",
) -> Built:
    """Compile ``model`` into the folder ``path``; see :meth:`TvmCpu.build`. ``function`` is the child's side."""
    began = time.perf_counter()
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="effic-tvm-") as scratch:
        model.save(os.path.join(scratch, _MODEL), external_threshold=_EXTERNAL_BYTES)
        names = list(inputs or {})
        if inputs is not None:
            save_arrays(os.path.join(scratch, INPUTS), inputs.values())
        request = {
            "target": backend.text,
            "model": os.path.join(scratch, _MODEL),
            "folder": os.path.abspath(path),
            "source": model.origin.sha256,
            "scratch": scratch,
            "inputs": names if inputs is not None else None,
        }
        result = run_in_child("the build", function, request, scratch, tell)
        outputs = None
        if inputs is not None:
            arrays = load_arrays(os.path.join(scratch, OUTPUTS))
            outputs = dict(zip(result["outputs"], arrays, strict=True))
    return Built(
        outputs=outputs,
        remarks=[Remark(row["kind"], row["where"], row["text"]) for row in result["remarks"]],
        seconds=time.perf_counter() - began,
        peak_memory=result["peak_memory"],
        stages=result["seconds"],
    )


def build_in_child(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The child's side: all of the work."""
    reset_peak_memory()
    clock = Clock(tell)
    clock.stage("reading the model")
    model = read_onnx(request["model"])
    backend: TvmCpu = get_backend(request["target"])  # type: ignore[assignment]
    need_compiler()
    from effic.backends.tvm.relax_builder import build_relax
    from effic.backends.tvm.schedule.pipeline import called_functions, compile_module

    cpu, folder, options = backend.cpu(), request["folder"], backend.converter_options
    if request["inputs"] is not None:
        need_this_cpu(cpu)
    clock.stage("lowering")
    module, parameters, signature = build_relax(model, cpu, backend.shapes, options)
    called = called_functions(module) if options["tuned"] else {}
    clock.stage("compiling")
    executable, naive = compile_module(module, cpu, options["tuned"])
    del module
    clock.stage("linking")
    library = os.path.join(folder, LIBRARY)
    executable.export_library(library)
    clock.stage("writing the weights")
    write_weights(folder, parameters, signature)
    remarks = _remarks(signature, naive, options["tuned"], called)
    del parameters
    manifest_of(folder, model, backend, cpu, signature, request["source"]).write(folder)
    names: list[str] = []
    if request["inputs"] is not None:
        clock.stage("running the result")
        names = run_result(request)
    return answer(names, remarks, clock)


def need_this_cpu(cpu: Cpu, purpose: str = "checked") -> None:
    """Refuse what has to be run here when the code is for another CPU.

    Raises:
        NotMeasuredError: it needs what this machine lacks.
    """
    from tvm.target import codegen

    reason = why_not_here(str(codegen.llvm_get_system_triple()), features_of(cpu.mcpu))
    if reason is not None:
        advice = (
            "give --check off to build it all the same, or name another mcpu"
            if purpose == "checked"
            else "name another mcpu, or tune on such a machine"
        )
        raise NotMeasuredError(
            f"a build for {cpu.mcpu} cannot be run here to be {purpose}, as it {reason}; {advice}"
        )


def _remarks(
    signature: Signature,
    naive: Mapping[str, str],
    tuned: TunedKernels | None = None,
    called: Mapping[str, int] | None = None,
) -> Remarks:
    """What each node of the first bucket became, which functions have no schedule, and which of the kernels that
    are ``called`` have no record."""
    remarks = remarks_of(signature)
    for name, reason in naive.items():
        remarks.missed(name, f"left as naive loops: {reason}")
    if tuned is not None:
        _tell_tuned(remarks, tuned, called or {})
    return remarks


def _tell_tuned(remarks: Remarks, tuned: TunedKernels, called: Mapping[str, int]) -> None:
    """Which kernels and functions have no record that fits, and how many functions run a tuned schedule."""
    # A converter asks for a kernel before it decides: what is not called is not missed.
    for name in sorted({*called, *tuned.asked}):
        if name in tuned.without:
            remarks.missed(
                name,
                f"not tuned: {tuned.folder} has no record of it for this CPU, number of threads and these versions",
            )
        elif name in tuned.unfit:
            remarks.missed(
                name, f"not tuned: the record in {tuned.folder} does not fit it: {tuned.unfit[name]}"
            )
    known = tuned.functions.values()
    if not known:
        return
    faster = sorted(
        f"{name} {one:.2f}x" for name, one in tuned.functions.items() if one is not None and one != 1
    )
    own, untried = sum(one == 1 for one in known), sum(one is None for one in known)
    remarks.passed(
        "schedules",
        f"{len(faster)} of {len(tuned.asked)} functions without a kernel run a tuned schedule"
        + (f" ({', '.join(faster)})" if faster else "")
        + f"; effic's own was the fastest for {own}"
        + (
            f"; no candidate was tried for {untried}, as they take little time or trials ran out"
            if untried
            else ""
        ),
    )

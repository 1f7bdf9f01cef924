"""Compile a model to an artifact's folder, in a child process.

The parent writes the model to a temporary file, weights streamed; the child lowers it to Relax, schedules and
compiles it, links the library, writes weights and manifest, and runs the finished artifact once on the
inputs of the check.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.backends import get_backend
from effic.backends.base import Built
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.child import Tell, run_in_child
from effic.backends.tvm.features import features_of, why_not_here
from effic.backends.tvm.manifest import LIBRARY, PARAMETERS, Bucket, Manifest, Port
from effic.ir.errors import MissingToolError, NotMeasuredError
from effic.ir.evaluate import index_bound
from effic.ir.memory import peak_memory, reset_peak_memory
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.safetensors_format import write_safetensors
from effic.passes.base import Remark, Remarks

if TYPE_CHECKING:
    from effic.backends.tvm.cpu import Cpu
    from effic.backends.tvm.relax_builder import Signature
    from effic.backends.tvm.targets import TvmCpu, TvmCuda
    from effic.backends.tvm.tune_records import TunedKernels

_MODEL, _INPUTS, _OUTPUTS = "model.onnx", "inputs.npz", "outputs.npz"
# Beside the file, so that the child maps the weights instead of reading them.
_EXTERNAL_BYTES = 1 << 20
_STAGES = 6


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
            _save(os.path.join(scratch, _INPUTS), inputs.values())
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
            arrays = _load(os.path.join(scratch, _OUTPUTS))
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
    clock = _Clock(tell)
    clock.stage("reading the model")
    model = read_onnx(request["model"])
    backend: TvmCpu = get_backend(request["target"])  # type: ignore[assignment]
    _need_compiler()
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
    taken = {name for bucket in signature.buckets for name in bucket.parameters}
    weights = os.path.join(folder, PARAMETERS)
    write_safetensors(weights, {name: parameters.tensors[name] for name in sorted(taken)})
    remarks = [
        {"kind": r.kind, "where": r.where, "text": r.text}
        for r in _remarks(signature, naive, options["tuned"], called)
    ]
    del parameters
    manifest = _manifest(folder, model, backend, cpu, signature, request["source"])
    manifest.write(folder)
    names: list[str] = []
    if request["inputs"] is not None:
        clock.stage("running the result")
        arrays = _load(os.path.join(request["scratch"], _INPUTS))
        artifact = TvmArtifact.load(folder, threads=1)
        found = artifact.run(dict(zip(request["inputs"], arrays, strict=True)))
        names = list(found)
        _save(os.path.join(request["scratch"], _OUTPUTS), found.values())
    clock.end()
    return {"outputs": names, "remarks": remarks, "peak_memory": peak_memory(), "seconds": clock.seconds}


class _Clock:
    """Tells about stages, and keeps how long each took."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._began = time.perf_counter()
        self._name = ""
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        self.end()
        self._tell(name, len(self.seconds), _STAGES)
        self._name, self._began = name, time.perf_counter()

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._began


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


def _need_compiler() -> None:
    from tvm.support import cc

    if cc.get_cc() is None:
        raise MissingToolError(
            "building for TVM needs a C++ compiler to link with, and there is none; install g++ or clang, or name "
            "one in the environment variable CXX"
        )


def _remarks(
    signature: Signature,
    naive: Mapping[str, str],
    tuned: TunedKernels | None = None,
    called: Mapping[str, int] | None = None,
) -> list[Remark]:
    """What each node of the first bucket became, which functions have no schedule, and which of the kernels that
    are ``called`` have no record."""
    remarks = Remarks()
    for way in signature.ways:
        where = f"{way.op} '{way.node}'"
        if way.kernels:
            why = f" ({way.why})" if way.why else ""
            remarks.passed(where, f"runs on effic's {', '.join(way.kernels)}{why}")
        else:
            whose = "effic's" if way.by == "effic" else "TVM's"
            remarks.passed(where, f"lowered by {whose} converter, fused and scheduled")
    for name, reason in naive.items():
        remarks.missed(name, f"left as naive loops: {reason}")
    if tuned is not None:
        _tell_tuned(remarks, tuned, called or {})
    return remarks.items


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


def _manifest(
    folder: str, model: Model, backend: TvmCpu | TvmCuda, cpu: Cpu, signature: Signature, source: str | None
) -> Manifest:
    from tvm.target import codegen

    from effic.backends.tvm.specialize import parse_shapes

    sizes = parse_shapes(backend.shapes)
    first = signature.buckets[0]
    bounds = {value.name: index_bound(value) for value in model.graph.inputs}
    library = Path(folder, LIBRARY)
    return Manifest(
        target=backend.text,
        triple=str(codegen.llvm_get_system_triple()),
        mcpu=cpu.mcpu,
        features=tuple(features_of(cpu.mcpu)),
        cores=cpu.cores,
        library=(library.stat().st_size, hashlib.sha256(library.read_bytes()).hexdigest()),
        parameter_bytes=Path(folder, PARAMETERS).stat().st_size,
        inputs=tuple(
            Port(one.name, one.dtype, bounds.get(one.name) if "int" in one.dtype else None)
            for one in first.inputs
        ),
        outputs=tuple(Port(one.name, one.dtype) for one in first.outputs),
        buckets=tuple(
            Bucket(
                entry=bucket.function,
                sizes=sizes[number] if sizes else {},
                inputs=tuple(one.shape for one in bucket.inputs),
                outputs=tuple(one.shape for one in bucket.outputs),
                parameters=bucket.parameters,
            )
            for number, bucket in enumerate(signature.buckets)
        ),
        versions={name: version(name) for name in ("effic", "apache-tvm", "apache-tvm-ffi")},
        source=source,
    )


def _save(path: str, arrays: Any) -> None:
    # By number: names of a model may be any text, and np.savez has words of its own.
    np.savez(path, **{str(i): array for i, array in enumerate(arrays)})


def _load(path: str) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return [data[str(i)] for i in range(len(data.files))]

"""What builds for CPUs and for GPUs have in common, on the child's side."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.child import Tell
from effic.backends.tvm.features import features_of
from effic.backends.tvm.manifest import LIBRARY, PARAMETERS, Bucket, Manifest, Port
from effic.ir.errors import MissingToolError
from effic.ir.evaluate import index_bound
from effic.ir.memory import peak_memory
from effic.ir.model import Model
from effic.ir.safetensors_format import write_safetensors
from effic.passes.base import Remarks

if TYPE_CHECKING:
    from effic.backends.tvm.cpu import Cpu
    from effic.backends.tvm.lowering import Parameters
    from effic.backends.tvm.relax_builder import Signature
    from effic.backends.tvm.targets import TvmCpu, TvmCuda

INPUTS, OUTPUTS = "inputs.npz", "outputs.npz"
STAGES = 6


class Clock:
    """Tells about stages, and keeps how long each took."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._began = time.perf_counter()
        self._name = ""
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        self.end()
        self._tell(name, len(self.seconds), STAGES)
        self._name, self._began = name, time.perf_counter()

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._began


def need_compiler() -> None:
    """Refuse to build where nothing links.

    Raises:
        MissingToolError: there is no C++ compiler.
    """
    from tvm.support import cc

    if cc.get_cc() is None:
        raise MissingToolError(
            "building for TVM needs a C++ compiler to link with, and there is none; install g++ or clang, or name "
            "one in the environment variable CXX"
        )


def remarks_of(signature: Signature) -> Remarks:
    """What each node of the first bucket became."""
    remarks = Remarks()
    for way in signature.ways:
        where = f"{way.op} '{way.node}'"
        if way.kernels:
            why = f" ({way.why})" if way.why else ""
            remarks.passed(where, f"runs on effic's {', '.join(way.kernels)}{why}")
        else:
            whose = "effic's" if way.by == "effic" else "TVM's"
            remarks.passed(where, f"lowered by {whose} converter, fused and scheduled")
    return remarks


def write_weights(folder: str, parameters: Parameters, signature: Signature) -> None:
    """Write the parameters that some bucket takes."""
    taken = {name for bucket in signature.buckets for name in bucket.parameters}
    write_safetensors(
        os.path.join(folder, PARAMETERS), {name: parameters.tensors[name] for name in sorted(taken)}
    )


def manifest_of(
    folder: str, model: Model, backend: TvmCpu | TvmCuda, cpu: Cpu, signature: Signature, source: str | None
) -> Manifest:
    """What is to be written beside the library and the weights that are in the folder already."""
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


def run_result(request: dict[str, Any]) -> list[str]:
    """Run what was built on the inputs of the request, and leave the outputs for the parent; their names."""
    arrays = load_arrays(os.path.join(request["scratch"], INPUTS))
    found = TvmArtifact.load(request["folder"], threads=1).run(
        dict(zip(request["inputs"], arrays, strict=True))
    )
    save_arrays(os.path.join(request["scratch"], OUTPUTS), found.values())
    return list(found)


def answer(outputs: list[str], remarks: Remarks, clock: Clock) -> dict[str, Any]:
    """What the child tells the parent."""
    clock.end()
    return {
        "outputs": outputs,
        "remarks": [{"kind": r.kind, "where": r.where, "text": r.text} for r in remarks.items],
        "peak_memory": peak_memory(),
        "seconds": clock.seconds,
    }


def save_arrays(path: str, arrays: Iterable[np.ndarray]) -> None:
    """Write arrays, to be read by :func:`load_arrays`."""
    # By number: names of a model may be any text, and np.savez has words of its own.
    numbered: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)}
    np.savez(path, **numbered)


def load_arrays(path: str) -> list[np.ndarray]:
    """The arrays of a file, in the order in which they were written."""
    with np.load(path, allow_pickle=False) as data:
        return [data[str(i)] for i in range(len(data.files))]

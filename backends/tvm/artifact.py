"""An artifact: a folder with a compiled model, loaded and run without onnx or torch.

The folder holds ``model.so`` (native code: load only artifacts that you or people you trust have built),
``params.safetensors`` (the weights as the kernels read them) and ``manifest.json``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.backends.artifact import Arrays, Artifact
from effic.backends.tvm.features import why_not_here
from effic.backends.tvm.manifest import (
    LIBRARY,
    MANIFEST,
    PARAMETERS,
    Bucket,
    Manifest,
    made_up,
    read_manifest,
    shape_text,
)
from effic.ir.errors import InvalidModelError, MissingExtraError, NotMeasuredError, UsageError
from effic.ir.safetensors_format import read_safetensors
from effic.ir.whole_folder import WholeFolder

if TYPE_CHECKING:
    from types import ModuleType

_THREADS = "TVM_NUM_THREADS"
_BIG_CORES = 1
"""TVM's word for "the fastest cores" in the configuration of its threads."""

_used = threading.local()

_opened: dict[str, str] = {}
"""Libraries that this process has opened, by path: their digests."""


class TvmArtifact(Artifact):
    """An artifact's folder, its library loaded and its weights in memory.

    Attributes:
        path: the folder.
        threads: how many threads one operator may use.
        manifest: what the folder holds.
        inputs, outputs: their names, in order.
    """

    def __init__(
        self,
        path: str,
        threads: int,
        manifest: Manifest,
        entries: list[tuple[Bucket, Any, list[Any]]],
        device: Any,
    ) -> None:
        self.path, self.threads, self.manifest, self._device = path, threads, manifest, device
        self.inputs = [port.name for port in manifest.inputs]
        self.outputs = [port.name for port in manifest.outputs]
        self._entries = entries
        self._tvm = import_tvm("running an artifact of TVM")
        self._calling = threading.Lock()

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int = 1) -> TvmArtifact:
        """Open a folder.

        Args:
            path: the folder.
            threads: threads within one operator. TVM has one pool per calling thread; how many of it work
                is set before each run where another artifact has set it otherwise. The pool's size is
                fixed when the process first uses TVM: the number of cores, or ``TVM_NUM_THREADS``.

        Raises:
            UsageError: no such folder, or no sensible number of threads.
            InvalidModelError: it is broken, or is for another CPU or GPU.
            MissingExtraError: apache-tvm is not installed.
            NotMeasuredError: it is for a GPU, and there is none.
        """
        name = os.fspath(path)
        if threads < 1:
            raise UsageError(f"threads is {threads}, the least is 1")
        manifest = read_manifest(name)
        if (reason := why_not_here(manifest.triple, list(manifest.features))) is not None:
            raise InvalidModelError(
                f"the artifact {name}, built for {manifest.mcpu}, {reason}; build it on this machine, or with "
                "mcpu for a CPU that both have"
            )
        _same_library(name, manifest)
        _reserve(threads)
        tvm = import_tvm(f"running an artifact of tvm-{manifest.device}")
        from tvm.runtime.vm import VirtualMachine

        device = tvm.cpu() if manifest.device == "cpu" else _gpu(name, manifest, tvm)
        try:
            machine = VirtualMachine(_library(name, manifest, tvm), device)
            functions = [machine[bucket.entry] for bucket in manifest.buckets]
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            raise InvalidModelError(f"TVM cannot load {name}: {_first_line(error)}") from error
        parameters = _parameters(name, manifest, tvm, device)
        entries = [
            (bucket, function, [parameters[key] for key in bucket.parameters])
            for bucket, function in zip(manifest.buckets, functions, strict=True)
        ]
        return cls(name, threads, manifest, entries, device)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Copy the folder to another place.

        Raises:
            UsageError: something is there already and ``force`` is not set, or it cannot be written.
        """
        try:
            with WholeFolder(path) as folder:
                for name in (LIBRARY, PARAMETERS, MANIFEST):
                    shutil.copyfile(os.path.join(self.path, name), os.path.join(folder.path, name))
                folder.commit(mark=MANIFEST, force=force)
        except OSError as error:
            raise UsageError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error

    def made_up(self, seed: int = 0) -> Arrays:
        """Random inputs of the first bucket's shapes."""
        return made_up(self.manifest, seed)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name for inputs by name; what the model does not read is ignored.

        The inputs are copied to where TVM's kernels may read them: aligned to 64 bytes.

        Raises:
            UsageError: an input is missing, of another type, or no bucket has its shapes.
            NotMeasuredError: the run failed; the text carries TVM's reason.
        """
        feeds, entry = self._prepared(inputs)
        return dict(zip(self.outputs, self._once(feeds, entry), strict=True))

    def time(
        self, inputs: Mapping[str, np.ndarray], *, repeats: int = 20, warmup: int = 2, batch: int = 1
    ) -> list[float]:
        """Seconds of one run, ``repeats`` times, each the mean of ``batch`` runs.

        A run is what a caller with arrays waits for: copying them in and the outputs out is part of it.

        Args:
            inputs: arrays by name.
            repeats: how many figures to take.
            warmup: runs before the first figure.
            batch: runs between two looks at the clock; see :func:`effic.bench.bench` for comparing.
        """
        if repeats < 1 or batch < 1 or warmup < 0:
            raise UsageError("repeats and batch must be at least 1, warmup at least 0")
        feeds, entry = self._prepared(inputs)
        for _ in range(warmup + 1):
            self._once(feeds, entry)
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            for _ in range(batch):
                self._once(feeds, entry)
            seconds.append((time.perf_counter() - began) / batch)
        return seconds

    def _prepared(
        self, inputs: Mapping[str, np.ndarray]
    ) -> tuple[list[np.ndarray], tuple[Bucket, Any, list[Any]]]:
        """The inputs in order, checked, and the function that takes their shapes."""
        feeds = []
        for index, port in enumerate(self.manifest.inputs):
            if port.name not in inputs:
                have = ", ".join(sorted(inputs)) or "none"
                raise UsageError(f"the inputs lack '{port.name}' ({port.dtype}); given: {have}")
            array = np.asarray(inputs[port.name])
            if array.dtype != np.dtype(port.dtype):
                raise UsageError(
                    f"the input '{port.name}' is {array.dtype}, and the artifact takes {port.dtype}; "
                    "convert it"
                )
            if not array.size and not any(0 in bucket.inputs[index] for bucket, _, _ in self._entries):
                raise UsageError(
                    f"the input '{port.name}' has no elements (its shape is {list(array.shape)}); give it some"
                )
            feeds.append(array)
        shapes = [array.shape for array in feeds]
        for entry in self._entries:
            if entry[0].fits(shapes):
                return [np.asarray(array, order="C") for array in feeds], entry
        given = shape_text(dict(zip(self.inputs, shapes, strict=True)))
        known = "; ".join(
            shape_text(dict(zip(self.inputs, bucket.inputs, strict=True))) for bucket, _, _ in self._entries
        )
        raise UsageError(
            f"{self.path} is built for other shapes than {given}; it takes: {known} (build it with shapes for these)"
        )

    def _once(self, feeds: list[np.ndarray], entry: tuple[Bucket, Any, list[Any]]) -> list[np.ndarray]:
        _, function, parameters = entry
        runtime = self._tvm.runtime
        self._set_threads()
        try:
            given = [runtime.tensor(feed, self._device) for feed in feeds]
            # A virtual machine has one stack: calls of two threads at a time would take each other's registers.
            with self._calling:
                found = function(*given, *parameters)
            results = [found] if isinstance(found, runtime.Tensor) else list(found)
            return [result.numpy() for result in results]
        except (RuntimeError, ValueError, TypeError) as error:
            raise NotMeasuredError(f"TVM cannot run {self.path}: {_first_line(error)}") from error

    def _set_threads(self) -> None:
        # A pool of one thread is left alone: told so, TVM would bind the caller to its first core.
        if getattr(_used, "threads", None) != self.threads and int(os.environ[_THREADS]) > 1:
            self._tvm.get_global_func("runtime.config_threadpool")(_BIG_CORES, self.threads)
            _used.threads = self.threads


def import_tvm(purpose: str) -> ModuleType:
    """The package ``tvm``, imported where it is used: that takes two to four seconds.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import tvm
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("tvm", "tvm_ffi"):
            raise
        raise MissingExtraError("apache-tvm", "tvm", purpose) from error
    module: ModuleType = tvm
    return module


def _reserve(threads: int) -> None:
    """Let TVM's pools be as large as will be asked for; by itself it takes half of the logical cores.

    Raises:
        UsageError: they have been made already, too small.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.setdefault(_THREADS, str(max(cores, threads)))
    if not text.isdecimal() or int(text) < threads:
        raise UsageError(
            f"{_THREADS} is {text}, and {threads} threads are wanted; set it before the process first uses TVM, "
            "or leave it out"
        )


def _library(path: str, manifest: Manifest, tvm: ModuleType) -> Any:
    """The library as it is now. A process gets what it has opened under a name again under that name, though
    another build lies there by now: that one is opened as a copy, whose name nobody had."""
    name, digest = os.path.join(os.path.realpath(path), LIBRARY), manifest.library[1]
    if _opened.setdefault(name, digest) == digest:
        return tvm.runtime.load_module(name)
    with tempfile.TemporaryDirectory(prefix="effic-tvm-") as scratch:
        return tvm.runtime.load_module(shutil.copy(name, scratch))


def _same_library(folder: str, manifest: Manifest) -> None:
    """Refuse a library that was cut short or is another's, which loading would crash on."""
    path = os.path.join(folder, LIBRARY)
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if found != manifest.library:
        raise InvalidModelError(
            f"{path} is not the library that the manifest speaks of: {found[0]} bytes and the digest "
            f"{found[1][:12]}…, not {manifest.library[0]} and {manifest.library[1][:12]}…; copy the folder whole"
        )


def _gpu(folder: str, manifest: Manifest, tvm: ModuleType) -> Any:
    """The GPU that an artifact runs on: the first.

    Raises:
        NotMeasuredError: there is none.
        InvalidModelError: it is of another kind.
    """
    from effic.backends.tvm.cuda import Gpu

    device = tvm.cuda(0)
    if not device.exist:
        raise NotMeasuredError(
            f"the artifact {folder} is for a GPU ({manifest.mcpu}), and this machine has none that CUDA knows; run it "
            "where one is, or build the model for tvm-cpu"
        )
    major, _, minor = str(device.compute_version).partition(".")
    if (reason := Gpu(manifest.mcpu).why_not_on((int(major), int(minor)))) is not None:
        raise InvalidModelError(f"the artifact {folder} {reason}; build it with arch=sm_{major}{minor}")
    return device


def _parameters(folder: str, manifest: Manifest, tvm: ModuleType, device: Any) -> dict[str, Any]:
    """The weights, each copied from the file's map to memory aligned as kernels want it."""
    wanted = {name for bucket in manifest.buckets for name in bucket.parameters}
    if not wanted:
        return {}
    path = os.path.join(folder, PARAMETERS)
    file = read_safetensors(path)
    if file.map.size != manifest.parameter_bytes:
        raise InvalidModelError(
            f"{path} has {file.map.size} bytes, and the manifest speaks of {manifest.parameter_bytes}; "
            "copy the folder whole"
        )
    if lacking := sorted(wanted - set(file.tensors)):
        raise InvalidModelError(f"{path} lacks the tensor {lacking[0]!r:.200} that the manifest names")
    found = {}
    for name in sorted(wanted):
        found[name] = tvm.runtime.tensor(np.asarray(file.tensors[name], order="C"), device)
        file.map.drop_pages()
    return found


def _first_line(error: BaseException) -> str:
    """The telling line of TVM's errors, which come with a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(" .")[:400]

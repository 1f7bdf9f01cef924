"""A model file opened by ONNX Runtime."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from effic.backends.base import Arrays, Artifact
from effic.ir.errors import InvalidModelError, NotMeasuredError, UsageError
from effic.ir.evaluate import first_line, run_session, runtime_errors

if TYPE_CHECKING:
    import onnxruntime as ort

_CPU = "CPUExecutionProvider"


class OrtArtifact(Artifact):
    """A file in an ONNX Runtime session, with a fixed number of threads.

    Attributes:
        path: the file.
        threads: threads within one operator; operators run one after the other.
        inputs, outputs: their names, in order.
    """

    def __init__(self, path: str, session: ort.InferenceSession, threads: int) -> None:
        self.path, self.threads, self._session = path, threads, session
        self.inputs = [item.name for item in session.get_inputs()]
        self.outputs = [item.name for item in session.get_outputs()]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int = 1,
        config: Mapping[str, str] | None = None,
        provider: str = _CPU,
    ) -> OrtArtifact:
        """Open a file.

        Args:
            path: an ``.onnx`` file.
            threads: threads within one operator.
            config: ONNX Runtime session configuration entries, by key.
            provider: the execution provider; the CPU takes what it has no kernel for.

        Raises:
            NotMeasuredError: the installed ONNX Runtime has no such provider, or it finds no device.
            UsageError: no such file, or no sensible number of threads.
            InvalidModelError: ONNX Runtime refuses it; the text carries its reason.
        """
        import onnxruntime as ort

        name = os.fspath(path)
        if not os.path.isfile(name):
            raise UsageError(f"there is no file {name}")
        if threads < 1:
            raise UsageError(f"threads is {threads}, the least is 1")
        if provider not in ort.get_available_providers():
            raise NotMeasuredError(
                f"{name} is to run on {provider}, which the ONNX Runtime here does not have; install "
                "onnxruntime-gpu on a machine with a GPU"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            for key, value in (config or {}).items():
                options.add_session_config_entry(key, value)
            session = ort.InferenceSession(name, options, providers=list(dict.fromkeys([provider, _CPU])))
        except runtime_errors() as error:
            raise InvalidModelError(f"ONNX Runtime cannot load {name}: {first_line(error)}") from error
        if provider not in session.get_providers():
            # The runtime goes over to the CPU without a word where a device or library is missing.
            raise NotMeasuredError(
                f"{name} cannot run on {provider}: ONNX Runtime finds no device for it here"
            )
        return cls(name, session, threads)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Copy the file, weights included, to another place.

        Raises:
            UsageError: something is there already and ``force`` is not set.
        """
        from effic.ir.onnx_format import read_onnx, write_onnx

        write_onnx(read_onnx(self.path), path, force=force)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name for inputs by name; what the model does not read is ignored.

        Raises:
            UsageError: an input is missing.
            NotMeasuredError: the run failed; the text carries ONNX Runtime's reason.
        """
        return run_session(self._session, inputs)

    def time(
        self, inputs: Mapping[str, np.ndarray], *, repeats: int = 20, warmup: int = 2, batch: int = 1
    ) -> list[float]:
        """Seconds of one run, ``repeats`` times, each the mean of ``batch`` runs.

        Args:
            inputs: arrays by name.
            repeats: how many figures to take.
            warmup: runs before the first figure.
            batch: runs between two looks at the clock; see :func:`effic.bench.bench` for comparing.
        """
        if repeats < 1 or batch < 1 or warmup < 0:
            raise UsageError("repeats and batch must be at least 1, warmup at least 0")
        self.run(inputs)
        optional = [i.name for i in self._session.get_overridable_initializers() if i.name in inputs]
        feeds = {name: np.ascontiguousarray(inputs[name]) for name in [*self.inputs, *optional]}
        for _ in range(warmup):
            self._once(feeds)
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            for _ in range(batch):
                self._once(feeds)
            seconds.append((time.perf_counter() - began) / batch)
        return seconds

    def _once(self, feeds: Arrays) -> None:
        """One run without what :meth:`run` adds; inputs were tried before."""
        try:
            self._session.run(None, feeds)
        except runtime_errors() as error:
            raise NotMeasuredError(f"ONNX Runtime cannot run {self.path}: {first_line(error)}") from error

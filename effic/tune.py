"""Tuning: how a target's kernels are best made for one model on this machine, measured and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from effic.ir.errors import UsageError
from effic.ir.model import Model

if TYPE_CHECKING:
    from effic.backends.tvm.tune import Tuning

Progress = Callable[[str, int, int], None]
"""Called with how fast the kernels are so far, how many candidates were tried, and of how many."""


def tune(
    model: Model | str | os.PathLike[str],
    log: str | os.PathLike[str],
    *,
    target: str = "tvm-cpu",
    trials: int = 200,
    progress: Progress | None = None,
) -> Tuning:
    """Try ways to make the kernels that a model calls, and keep what was measured.

    A build takes the records when its target names them: ``tvm-cpu{tuned=LOG}``. A run that was interrupted
    goes on where it was, as does one that is asked for more trials; nothing is tried twice.

    Args:
        model: a model or an .onnx file, as it will be built: a quantized one calls other kernels.
        log: the folder of the records, made where it is missing.
        target: what the model will be built for, with the sizes of open dimensions and the number of threads.
        trials: most candidates to try in this run.
        progress: hears of it.

    Raises:
        UsageError: the target is none of TVM's for CPUs, there is no such file, or ``trials`` is negative.
        UnsupportedError: operators that cannot be lowered.
        MissingExtraError: apache-tvm is not installed.
        MissingToolError: tuning crashes with the installed release of apache-tvm-ffi.
        NotMeasuredError: the code would be for another CPU than this machine's.
    """
    from effic.backends import get_backend
    from effic.backends.tvm.targets import TvmCpu

    if trials < 0:
        raise UsageError(f"trials is {trials}, the least is 0")
    backend = get_backend(target)
    if not isinstance(backend, TvmCpu):
        raise UsageError(f"{backend.name} has nothing to tune; tvm-cpu has")
    if os.path.exists(log) and not os.path.isdir(log):
        raise UsageError(f"{os.fspath(log)} is a file; records are kept in a folder")
    backend.cpu()
    from effic.backends.tvm.tune import tune_kernels

    if not isinstance(model, Model):
        from effic.ir.onnx_format import read_onnx

        model = read_onnx(model)
    return tune_kernels(backend, model, log, trials, progress)

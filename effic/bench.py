"""How fast a model runs, alone or beside another, in figures that can be believed.

Two models are timed in turns (A B, B A, A B, …), so that whatever else the machine does meanwhile
hits both alike; what is reported is the median of the ratios of neighbours, with its spread.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.ir.errors import UsageError

if TYPE_CHECKING:
    from effic.backends.artifact import Artifact
    from effic.backends.tvm.manifest import Manifest

# One figure covers at least this long, so that the clock and the call do not show in it.
_BATCH_SECONDS = 5e-3
_MOST_RUNS_PER_BATCH = 1000

# Threads of a runtime's pool look out for work for a while before they sleep (20 ms of processor time were seen,
# of TVM's and of ONNX Runtime's), on the cores that the other model is to run on. Its own wake up in the run
# that every turn begins with and does not time.
_SETTLE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """How fast one model ran.

    Attributes:
        path: its file.
        median_ms: median time of one run in milliseconds.
        low_ms, high_ms: quartiles of the same.
        load_ms: time to open the file.
        runs_per_batch: runs behind each figure.
    """

    path: str
    median_ms: float
    low_ms: float
    high_ms: float
    load_ms: float
    runs_per_batch: int


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What :func:`bench` found.

    Attributes:
        a, b: one model, and the other if there was one.
        speedup: median of time of A / time of B over neighbouring turns; above 1, B is faster.
        speedup_low, speedup_high: quartiles of the same.
        threads: threads within one operator.
        repeats: turns each model had.
        inputs: shape and dtype of each input.
        machine: processor, cores, system.
        versions: of the packages that matter.
    """

    a: Timing
    b: Timing | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    threads: int
    repeats: int
    inputs: dict[str, str]
    machine: dict[str, str | int]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def bench(
    a: str | os.PathLike[str] | Artifact,
    b: str | os.PathLike[str] | Artifact | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    threads: int = 1,
    repeats: int = 20,
    warmup: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Time a model, or one against another.

    Args:
        a, b: model files, folders built for TVM, or artifacts already loaded.
        inputs: arrays by name; None makes up seeded ones that fit A.
        threads: threads within one operator, for files that are opened here.
        repeats: turns each model gets; a turn is a batch of runs of at least 5 ms.
        warmup: untimed runs before the first turn.
        seed: of made-up inputs.
        progress: called with the number of turns done and how many there are.

    Raises:
        UsageError: a file is missing, an input is missing, or a number is out of range.
        InvalidModelError: the runtime refuses a model.
        NotMeasuredError: a model does not run on the inputs.
    """
    if repeats < 1 or warmup < 0 or threads < 1:
        raise UsageError("repeats and threads must be at least 1, warmup at least 0")
    opened = [_open(item, threads) for item in ((a,) if b is None else (a, b))]
    artifacts = [artifact for artifact, _ in opened]
    feeds = dict(inputs) if inputs is not None else _made_up(artifacts, seed)
    batches = [_runs_per_batch(artifact, feeds, warmup) for artifact in artifacts]
    seconds: list[list[float]] = [[] for _ in artifacts]
    pooled = len(artifacts) > 1 and artifacts[0].threads > 1
    for turn in range(repeats):
        # Alternating who goes first keeps a drift of the clock speed from favouring one of them.
        order = range(len(artifacts)) if turn % 2 == 0 else range(len(artifacts) - 1, -1, -1)
        for i in order:
            if pooled:
                time.sleep(_SETTLE_SECONDS)
            seconds[i] += artifacts[i].time(feeds, repeats=1, warmup=0, batch=batches[i])
        if progress is not None:
            progress(turn + 1, repeats)
    rows = [
        _timing(artifact.path, taken, load, batch)
        for (artifact, load), taken, batch in zip(opened, seconds, batches, strict=True)
    ]
    low = middle = high = None
    if len(rows) == 2:
        low, middle, high = _quartiles([x / y for x, y in zip(*seconds, strict=True)])
    return BenchResult(
        a=rows[0],
        b=rows[1] if len(rows) == 2 else None,
        speedup=middle,
        speedup_low=low,
        speedup_high=high,
        threads=artifacts[0].threads,
        repeats=repeats,
        inputs={name: f"{array.dtype}{list(array.shape)}" for name, array in feeds.items()},
        machine=machine(),
        versions={package: version(package) for package in _packages(artifacts)},
    )


def machine() -> dict[str, str | int]:
    """The processor, how many cores this process may use, and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": _processor(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def _processor() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _open(item: str | os.PathLike[str] | Artifact, threads: int) -> tuple[Artifact, float]:
    if not isinstance(item, (str, os.PathLike)):
        return item, 0.0
    from effic.folder_build import load_artifact

    began = time.perf_counter()
    artifact = load_artifact(item, threads)
    return artifact, time.perf_counter() - began


def _packages(artifacts: Sequence[Artifact]) -> Iterator[str]:
    yield "effic"
    if any(_manifest(artifact) is None for artifact in artifacts):
        yield "onnxruntime"
    if any(_manifest(artifact) is not None for artifact in artifacts):
        yield "apache-tvm"
    yield "numpy"


def _manifest(artifact: Artifact) -> Manifest | None:
    found: Manifest | None = getattr(artifact, "manifest", None)
    return found


def _made_up(artifacts: Sequence[Artifact], seed: int) -> dict[str, np.ndarray]:
    """Inputs that all of them take: a build for fixed sizes decides where there is one."""
    from effic.backends.tvm.manifest import made_up
    from effic.folder_build import pinned_to
    from effic.ir.evaluate import runnable_inputs
    from effic.ir.onnx_format import read_onnx

    fixed = next((found for found in map(_manifest, artifacts) if found is not None), None)
    free = next((one for one in artifacts if _manifest(one) is None), None)
    if free is None and fixed is not None:
        return made_up(fixed, seed)
    first = artifacts[0] if free is None else free
    model = read_onnx(first.path)
    inputs, _ = runnable_inputs(model if fixed is None else pinned_to(model, fixed), first, seed)
    return inputs


def _runs_per_batch(artifact: Artifact, feeds: Mapping[str, np.ndarray], warmup: int) -> int:
    quickest = min(artifact.time(feeds, repeats=3, warmup=warmup))
    return max(1, min(_MOST_RUNS_PER_BATCH, int(_BATCH_SECONDS / max(quickest, 1e-9)) + 1))


def _timing(path: str, seconds: Sequence[float], load: float, batch: int) -> Timing:
    low, middle, high = (1e3 * value for value in _quartiles(seconds))
    return Timing(path, middle, low, high, 1e3 * load, batch)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high

"""effic's TVM kernels beside ONNX Runtime's: one matrix product, hot and out of cache, one thread or more.

All calls take turns in one process. A ratio is the median over the rounds of the reference's time over
the kernel's in the same round; with one thread times are processor time of it, so that other work on the
machine shows less. With more they are the wall's, which only tells something on a machine without other work; before
a turn threads that still spin after the last one are waited out, and one call that is not counted wakes the turn's own.
*Hot* calls use one copy of the weight, *cold* ones walk through copies that together are larger than any cache. GB/s
counts the packed weight, read once; it is set against what as many threads read from memory (cold) in a plain
maximum. Other families of kernels add rows: see :class:`Subject`.

    python -m benchmarks tvm_kernels
    python -m benchmarks.tvm_kernels [SIZE …] [--family quantized|sparse]… [--threads N]
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from benchmarks.harness import machine, table

SIZES = (2048, 4096)
ROWS = (1, 16, 128)
COLD_BYTES = 96 << 20
"""What the copies of a weight take together: more than twice the last-level cache of common servers."""

SPIN_SECONDS = 0.1
"""For how long threads of either runtime look out for more work before they sleep, and somewhat more: ONNX Runtime's
between 0.01 and 0.1 s."""

_THREADS = "TVM_NUM_THREADS"
BLOCK = 128
ROUNDS = {1: 60, 16: 24, 128: 8}

Call = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """A kernel to be timed.

    Attributes:
        name: of the row.
        build: given rows, size and number of copies of the weight: a call for each copy, and the bytes of one.
    """

    name: str
    build: Callable[[int, int, int], tuple[list[Call], int]]


@click.command()
@click.argument("sizes", nargs=-1, type=click.IntRange(min=64))
@click.option(
    "--family", "families", multiple=True, type=click.Choice(["quantized", "sparse"]), help="default: both"
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
def command(sizes: tuple[int, ...], families: tuple[str, ...], threads: int) -> None:
    """Print the tables of docs/tvm.md."""
    import onnxruntime

    os.environ.update(tvm_threads(threads))
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    print(machine("apache-tvm", "onnxruntime", "numpy"))
    print(f"{threads} thread{'s' if threads > 1 else ''}: {bandwidth(threads):.1f} GB/s from memory.")
    subjects = {"quantized": quantized_subjects(), "sparse": sparse_subjects()}
    for name, size, rows in itertools.product(families or subjects, sizes or SIZES, ROWS):
        measure(subjects[name], size, rows)


def main() -> None:
    """All tables, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


def tvm_threads(threads: int) -> dict[str, str]:
    """The environment in which TVM's threads leave the others' turns alone: by default they look out for more work
    for longer than a tenth of a second, on a core that ONNX Runtime needs."""
    return {_THREADS: str(threads), "TVM_THREAD_POOL_SPIN_COUNT": "1000"}


def _threads() -> int:
    return int(os.environ[_THREADS])


def measure(subjects: Sequence[Subject], size: int, rows: int) -> None:
    """Time kernels and the references in turns, hot and cold, and print a table."""
    found = {}
    for cold in (False, True):
        calls, sizes = {}, {}
        for subject in (*references(), *subjects):
            one, sizes[subject.name] = subject.build(rows, size, 1)
            copies = -(-COLD_BYTES // sizes[subject.name]) if cold else 1
            found_calls = one if copies == 1 else subject.build(rows, size, copies)[0]
            calls[subject.name] = found_calls
        found[cold] = _turns(calls, ROUNDS.get(rows, 12)), sizes
    names = [reference.name for reference in references()]
    lines = []
    for cold, (times, sizes) in found.items():
        for name, taken in times.items():
            ratios = [statistics.median(a / b for a, b in zip(times[n], taken, strict=True)) for n in names]
            middle = statistics.median(taken)
            lines.append(
                (name, "cold" if cold else "hot", f"{1e3 * middle:.3f}", *(f"{r:.2f}" for r in ratios),
                 f"{sizes[name] / middle / 1e9:.1f}")
            )  # fmt: skip
    table(
        f"{size} x {size}, {rows} row{'s' if rows > 1 else ''}: times as fast as …",
        ("kernel", "weight", "ms", *(f"× {name}" for name in names), "GB/s"),
        lines,
    )


def bandwidth(threads: int) -> float:
    """GB/s that threads read from memory: the largest of arrays beyond the caches, the best of some."""
    arrays = [np.ones(COLD_BYTES // 4 * 2, np.float32) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = min(best, time.perf_counter() - began)
    return sum(array.nbytes for array in arrays) / best / 1e9


def _turns(calls: dict[str, list[Call]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns; two rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    several = _threads() > 1
    clock = time.perf_counter if several else time.thread_time
    for number in range(rounds + 2):
        for name, copies in calls.items():
            if several:
                time.sleep(SPIN_SECONDS)
                copies[number % len(copies) - 1]()
            call = copies[number % len(copies)]
            began = clock()
            call()
            if number > 1:
                times[name].append(clock() - began)
    return times


# -- references -----------------------------------------------------------------------------------


def references() -> tuple[Subject, ...]:
    """effic's dense product; ONNX Runtime's, and its 4-bit kernel with fp32 (0) and int8 (4) activations."""
    return (
        Subject("ORT fp32", _ort_fp32),
        Subject("dense", _dense),
        Subject("ORT 4-bit level 0", lambda rows, size, copies: _ort_nbits(rows, size, copies, 0)),
        Subject("ORT 4-bit level 4", lambda rows, size, copies: _ort_nbits(rows, size, copies, 4)),
    )


def _ort_fp32(rows: int, size: int, copies: int) -> tuple[list[Call], int]:
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return [_session(rows, size, "MatMul", [("w", weight)]) for _ in range(copies)], weight.nbytes


def _ort_nbits(rows: int, size: int, copies: int, level: int) -> tuple[list[Call], int]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (size, size // BLOCK, BLOCK // 2)).astype(np.uint8)
    scales = (rng.random((size, size // BLOCK)) / 100).astype(np.float32)
    fields = {"K": size, "N": size, "bits": 4, "block_size": BLOCK, "accuracy_level": level}
    constants = [("b", codes), ("s", scales)]
    calls = [_session(rows, size, "MatMulNBits", constants, "com.microsoft", **fields) for _ in range(copies)]
    return calls, codes.nbytes + scales.nbytes


def _session(
    rows: int,
    size: int,
    op_type: str,
    constants: list[tuple[str, np.ndarray]],
    domain: str = "",
    **fields: int,
) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(op_type, ["x", *(name for name, _ in constants)], ["y"], domain=domain, **fields)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, size]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in constants]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    # Copies share their threads: each would have its own otherwise, asleep when its turn comes.
    options.use_per_session_threads = False
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    given = {"x": activations(rows, size)}
    return lambda: session.run(None, given)


def activations(rows: int, size: int) -> np.ndarray:
    """x: standard normal."""
    return np.random.default_rng(rows).standard_normal((rows, size)).astype(np.float32)


# -- effic's kernels ------------------------------------------------------------------------------


def kernel_calls(
    spec: Any, packed: Sequence[np.ndarray], rows: int, size: int, copies: int
) -> tuple[list[Call], int]:
    """Calls of a kernel spec's function, each with a copy of the packed weight of its own.

    Args:
        spec: has ``name`` and ``prim_func(cpu)``.
        packed: what ``spec.pack`` returned.
        rows, size: of x, ``[rows, size]``, and of y.
        copies: how many.
    """
    import tvm

    from effic.backends.tvm.codegen import compile_kernel
    from effic.backends.tvm.cpu import Cpu

    cpu = Cpu.host(_threads())
    if cpu.cores > 1:
        # As a build does; left alone, TVM puts its threads where the caller may be.
        tvm.get_global_func("runtime.config_threadpool")(1, cpu.cores)
    function = compile_kernel(spec.prim_func(cpu), cpu)
    x = tvm.runtime.tensor(activations(rows, size))
    y = tvm.runtime.tensor(np.zeros((rows, size), np.float32))

    def call() -> Call:
        arguments = [x, *(tvm.runtime.tensor(array) for array in packed), y]
        return lambda: function(*arguments)

    return [call() for _ in range(copies)], sum(array.nbytes for array in packed)


def quantized_subjects() -> tuple[Subject, ...]:
    """The forms of ``backends/tvm/kernels/quantized.py``."""

    def subject(name: str, **fields: Any) -> Subject:
        return Subject(name, lambda rows, size, copies: _quantized(fields, rows, size, copies))

    int8 = {"activations": "int8"}
    easyquant = {"group_size": -1, "share": 0.005}
    return (
        subject("4-bit per IC, fp32", grouping="ic"),
        subject("4-bit per IC, fp32, portable", grouping="ic", portable=True),
        subject("4-bit per IC, int8", grouping="ic", **int8),
        subject("4-bit per IC, zero points, int8", grouping="ic", symmetric=False, **int8),
        subject("4-bit per OC, fp32"),
        subject("4-bit per OC, int8", **int8),
        subject("4-bit per OC, zero points, int8", symmetric=False, **int8),
        subject("EasyQuant 0.5 %, fp32", **easyquant),
        subject("EasyQuant 0.5 %, int8", **easyquant, **int8),
        subject("2-bit per IC, int8", grouping="ic", bits=2, **int8),
        subject("8-bit per IC, int8", grouping="ic", bits=8, **int8),
    )


def _quantized(fields: dict[str, Any], rows: int, size: int, copies: int) -> tuple[list[Call], int]:
    from effic.backends.tvm.kernels.quantized import Outliers, QuantizedMatMul

    fields = {"group_size": BLOCK, **fields}
    count = int(fields.pop("share", 0) * size * size)
    spec = QuantizedMatMul(rows, size, size, outliers=count > 0, **fields)
    rng = np.random.default_rng(0)
    half = spec.middle
    codes = rng.integers(-half, half, (size, size), dtype=np.int8)
    shape = (size, spec.k_groups) if spec.grouping == "oc" else (size, -(-size // spec.n_group))
    scales = (rng.random(shape) / (half * np.sqrt(size))).astype(np.float32)
    zeros = None if spec.symmetric else rng.integers(-half, half, shape, dtype=np.int8)
    outliers = None
    if count:
        places = np.sort(rng.choice(size * size, count, replace=False))
        outliers = Outliers(*np.divmod(places, size), rng.standard_normal(count).astype(np.float32))
    return kernel_calls(spec, spec.pack(codes, scales, zeros, outliers), rows, size, copies)


def sparse_subjects() -> tuple[Subject, ...]:
    """The forms of ``backends/tvm/kernels/sparse.py``."""

    def subject(name: str, pattern: str, bits: int, **fields: Any) -> Subject:
        return Subject(name, lambda rows, size, copies: _sparse(pattern, bits, fields, rows, size, copies))

    int8 = {"activations": "int8"}
    return (
        subject("2:4 fp32", "2:4", 32),
        subject("2:4 int8, fp32", "2:4", 8),
        subject("2:4 int8, int8", "2:4", 8, **int8),
        subject("2:4 int4 per 128, fp32", "2:4", 4, group_size=BLOCK),
        subject("1:4 fp32", "1:4", 32),
        subject("1:4 int8, fp32", "1:4", 8),
        subject("1:4 int8, int8", "1:4", 8, **int8),
        subject("2:8 int8, fp32", "2:8", 8),
    )


def _sparse(
    text: str, bits: int, fields: dict[str, Any], rows: int, size: int, copies: int
) -> tuple[list[Call], int]:
    from effic.backends.tvm.kernels.sparse import FLOAT, SparseMatMul
    from effic.ir.sparsity import Pattern, nm_mask

    pattern = Pattern.parse(text)
    spec = SparseMatMul(rows, size, size, bits=bits, kept=pattern.n, of=pattern.m, **fields)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((size, size), np.float32)
    weight *= nm_mask(rng.random((size, size), np.float32), pattern, axis=0)
    if bits == FLOAT:
        return kernel_calls(spec, spec.pack(weight), rows, size, copies)
    codes = np.clip(np.rint(weight * (spec.middle / 4)), -spec.middle, spec.middle - 1).astype(np.int8)
    scales = rng.random((size, spec.k_groups), np.float32)
    return kernel_calls(spec, spec.pack(codes, scales), rows, size, copies)


def _dense(rows: int, size: int, copies: int) -> tuple[list[Call], int]:
    from effic.backends.tvm.kernels.dense import DenseMatMul

    spec = DenseMatMul(rows, size, size)
    weight = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return kernel_calls(spec, spec.pack(weight), rows, size, copies)


if __name__ == "__main__":
    command()

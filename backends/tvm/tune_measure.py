"""Times kernels beside each other, in the process that calls it.

Candidates of one kernel run in turns, so that whatever else the machine does meanwhile hits all alike; what counts
is the median of the ratios of neighbours. Activations are the same at every run and so in the cache, as the operator
before would have left them. Weights are read in turn from as many copies as make up the weights of the model: in
the model, too, the others pass through the cache before a weight is read again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from effic.backends.tvm.codegen import compile_kernel
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.conv import Conv2d
from effic.backends.tvm.kernels.conv_depthwise import DepthwiseConv2d
from effic.backends.tvm.kernels.dense import DenseMatMul

SAMPLE_SECONDS = 1e-3
"""One figure covers at least this long, so that the clock and the call do not show in it."""

_MOST_CALLS, _MOST_COPIES = 400, 64
_MOST_BYTES = 1 << 26
"""Copies of one weight take up to so much: twice a large cache."""

_TOLERANCE = 1e-4
"""Share of the largest output by which tiles may differ: they add in another order."""

_FINITE = 0.5
"""Share of a function's results that must be finite for them to tell something."""

REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError)
"""What TVM raises for a kernel that it cannot compile."""


class Ratio(NamedTuple):
    """How many times as fast one kernel is as another: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass
class Ready:
    """A compiled kernel with its arguments.

    Attributes:
        call: runs it once, with the next copy of its weight.
        output: what it computed.
        clock: seconds; of this thread alone where no other takes part, which leaves out what else the machine does.
    """

    call: Callable[[], None]
    output: np.ndarray
    clock: Callable[[], float]


def raw_weights(spec: Any, seed: int = 0) -> list[np.ndarray]:
    """Seeded weights as a model has them, to pack; none where both operands are activations."""
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]]
    if isinstance(spec, DenseMatMul):
        shapes, outputs = [(spec.k, spec.n)], spec.n
    elif isinstance(spec, Conv2d):
        shapes = [(spec.filters, spec.channels // spec.groups, *spec.window.kernel)]
        outputs = spec.filters
    elif isinstance(spec, DepthwiseConv2d):
        shapes, outputs = [(spec.channels, 1, *spec.window.kernel)], spec.channels
    else:
        return []
    found = [rng.standard_normal(shape, np.float32) for shape in shapes]
    return [*found, rng.standard_normal(outputs, np.float32)] if spec.bias else found


def weight_bytes(spec: Any) -> int:
    """Bytes of a kernel's weights as a model has them."""
    if isinstance(spec, DenseMatMul):
        return 4 * spec.k * spec.n
    if isinstance(spec, Conv2d):
        return 4 * spec.filters * spec.channels // spec.groups * math.prod(spec.window.kernel)
    if isinstance(spec, DepthwiseConv2d):
        return 4 * spec.channels * math.prod(spec.window.kernel)
    return 0


def prepare(spec: Any, cpu: Cpu, footprint: int) -> Ready:
    """Compile a kernel and make its arguments.

    Args:
        spec: of sizes that are all known.
        cpu: this machine's.
        footprint: bytes of weights that pass through the cache between two reads of the same weight.

    Raises:
        RuntimeError, ValueError, TypeError, AssertionError: it cannot be compiled.
    """
    function, weights = spec.prim_func(cpu), raw_weights(spec)
    shapes = [tuple(int(d) for d in parameter.shape) for parameter in function.params]
    run = compile_kernel(function, cpu)
    packed = spec.pack(*weights) if weights else []
    rng = np.random.default_rng(1)
    others = [rng.standard_normal(shape, np.float32) for shape in (shapes[0], *shapes[1 + len(packed) : -1])]
    output = tvm.runtime.empty(shapes[-1], "float32")
    x, *rest = [tvm.runtime.tensor(array) for array in others]
    size = max(1, sum(array.nbytes for array in packed))
    copies = min(_MOST_COPIES, max(1, min(footprint, _MOST_BYTES) // size)) if packed else 1
    arguments = [(x, *(tvm.runtime.tensor(array) for array in packed), *rest, output) for _ in range(copies)]
    turn = 0

    def call() -> None:
        nonlocal turn
        run(*arguments[turn])
        turn = (turn + 1) % copies

    call()
    return Ready(call, output.numpy(), time.thread_time if cpu.cores == 1 else time.perf_counter)


def prepare_function(function: Any, cpu: Cpu) -> Ready:
    """Compile a scheduled function and make its arguments.

    Args:
        function: of sizes that are all known; it has buffers only, and stores to some of them.
        cpu: this machine's.

    Raises:
        RuntimeError, ValueError, TypeError, AssertionError: it cannot be compiled.
    """
    run = compile_kernel(function.with_attr("global_symbol", "main"), cpu)
    written = written_parameters(function)

    def filled(signed: bool) -> list[Any]:
        rng = np.random.default_rng(1)
        # Indices of 1 are inside of every table that has no dimension of one element.
        highest = min((int(size) for one in function.params for size in one.shape), default=1) > 1
        return [
            tvm.runtime.empty([int(size) for size in one.shape], str(one.dtype))
            if result
            else tvm.runtime.tensor(_filled(one, rng, signed, int(highest)))
            for one, result in zip(function.params, written, strict=True)
        ]

    def results(arguments: list[Any]) -> np.ndarray:
        run(*arguments)
        found = [a.numpy().astype(np.float64).ravel() for a, w in zip(arguments, written, strict=True) if w]
        return np.concatenate(found)

    arguments = filled(signed=True)
    output = results(arguments)
    if np.isfinite(output).mean() < _FINITE:
        # Roots and logarithms of negative numbers tell little about what was computed.
        arguments = filled(signed=False)
        output = results(arguments)
    return Ready(lambda: run(*arguments), output, time.thread_time if cpu.cores == 1 else time.perf_counter)


def written_parameters(function: Any) -> list[bool]:
    """Which parameters of a function it stores to."""
    stored: list[Any] = []
    tvm_ffi.structural_walk(function.body, (tirx.BufferStore, lambda store: stored.append(store.buffer)))
    return [any(buffer.same_as(one) for buffer in stored) for one in function.params]


def _filled(parameter: Any, rng: np.random.Generator, signed: bool, highest: int) -> np.ndarray:
    """An input: floats between 0.1 and 0.9 of either sign, where nearly every function is defined; 0 or 1."""
    shape, dtype = [int(size) for size in parameter.shape], str(parameter.dtype)
    if "float" not in dtype:
        return rng.integers(0, 2 if dtype == "bool" else highest + 1, shape).astype(dtype)
    found = rng.uniform(0.1, 0.9, shape)
    return (found * rng.choice([-1, 1], shape) if signed else found).astype(dtype)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two kernels computed the same, but for the order of additions."""
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    difference = np.abs(one - other, where=finite, out=np.zeros(one.shape, one.dtype))
    largest = float(np.abs(one[finite]).max(initial=0))
    return bool(np.isfinite(other[finite]).all()) and float(difference.max()) <= _TOLERANCE * largest


def seconds(kernel: Ready, turns: int) -> float:
    """The median time of a call."""
    calls = _calls(kernel)
    return statistics.median(_timed(kernel, calls) for _ in range(turns))


def beside(kernels: Sequence[Ready], turns: int) -> list[Ratio]:
    """How many times as fast each kernel is as the first one.

    Each has ``turns`` turns; who goes first changes from turn to turn.
    """
    calls = [_calls(kernel) for kernel in kernels]
    taken: list[list[float]] = [[] for _ in kernels]
    for turn in range(turns):
        for step in range(len(kernels)):
            at = (turn + step) % len(kernels)
            taken[at].append(_timed(kernels[at], calls[at]))
    found = []
    for mine in taken:
        ratios = [first / other for first, other in zip(taken[0], mine, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if turns > 1 else ratios * 3
        found.append(Ratio(median, low, high))
    return found


def once(kernel: Ready) -> float:
    """Seconds of one call, roughly."""
    return max(1e-7, min(_timed(kernel, 1) for _ in range(3)))


def _calls(kernel: Ready) -> int:
    return max(1, min(_MOST_CALLS, math.ceil(SAMPLE_SECONDS / once(kernel))))


def _timed(kernel: Ready, calls: int) -> float:
    call, clock = kernel.call, kernel.clock
    began = clock()
    for _ in range(calls):
        call()
    return (clock() - began) / calls

"""EasyQuant's arithmetic (arXiv 2403.02775): outliers kept exact, the other weights on optimised scales.

    outliers   |w - mean| >= sigma · deviation, both of the whole tensor
    the rest   w ≈ s·k,  k = clamp(round(w / s)) in [-2^(n-1), 2^(n-1) - 1],  one s per channel or group

The scale starts at ``s0 = max|w| / (2^(n-1) - 1)`` over the weights that are no outliers and is moved to
lower the squared error ``‖s·k - w‖²``. Everything below works on ``w / s0`` and on ``r = s / s0``, so
that step lengths mean the same for every channel and no number over- or underflows.

Two ways to move it. *exact* alternates between the two halves of the problem, each solved exactly:
``k = clamp(round(w / s))``, then ``s = ⟨k, w⟩ / ⟨k, k⟩``. *adam* is the paper's: gradient descent with
``∂/∂s = 2 ⟨k, s·k - w⟩``, where ``k`` is the clamped code (the paper prints the unclamped one, which is
no derivative where weights are clipped). Both keep the best scale they saw, ``s0`` included, so the
error never grows.

The alternation starts from the best of 32 scales, found on a histogram of up to 512 weights of each
channel. On Gaussian weights at 4 bits it is then 0.1 dB from the best scale there is; from ``s0``
(1.8 dB away) it needs a hundred steps to come as near. All work is done on panels that stay in the
caches, about ten operations per weight and step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import pack
from effic.passes.quantize.affine import Grid, parameters

# Adding it to a float32 of moderate size rounds half to even; see the affine quantizer.
_ROUND = np.float32(12582912.0)

# Weights worked on at a time: more leave the caches, fewer pay more for the calls. Where channels are
# columns, a row of the file should give some cache lines.
_PANEL = 1 << 18
_LEAST_COLUMNS = 64

# Ratios the alternation may start from, and weights of a channel by which it chooses.
_STARTS = 32
_SAMPLE = 512

# Adam as the paper uses it (its defaults), and the least ratio to the first scale.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_LEAST_RATIO = 1e-8


@dataclass(frozen=True)
class Search:
    """How scales are optimised.

    Attributes:
        optimizer: ``"exact"`` or ``"adam"``.
        steps: iterations; 0 keeps the first scale.
        rate: step length of adam, relative to the first scale.
    """

    optimizer: Literal["exact", "adam"] = "exact"
    steps: int = 1
    rate: float = 1e-3


class EasyQuantized(NamedTuple):
    """A quantized matrix.

    Attributes:
        packed: codes of all rows as ONNX packs them, uint8 ``[bytes]``; zero under outliers.
        scales: in the dtype of the weight; see :class:`effic.passes.quantize.affine.Quantized`.
        indices: int32 (int64 beyond 2^31 weights) ``[n]``, flat positions of the outliers, ascending.
        values: ``[n]``, the outliers, dtype of the weight.
        signal, noise: sums of squares of the weights and of their errors.
    """

    packed: np.ndarray
    scales: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    signal: float
    noise: float


def easyquant(
    matrix: np.ndarray,
    axis: int,
    grid: Grid,
    storage: ir.DataType,
    sigma: float,
    search: Search,
    give_back: Callable[[int], None] | None = None,
) -> EasyQuantized | None:
    """Quantize a matrix, keeping its outliers.

    Args:
        matrix: ``[rows, columns]``, float32, float16 or bfloat16, read twice.
        axis: axis that channels (and groups) run along.
        grid: bits and group size; symmetric.
        storage: ONNX type of the codes, at least ``grid.bits`` wide.
        sigma: standard deviations from the mean from which on a weight is an outlier.
        search: how scales are optimised.
        give_back: called with a number of rows when those above are done with, to free their pages.

    Returns:
        Codes, scales and outliers, or None when a weight is infinite or not a number.
    """
    spread = mean_and_deviation(matrix, give_back)
    if spread is None:
        return None
    low, high = outlier_bounds(*spread, sigma)
    signal = matrix.size * (spread[0] ** 2 + spread[1] ** 2)
    channels, length = matrix.shape[1 - axis], matrix.shape[axis]
    block = grid.block(length)
    out = _Codes(matrix.shape, axis, storage)
    scales: list[np.ndarray] = []
    places: list[np.ndarray] = []
    values: list[np.ndarray] = []
    noise = 0.0
    width = max(1, _PANEL // length) if axis == 1 else max(_LEAST_COLUMNS, _PANEL // length // 8 * 8)
    fetched = np.empty((min(width, channels), length), np.float32)
    codes = np.empty(fetched.shape, np.int8)
    buffers = np.empty((2, fetched.size), np.float32)
    for start in range(0, channels, width):
        stop = min(start + width, channels)
        panel = fetched[: stop - start]
        _fetch(matrix, axis, start, stop, panel)
        positions = outlier_positions(panel, low, high)
        exact = panel.reshape(-1)[positions]
        panel.reshape(-1)[positions] = 0
        places.append(_stored_positions(positions, start, length, channels, axis))
        values.append(exact.astype(matrix.dtype))
        for part, into in _lines(panel, codes[: stop - start], block):
            room = Room(*(b[: part.size].reshape(part.shape) for b in buffers))
            with _unbuffered():
                scale, error = fit(part, grid, matrix.dtype, search, room)
            np.copyto(into, room.codes.reshape(into.shape), casting="unsafe")
            scales.append(scale.reshape(into.shape[0], -1))
            noise += error
        out.put(start, codes[: stop - start])
        if give_back is not None and axis == 1:
            give_back(stop)
    indices, found = _ascending(np.concatenate(places), np.concatenate(values), axis)
    return EasyQuantized(out.finish(), _arrange(scales, axis, length, block), indices, found, signal, noise)


# -- outliers ------------------------------------------------------------------------------------


def mean_and_deviation(
    matrix: np.ndarray, give_back: Callable[[int], None] | None = None
) -> tuple[float, float] | None:
    """Mean and standard deviation of all elements; None when one is infinite or not a number.

    Sums are taken about a weight's typical value, so that the deviation of constant weights is
    exactly zero.
    """
    rows, columns = matrix.shape
    step = max(1, _PANEL // 4 // max(columns, 1))
    pivot = float(np.mean(matrix[:step].astype(np.float64)))
    if not math.isfinite(pivot):
        return None
    shift = np.float32(pivot)
    buffer = np.empty((min(step, rows), columns), np.float32)
    total = squares = 0.0
    for start in range(0, rows, step):
        part = matrix[start : start + step]
        moved = buffer[: len(part)]
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(part, shift, out=moved, casting="unsafe", dtype=np.float32)
            flat = moved.reshape(-1)
            square = float(np.dot(flat, flat))
        if not 1e-30 < square < 1e38:
            # Beyond what float32 can square, or nothing but zeros.
            wide = part.astype(np.float64) - float(shift)
            if not np.isfinite(wide).all():
                return None
            total, squares = total + float(wide.sum()), squares + float(np.square(wide).sum())
        else:
            total, squares = total + float(flat.sum()), squares + square
        if give_back is not None:
            give_back(start + len(part))
    count = rows * columns
    mean = total / count
    return float(shift) + mean, math.sqrt(max(squares / count - mean * mean, 0.0))


def outlier_bounds(mean: float, deviation: float, sigma: float) -> tuple[np.float32, np.float32]:
    """``(low, high)``: a float32 ``w`` is an outlier when ``w <= low`` or ``w >= high``.

    The bounds are rounded outwards, so that the comparison is that of the exact bounds. A matrix
    without spread has no outliers.
    """
    if deviation == 0:
        return np.float32(-np.inf), np.float32(np.inf)
    with np.errstate(over="ignore"):
        low, high = np.float32(mean - sigma * deviation), np.float32(mean + sigma * deviation)
    if float(low) > mean - sigma * deviation:
        low = np.nextafter(low, np.float32(-np.inf))
    if float(high) < mean + sigma * deviation:
        high = np.nextafter(high, np.float32(np.inf))
    return low, high


def outlier_positions(lines: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
    """Flat positions of the outliers, ascending, int64."""
    mask = np.less_equal(lines, low)
    mask |= lines >= high
    flat = mask.reshape(-1)
    if flat.size % 8:
        return np.flatnonzero(flat)
    # Outliers are rare: look for them eight at a time.
    words = np.flatnonzero(flat.view(np.uint64))
    row, column = np.nonzero(flat.reshape(-1, 8)[words])
    return words[row] * 8 + column


def _stored_positions(positions: np.ndarray, start: int, length: int, channels: int, axis: int) -> np.ndarray:
    """Flat positions in the stored matrix of those in a panel of whole channels."""
    channel, place = np.divmod(positions, length)
    channel += start
    flat = place * channels + channel if axis == 0 else channel * length + place
    return flat.astype(np.int32 if channels * length < 1 << 31 else np.int64)


def _ascending(indices: np.ndarray, values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    if axis == 1:
        return indices, values
    order = np.argsort(indices)
    return indices[order], values[order]


# -- scales --------------------------------------------------------------------------------------


class Room(NamedTuple):
    """Two buffers of the shape of the weights. They are kept from panel to panel: memory fresh from the
    system costs more than the arithmetic.

    Attributes:
        codes: what :func:`measure` rounded to, float32.
        spare: scratch.
    """

    codes: np.ndarray
    spare: np.ndarray

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Room:
        """New buffers."""
        return cls(np.empty(shape, np.float32), np.empty(shape, np.float32))


def fit(
    lines: np.ndarray, grid: Grid, dtype: np.dtype, search: Search, room: Room
) -> tuple[np.ndarray, float]:
    """Find the scale of each line and round its weights.

    Args:
        lines: float32 ``[lines, length]``, finite, zero where outliers were; overwritten.
        grid: bits.
        dtype: what scales are stored as; errors are those of the stored scale.
        search: how to optimise.
        room: gets the codes.

    Returns:
        Scales ``[lines]`` and the sum of squared errors.
    """
    low, high = lines.min(axis=1), lines.max(axis=1)
    first, _ = parameters(np.minimum(low, 0), np.maximum(high, 0), _absmax(grid), dtype)
    wide = first.astype(np.float32)
    lines *= (1 / wide)[:, None]

    def storable(ratio: np.ndarray) -> np.ndarray:
        if dtype == np.float32:
            return ratio
        stored = (wide * ratio).astype(dtype).astype(np.float32)
        # A scale so small that the storage type loses it stays the first one.
        return np.where(stored > 0, stored / wide, 1).astype(np.float32)

    ratio, errors = optimise(lines, grid, search, storable, room)
    return (wide * ratio).astype(dtype), float(np.dot(errors, np.square(wide, dtype=np.float64)))


def optimise(
    lines: np.ndarray,
    grid: Grid,
    search: Search,
    storable: Callable[[np.ndarray], np.ndarray],
    room: Room,
) -> tuple[np.ndarray, np.ndarray]:
    """Ratio to the first scale and squared error of each line.

    Args:
        lines: float32 ``[lines, length]``, weights in units of their first scale.
        grid: bits.
        search: how to optimise.
        storable: rounds ratios to those whose scale the storage type holds.
        room: gets the codes.

    Returns:
        float32 ``[lines]`` and float32 ``[lines]`` in squared units.
    """
    ones = np.ones(len(lines), np.float32)
    if search.steps == 0:
        return ones, measure(lines, ones, grid, room).error
    first = first_error(lines, room)
    if search.optimizer == "adam":
        ratio = adam(lines, grid, search, storable, room)
    else:
        ratio = alternate(lines, grid, search.steps - 1, storable, room)
    last = measure(lines, ratio, grid, room)
    error = last.error
    if search.optimizer == "exact":
        # The best scale for these very codes, whose error follows without another sweep.
        better = storable(_refitted(ratio, last))
        delta = better - ratio
        refitted = np.maximum(error + delta * (2 * last.slope + delta * last.energy), 0)
        ratio, error = np.where(refitted < error, (better, refitted), (ratio, error))
    worse = np.flatnonzero(first < error)
    if worse.size:
        part = Room.of((worse.size, lines.shape[1]))
        measure(lines[worse], ones[worse], grid, part)
        room.codes[worse], ratio[worse], error[worse] = part.codes, 1, first[worse]
    return ratio, error


class Measured(NamedTuple):
    """At some scale, for each line: squared error, ``⟨k, r·k - w⟩`` (half its derivative) and ``⟨k, k⟩``."""

    error: np.ndarray
    slope: np.ndarray
    energy: np.ndarray


def measure(lines: np.ndarray, ratio: np.ndarray, grid: Grid, room: Room) -> Measured:
    """Round weights at given scales and measure the error; the codes are left in ``room.codes``."""
    codes, error = room.codes, room.spare
    np.multiply(lines, (1 / ratio)[:, None], out=codes)
    codes += _ROUND
    codes -= _ROUND
    np.clip(codes, np.float32(grid.lowest), np.float32(grid.highest), out=codes)
    np.multiply(codes, ratio[:, None], out=error)
    error -= lines
    return Measured(_dots(error, error), _dots(codes, error), _dots(codes, codes))


def first_error(lines: np.ndarray, room: Room) -> np.ndarray:
    """The squared error of each line at its first scale, where nothing is clipped."""
    codes = np.add(lines, _ROUND, out=room.codes)
    codes -= _ROUND
    codes -= lines
    return _dots(codes, codes)


def alternate(
    lines: np.ndarray, grid: Grid, steps: int, storable: Callable[[np.ndarray], np.ndarray], room: Room
) -> np.ndarray:
    """Ratios after ``steps`` exact alternations from the start."""
    ratio = storable(start(lines, grid))
    best, least = ratio, np.full(len(lines), np.inf, np.float32)
    for _ in range(steps):
        here = measure(lines, ratio, grid, room)
        best, least = np.where(here.error < least, (ratio, here.error), (best, least))
        ratio = storable(_refitted(ratio, here))
    if steps:
        here = measure(lines, ratio, grid, room)
        ratio = np.where(here.error < least, ratio, best)
    return ratio


def start(lines: np.ndarray, grid: Grid) -> np.ndarray:
    """The best of some evenly spread ratios, judged by a histogram of a sample of each line.

    By itself the alternation creeps: from ``s0`` it takes a hundred steps at 4 bits. The errors of
    all ratios are one product, histograms ``[lines, bins]`` by squared errors ``[bins, ratios]``.
    """
    ratios, errors = _start_table(grid.bits)
    bins, fine = len(errors), _bins_per_code(grid.bits)
    places = lines[:, :: max(1, lines.shape[1] // _SAMPLE)] * np.float32(fine)
    numbers = np.rint(places, out=places).astype(np.intp)
    numbers += bins // 2 + np.arange(len(lines))[:, None] * bins
    counts = np.bincount(numbers.reshape(-1), minlength=len(lines) * bins).reshape(len(lines), bins)
    best: np.ndarray = ratios[np.argmin(counts.astype(np.float32) @ errors, axis=1)]
    return best


@functools.cache
def _start_table(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Ratios to try ``[ratios]``, and the squared error of each bin's centre at each ``[bins, ratios]``."""
    grid, fine = Grid(bits), _bins_per_code(bits)
    # Fewer levels clip more: the lowest ratios are 0.25, 0.4, 0.57, 0.96 at 2, 3, 4, 8 bits.
    ratios = np.linspace(1, (1 << bits) / ((1 << bits) + 12), _STARTS)
    # At the first scale no weight lies beyond the highest code; rounding may put it a bin further.
    reach = grid.highest * fine + 1
    centres = np.arange(-reach, reach + 1)[:, None] / fine
    codes = np.clip(np.rint(centres / ratios), grid.lowest, grid.highest)
    return ratios.astype(np.float32), np.square(ratios * codes - centres).astype(np.float32)


def _bins_per_code(bits: int) -> int:
    return 16 if bits <= 4 else 4


def adam(
    lines: np.ndarray,
    grid: Grid,
    search: Search,
    storable: Callable[[np.ndarray], np.ndarray],
    room: Room,
) -> np.ndarray:
    """The best ratios seen in ``search.steps`` steps of Adam (Kingma and Ba, algorithm 1)."""
    ratio: np.ndarray = np.ones(len(lines), np.float32)
    best, least = ratio, np.full(len(lines), np.inf, np.float32)
    first: np.ndarray = np.zeros_like(ratio)
    second: np.ndarray = np.zeros_like(ratio)
    for step in range(1, search.steps + 1):
        here = measure(lines, storable(ratio), grid, room)
        best, least = np.where(here.error < least, (storable(ratio), here.error), (best, least))
        gradient = 2 * here.slope
        first = np.float32(_BETA1) * first + np.float32(1 - _BETA1) * gradient
        second = np.float32(_BETA2) * second + np.float32(1 - _BETA2) * np.square(gradient)
        mean, square = first / np.float32(1 - _BETA1**step), second / np.float32(1 - _BETA2**step)
        ratio = np.maximum(
            ratio - np.float32(search.rate) * mean / (np.sqrt(square) + np.float32(_EPSILON)),
            np.float32(_LEAST_RATIO),
        )
    here = measure(lines, storable(ratio), grid, room)
    return np.where(here.error < least, storable(ratio), best)


def _refitted(ratio: np.ndarray, at: Measured) -> np.ndarray:
    """The best scale for the codes: ``⟨k, w⟩ / ⟨k, k⟩``; lines whose codes are all zero keep theirs."""
    some = at.energy > 0
    better = ratio - at.slope / np.where(some, at.energy, 1)
    return np.where(some & (better > 0), better, ratio)


@contextlib.contextmanager
def _unbuffered() -> Iterator[None]:
    """Rows longer than numpy's buffer are multiplied by a number per row at twice the speed."""
    before = np.setbufsize(512)
    try:
        yield
    finally:
        np.setbufsize(before)


def _absmax(grid: Grid) -> Grid:
    return Grid(grid.bits, grid.group_size, True, "absmax")


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of the rows of two matrices; matmul takes them to the BLAS."""
    products: np.ndarray = np.matmul(a[:, None, :], b[:, :, None])
    return products[:, 0, 0]


# -- moving weights and codes --------------------------------------------------------------------


def _fetch(matrix: np.ndarray, axis: int, start: int, stop: int, panel: np.ndarray) -> None:
    """Channels ``start`` to ``stop`` as rows of ``panel``."""
    if axis == 1:
        np.copyto(panel, matrix[start:stop], casting="unsafe")
        return
    # A piece of the transposition and its source fit into the first-level cache together.
    for row in range(0, matrix.shape[0], 64):
        np.copyto(panel[:, row : row + 64], matrix[row : row + 64, start:stop].T, casting="unsafe")


def _lines(weights: np.ndarray, codes: np.ndarray, block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The groups of some channels as lines of weights ``[groups, block]``, and where their codes go.

    Whole channels come as they are. The short last group of each channel comes by itself.
    """
    length = weights.shape[1]
    whole = length - length % block if block else length
    head = np.ascontiguousarray(weights[:, :whole])
    yield head.reshape(-1, block or length), codes[:, :whole]
    if whole < length:
        yield np.ascontiguousarray(weights[:, whole:]), codes[:, whole:]


def _arrange(scales: list[np.ndarray], axis: int, length: int, block: int) -> np.ndarray:
    """Scales of all lines as the file stores them."""
    if not block:
        return np.concatenate(scales)[:, 0]
    if length % block:
        # Whole groups and last groups came in turns.
        scales = [np.concatenate([scales[i], scales[i + 1]], axis=1) for i in range(0, len(scales), 2)]
    joined = np.concatenate(scales)
    return joined if axis == 1 else np.ascontiguousarray(joined.T)


class _Codes:
    """Collects codes by channel and packs them as the file stores them."""

    def __init__(self, shape: tuple[int, int], axis: int, storage: ir.DataType) -> None:
        self.axis, self.storage = axis, storage
        self.per_byte = 8 // storage.bitwidth
        # Where rows fill whole bytes each panel is packed at once; else everything at the end.
        self.packs = shape[1] % self.per_byte == 0
        columns = shape[1] // self.per_byte if self.packs else shape[1]
        self.out = np.empty((shape[0], columns), np.uint8)

    def put(self, start: int, codes: np.ndarray) -> None:
        """Codes int8 ``[channels, length]`` of the channels from ``start`` on."""
        values = codes.view(np.uint8)
        if self.axis == 1:
            into = self.out[start : start + len(codes)]
            if self.packs:
                pack(codes, self.storage, into.reshape(-1))
            else:
                into[...] = values
            return
        if self.packs and self.per_byte > 1:
            # Neighbours in a byte are neighbouring channels: join their rows.
            bits, mask = self.storage.bitwidth, np.uint8((1 << self.storage.bitwidth) - 1)
            joined = values[0 :: self.per_byte] & mask
            for i in range(1, self.per_byte):
                joined |= (values[i :: self.per_byte] & mask) << np.uint8(i * bits)
            values, start = joined, start // self.per_byte
        self.out[:, start : start + len(values)] = values.T

    def finish(self) -> np.ndarray:
        """The packed codes."""
        return self.out.reshape(-1) if self.packs else pack(self.out, self.storage)

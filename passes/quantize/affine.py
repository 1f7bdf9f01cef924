"""The affine quantizer: round weights to a grid per group, fast enough to follow the disk.

Every weight quantizer shares it. The grid of one group of weights ``w`` at ``n`` bits::

    symmetric   weight = s·q         q in [-2^(n-1), 2^(n-1) - 1]
    asymmetric  weight = s·(q - z)   q, z in [0, 2^n - 1]

Rounding is half to even. Zero is always exactly representable.

The symmetric scale comes by one of two rules:

``"full"``    the weight of the largest magnitude gets the lowest code: ``s = -extreme / 2^(n-1)``,
              negative when that weight is positive. All ``2^n`` levels are used; weights of the other
              sign beyond ``(2^(n-1) - 1)·|s|`` are clipped, so ``|w - weight| <= |s|``.
``"absmax"``  ``s = max|w| / (2^(n-1) - 1)``: the lowest code is wasted, nothing is clipped, and
              ``|w - weight| <= s/2``.

``"full"`` is the default because its error is lower at the same size. Signal-to-noise ratio of the
weights in dB at 2, 3, 4 and 8 bits, groups of 128 along the inputs, all layers of a model pooled:

=====================  =====================  =====================  =====================
weights                full                   absmax                 asymmetric
=====================  =====================  =====================  =====================
Gaussian               7.4, 13.7, 19.7, 43.9  2.3, 11.3, 18.6, 43.8  6.0, 13.3, 20.0, 44.6
MiniLM-L6, linear      7.0, 13.0, 19.0, 42.9  2.2, 10.6, 17.9, 42.9  5.6, 12.8, 19.4, 44.0
stories260k, linear    7.9, 14.3, 20.5, 44.6  3.2, 12.2, 19.4, 44.6  6.6, 14.0, 20.6, 45.3
MobileNet, 1x1 convs   6.1, 11.4, 17.2, 41.2  2.2,  9.2, 16.1, 41.1  5.2, 11.7, 18.1, 42.7
=====================  =====================  =====================  =====================

A zero point costs ``bits / group_size`` bits per weight, which is worth 0.2 dB at 4 bits: in linear
layers symmetric and asymmetric are level at equal size, below 4 bits symmetric wins, and in
convolutions and at 8 bits asymmetric does.

The kernel walks the matrix in pieces that stay in the processor's second-level cache and makes few
passes over each: adding 1.5·2^23 rounds to even and leaves the integer in the low bits of the float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import dequantize, pack

# 1.5 * 2^23: a float32 near it has a spacing of one, so that adding it rounds half to even, and its
# low bits are the integer in two's complement.
_ROUND = np.float32(12582912.0)

# Weights worked on at a time: with the codes and the buffers, about a 1 MiB second-level cache.
_CHUNK = 1 << 17

# Weights quantized to estimate the error of a large matrix: the estimate is good to about 0.1 dB.
_SAMPLE = 1 << 15

# Smallest scale whose reciprocal is finite in float32. A group below it holds nothing but dust.
_LEAST_SCALE = np.float32(2.0**-126)


@dataclass(frozen=True)
class Grid:
    """How to quantize.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: weights that share a scale, -1 for the whole axis; the last group may be short.
        symmetric: no zero point.
        scale: rule for the symmetric scale; see the module.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    scale: Literal["full", "absmax"] = "full"

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return self.lowest + (1 << self.bits) - 1

    def block(self, length: int) -> int:
        """Group size for an axis of ``length``, 0 when one group takes all of it."""
        return 0 if self.group_size == -1 or self.group_size >= length else self.group_size


class Quantized(NamedTuple):
    """A quantized matrix.

    Attributes:
        packed: the codes of all rows as ONNX packs them, uint8 ``[bytes]``.
        scales: in the dtype of the weight; ``[groups, columns]`` for groups down the rows (axis 0),
            ``[rows, groups]`` for groups along the columns (axis 1), and without the axis of groups
            when one group takes it all.
        zero_points: uint8, as ``scales``; None when symmetric.
    """

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def parameters(
    low: np.ndarray, high: np.ndarray, grid: Grid, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale and zero point of each group.

    The scale is rounded to ``dtype`` before anything is computed with it, and never so that the
    widest weight falls off the grid.

    Args:
        low: smallest weight of each group or zero, whichever is lower, float32.
        high: largest weight of each group or zero, whichever is higher.
        grid: how to quantize.
        dtype: what scales are stored as.

    Returns:
        Scales in ``dtype`` and zero points as uint8 (None when symmetric), shaped as ``low``.
    """
    if grid.symmetric:
        extreme = np.where(high > -low, high, low)
        steps = np.float32(grid.lowest if grid.scale == "full" else grid.highest)
        scales = extreme / steps if grid.scale == "full" else np.abs(extreme) / steps
        reach = np.abs(extreme)
    else:
        steps = np.float32(grid.highest)
        # Each half by itself: the whole range may be more than float32 can hold.
        scales = high / steps - low / steps
        reach = scales * steps
    rounded = stored = scales
    if dtype != np.float32:
        limit = np.finfo(dtype).max if dtype.kind == "f" else np.float32(3.38e38)
        rounded = np.clip(scales, -limit, limit).astype(dtype)
        stored = rounded.astype(np.float32)
        short = reach > np.abs(stored) * (np.abs(steps) + np.float32(0.49))
        if short.any():
            # Only scales near the smallest numbers of the dtype round this far down.
            away = np.nextafter(rounded, np.copysign(np.array(np.inf, dtype), rounded))
            rounded = np.where(short & (stored != 0), away, rounded)
            stored = rounded.astype(np.float32)
    dust = np.abs(stored) < _LEAST_SCALE
    if dust.any():
        rounded = np.where(dust, np.ones((), dtype), rounded)
        stored = rounded.astype(np.float32)
    if grid.symmetric:
        return rounded, None
    zeros = np.clip(np.rint(-low * (1 / stored)), 0, grid.highest).astype(np.uint8)
    return rounded, zeros


def quantize(
    matrix: np.ndarray,
    axis: int,
    grid: Grid,
    storage: ir.DataType,
    give_back: Callable[[int], None] | None = None,
) -> Quantized | None:
    """Round a matrix to the grid of each of its groups.

    Args:
        matrix: ``[rows, columns]``, float32, float16 or bfloat16, read once or twice from the top.
        axis: axis that groups run along.
        grid: how to quantize.
        storage: ONNX type of the codes, at least ``grid.bits`` wide.
        give_back: called with a number of rows when those above are done with, to free their pages.

    Returns:
        The codes and parameters, or None when a weight is infinite or not a number.
    """
    matrix = np.asarray(matrix, order="C")
    rows, columns = matrix.shape
    block = grid.block(matrix.shape[axis])
    kernel = _Kernel(matrix, grid, storage)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    # A slab has all the rows that are needed to know its scales.
    if axis == 1:
        slab = max(1, _CHUNK // max(columns, 1))
    else:
        slab = block or rows
    for start in range(0, rows, slab):
        stop = min(start + slab, rows)
        low, high = (
            kernel.extremes(start, stop, block) if axis == 1 else kernel.extremes_down(start, stop, give_back)
        )
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return None
        scale, zero = parameters(low, high, grid, matrix.dtype)
        scales.append(scale)
        if zero is not None:
            zeros.append(zero)
        if axis == 1:
            kernel.encode_along(start, stop, block, scale, zero)
        else:
            kernel.encode_down(start, stop, scale, zero, give_back)
        if give_back is not None:
            give_back(stop)
    join = np.concatenate if axis == 1 else np.stack
    all_scales, all_zeros = join(scales), join(zeros) if zeros else None
    if block == 0:
        lone = -1 if axis == 1 else 0
        all_scales = all_scales.take(0, axis=lone)
        all_zeros = None if all_zeros is None else all_zeros.take(0, axis=lone)
    return Quantized(kernel.finish(), all_scales, all_zeros)


class _Kernel:
    """The inner loops, and the buffers they share."""

    def __init__(self, matrix: np.ndarray, grid: Grid, storage: ir.DataType) -> None:
        self.matrix, self.grid, self.storage = matrix, grid, storage
        rows, columns = matrix.shape
        self.chunk = min(rows, max(1, _CHUNK // max(columns, 1)))
        self.buffer = np.empty((self.chunk, columns), np.float32)
        self.source = None if matrix.dtype == np.float32 else np.empty((self.chunk, columns), np.float32)
        per_byte = 8 // storage.bitwidth
        # Where rows fill whole bytes each chunk is packed at once; else everything at the end. Codes of
        # a byte go where they belong.
        self.packs_rows = per_byte > 1 and columns % per_byte == 0
        kind = np.int8 if grid.symmetric else np.uint8
        if self.packs_rows:
            self.out = np.empty((rows, columns // per_byte), np.uint8)
            self.codes = np.empty((self.chunk, columns), kind)
        else:
            self.out = np.empty((rows, columns), np.uint8)
            self.codes = self.out.view(kind)
        # Arrays where numbers would do: numpy has fast loops for two arrays, slow ones for minimum
        # of an array and a number.
        if grid.bits == 8:
            self.top: np.ndarray = np.full((self.chunk, columns), _ROUND + grid.highest, np.float32)
        else:
            self.top = np.full((self.chunk, columns), grid.highest, kind)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Rows of the matrix as float32, a chunk at a time."""
        for first in range(start, stop, self.chunk):
            last = min(first + self.chunk, stop)
            rows = self.matrix[first:last]
            if self.source is not None:
                np.copyto(self.source[: last - first], rows)
                rows = self.source[: last - first]
            yield first, last, rows

    def extremes_down(
        self, start: int, stop: int, give_back: Callable[[int], None] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest weight of each column between two rows, zero included."""
        columns = self.matrix.shape[1]
        positive, negative = _bits(np.zeros((2, columns), np.float32))
        part = np.empty((2, columns), np.float32)
        for _, last, rows in self.chunks(start, stop):
            for sofar, values, room in zip((positive, negative), _both(rows), _both(part), strict=True):
                np.maximum(sofar, np.maximum.reduce(values, axis=0, out=room[0]), out=sofar)
            # A whole-axis group of a large matrix is read twice; its pages need not stay meanwhile.
            if give_back is not None and (last - start) * columns > 64 * _CHUNK:
                give_back(last)
        return _extremes(positive, negative)

    def extremes(self, start: int, stop: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest weight of each group along rows ``start`` to ``stop``, zero included:
        ``[rows, groups]``."""
        columns = self.matrix.shape[1]
        block = block or columns
        positive, negative = _bits(np.zeros((2, stop - start, -(-columns // block)), np.float32))
        for first, last, rows in self.chunks(start, stop):
            here = slice(first - start, last - start)
            for part, which in _whole_and_rest(rows, block):
                for sofar, values in zip((positive, negative), _both(part), strict=True):
                    np.maximum.reduce(values, axis=2, out=sofar[here, which])
        return _extremes(positive, negative)

    def encode_down(
        self,
        start: int,
        stop: int,
        scale: np.ndarray,
        zero: np.ndarray | None,
        give_back: Callable[[int], None] | None,
    ) -> None:
        """Codes of rows ``start`` to ``stop``, whose scale depends on the column only."""
        inverse = 1 / scale.astype(np.float32)
        count = min(self.chunk, stop - start)
        shift = None
        if zero is not None:
            kind = np.float32 if self.grid.bits == 8 else np.uint8
            shift = np.repeat(zero.astype(kind)[None], count, axis=0)
        for first, last, rows in self.chunks(start, stop):
            scaled = np.multiply(rows, inverse, out=self.buffer[: last - first])
            self._round(first, last, scaled, None if shift is None else shift[: last - first])
            if give_back is not None and (last - start) * self.matrix.shape[1] > 64 * _CHUNK:
                give_back(last)

    def encode_along(
        self, start: int, stop: int, block: int, scale: np.ndarray, zero: np.ndarray | None
    ) -> None:
        """Codes of rows ``start`` to ``stop``, with a scale per row and group of columns."""
        block = block or self.matrix.shape[1]
        inverse = (1 / scale.astype(np.float32))[:, :, None]
        for first, last, rows in self.chunks(start, stop):
            here = slice(first - start, last - start)
            scaled = self.buffer[: last - first]
            for (part, which), (out, _) in zip(
                _whole_and_rest(rows, block), _whole_and_rest(scaled, block), strict=True
            ):
                np.multiply(part, inverse[here, which], out=out)
            shift = None
            if zero is not None:
                kind = np.float32 if self.grid.bits == 8 else np.uint8
                shift = np.repeat(zero[here].astype(kind), block, axis=1)[:, : self.matrix.shape[1]]
            self._round(first, last, scaled, shift)

    def _round(self, first: int, last: int, scaled: np.ndarray, shift: np.ndarray | None) -> None:
        """Weights in units of their scale to codes; ``shift`` is the zero point of each."""
        count = last - first
        codes = self.codes[:count] if self.packs_rows else self.codes[first:last]
        top = self.top[:count]
        scaled += _ROUND
        # The lowest code needs no clipping: the scale is chosen so that the widest weight fits.
        if self.grid.bits == 8:
            if shift is not None:
                scaled += shift
            np.minimum(scaled, top, out=scaled)
            np.copyto(codes, scaled.view(np.int32), casting="unsafe")
        else:
            np.copyto(codes, scaled.view(np.int32), casting="unsafe")
            if shift is not None:
                codes += shift
            np.minimum(codes, top, out=codes)
        if self.packs_rows:
            pack(codes, self.storage, self.out[first:last].reshape(-1))

    def finish(self) -> np.ndarray:
        """The packed codes."""
        done = self.packs_rows or self.storage.bitwidth == 8
        return self.out.reshape(-1) if done else pack(self.out, self.storage)


# As integers, positive floats order as the numbers they are, and negative ones, taken as unsigned,
# lie above all positive ones and order by magnitude. Two integer maxima are cheaper than a maximum
# and a minimum of floats, which must look out for NaN; infinity and NaN still come out on top.


def _both(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 values as signed and as unsigned integers."""
    return values.view(np.int32), values.view(np.uint32)


def _bits(zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Room for the two maxima: signed (of positive values) and unsigned (of negative ones)."""
    return zeros[0].view(np.int32), zeros[1].view(np.uint32)


def _extremes(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two maxima as ``(low <= 0, high >= 0)``."""
    high = np.maximum(positive, 0).view(np.float32)
    low = np.where(negative >> 31, negative, 0).astype(np.uint32).view(np.float32)
    return low, high


def _whole_and_rest(rows: np.ndarray, block: int) -> Iterator[tuple[np.ndarray, slice]]:
    """Views ``[rows, groups, block]`` of the whole groups and of the short last one, with the groups'
    numbers."""
    whole = rows.shape[1] // block
    if whole:
        yield rows[:, : whole * block].reshape(rows.shape[0], whole, block), slice(0, whole)
    if rows.shape[1] % block:
        yield rows[:, None, whole * block :], slice(whole, whole + 1)


def quantization_noise(matrix: np.ndarray, axis: int, grid: Grid) -> tuple[float, float, bool]:
    """Energy of a matrix and of what quantization does to it.

    Args:
        matrix: as for :func:`quantize`, all finite.
        axis: axis that groups run along.
        grid: how to quantize.

    Returns:
        Sum of squares of the weights, of their errors, and whether only a sample was looked at (of
        a large matrix: whole groups, evenly spread).
    """
    parts = [matrix]
    sampled = matrix.size > 2 * _SAMPLE
    if sampled:
        block = grid.block(matrix.shape[axis]) or matrix.shape[axis]
        lines = matrix if axis == 1 else matrix.T
        count = max(1, min(8, _SAMPLE // block))
        width = max(1, _SAMPLE // (block * count))
        groups, across = max(1, lines.shape[1] // block), max(1, lines.shape[0] - width)
        parts = []
        for i in range(count):
            group, line = i * groups // count, i * across // count
            parts.append(lines[line : line + width, group * block : (group + 1) * block])
        if axis == 0:
            parts = [part.T for part in parts]
    signal = noise = 0.0
    for part in parts:
        part = np.ascontiguousarray(part)
        done = quantize(part, axis, grid, ir.DataType.INT8 if grid.symmetric else ir.DataType.UINT8)
        if done is None:
            continue
        codes = done.packed.view(np.int8 if grid.symmetric else np.uint8).reshape(part.shape)
        block = grid.block(part.shape[axis])
        decoded = dequantize(codes, done.scales, done.zero_points, axis if block else 1 - axis, block)
        exact = part.astype(np.float32)
        error = (exact - decoded.astype(np.float32)).reshape(-1)
        # Squares beyond float32's range count as infinite.
        with np.errstate(over="ignore"):
            signal += float(np.dot(exact.reshape(-1), exact.reshape(-1)))
            noise += float(np.dot(error, error))
    return signal, noise, sampled

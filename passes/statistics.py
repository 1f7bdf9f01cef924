"""Statistics of what a weight is multiplied with, accumulated sample by sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Rows are gathered until a matrix product is worth its call, and until they take this much memory.
BUFFER_ROWS = 1024
BUFFER_BYTES = 16 << 20
# Sums of squares of larger values could leave float32's range; no trained network has them.
LARGEST = 1e15
# Weights whose output error is computed at a time.
_ERROR_BYTES = 64 << 20


@dataclass(eq=False)
class SiteStatistics:
    """What is known of the inputs of a weight.

    A *row* is what one output of the layer sees: a token for MatMul and Gemm, the pixels under the
    kernel for Conv, a pixel for ConvTranspose (whose overlapping outputs count apart). G is the
    number of convolution groups (1 elsewhere), K the number of inputs of one output channel (Conv:
    ``I/g·kh·kw``, in the order of the stored weight).

    Attributes:
        rows: how many were seen. Of large feature maps an evenly spread part is used.
        second_moment: float32 ``[G, K, K]``, mean over rows of ``x xᵀ``, or None where not asked for.
        sketch: float32 ``[G, R, K]``, or None; ``sketchᵀ·sketch`` is about the second moment, and
            exactly it when the rows or K are no more than were asked for.
        mean_abs: float32 ``[G·K]``, mean magnitude.
        mean_square: float32 ``[G·K]``, mean square: the diagonal of the second moment, at next to no cost.
        abs_max: float32 ``[G·K]``, largest magnitude.
        low: float32 ``[G·K]``, least value.
        high: float32 ``[G·K]``, largest value.
    """

    rows: int
    second_moment: np.ndarray | None
    sketch: np.ndarray | None
    mean_abs: np.ndarray
    mean_square: np.ndarray
    abs_max: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        lines = (self.mean_abs, self.mean_square, self.abs_max, self.low, self.high)
        arrays = (self.second_moment, self.sketch, *lines)
        return sum(a.nbytes for a in arrays if a is not None)

    def output_error(self, delta: np.ndarray) -> float:
        """Mean over rows and outputs of the squared output that a change of the weight makes.

        Args:
            delta: ``W - Q(W)``, ``[out, K]``: all output channels, group after group, as Conv stores
                them; or ``[out, G·K]`` with an input channel a column, as a grouped ConvTranspose
                reads as.

        Returns:
            ``mean((x·δ)²)``, from the sketch where there is one, else from the second moment.

        Raises:
            ValueError: neither was asked for, or the shape does not fit.
        """
        root = self.sketch if self.sketch is not None else self.second_moment
        if root is None:
            raise ValueError("output errors need the second moment or a sketch of the inputs")
        groups, _, width = root.shape
        if delta.shape[1] == width and delta.shape[0] % groups == 0:
            blocks = delta.reshape(groups, -1, width)
        elif delta.shape[1] == groups * width:
            blocks = delta.reshape(-1, groups, width).transpose(1, 0, 2)
        else:
            raise ValueError(
                f"a change of shape {delta.shape} does not fit {groups} groups of {width} inputs"
            )
        total = 0.0
        step = max(1, _ERROR_BYTES // (4 * max(root.shape[1], width)))
        for matrix, block in zip(root, blocks, strict=True):
            for start in range(0, len(block), step):
                part = np.asarray(block[start : start + step], np.float32)
                if self.sketch is not None:
                    total += float(np.sum(np.square(part @ matrix.T), dtype=np.float64))
                else:
                    total += float(np.einsum("ok,ok->", part @ matrix, part, dtype=np.float64))
        outputs = blocks.shape[0] * blocks.shape[1]
        # A sum over a second moment that is rounded can come out just below zero.
        return max(total, 0.0) / outputs if outputs else 0.0


class Accumulator:
    """Statistics of rows that arrive in pieces; the result does not depend on how they are cut.

    Args:
        groups: G of :class:`SiteStatistics`.
        width: K.
        second_moment: whether to keep it.
        sketch: rows of the sketch, 0 for none.
        seed: of the sketch.
    """

    def __init__(self, groups: int, width: int, *, second_moment: bool, sketch: int, seed: int = 0) -> None:
        self.groups, self.width, self.rows = groups, width, 0
        size = groups * width
        self._sum_abs = np.zeros(size, np.float64)
        self._sum_square = np.zeros(size, np.float64)
        self._low = np.full(size, np.inf, np.float32)
        self._high = np.full(size, -np.inf, np.float32)
        # A sketch of as many rows as there are inputs is any root of the second moment.
        exact = second_moment or 0 < sketch >= width
        self._keep_moment, self._sketch_rows = second_moment, sketch
        self._moment = np.zeros((groups, width, width), np.float32) if exact else None
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._sketch = _Sketch(groups, width, sketch, seed) if 0 < sketch < width else None

    def add(self, rows: np.ndarray) -> bool:
        """Take rows in.

        Args:
            rows: ``[n, G, K]`` or, for one group, ``[n, K]``; any floating type.

        Returns:
            Whether all of them were finite and below :data:`LARGEST`; otherwise the statistics are spoiled.
        """
        rows = np.asarray(rows, np.float32).reshape(-1, self.groups, self.width)
        if not len(rows):
            return True
        self.rows += len(rows)
        flat = rows.reshape(len(rows), -1)
        np.minimum(self._low, flat.min(axis=0), out=self._low)
        np.maximum(self._high, flat.max(axis=0), out=self._high)
        self._sum_abs += np.abs(flat).sum(axis=0, dtype=np.float64)
        self._sum_square += np.einsum("nk,nk->k", flat, flat)
        if self._sketch is not None:
            self._sketch.add(rows)
        if self._moment is not None:
            self._buffer.append(rows)
            self._buffered += len(rows)
            if self._buffered >= BUFFER_ROWS or self._buffered * flat.shape[1] * 4 >= BUFFER_BYTES:
                self._flush()
        # NaN is neither.
        return bool(self._low.min(initial=0) > -LARGEST and self._high.max(initial=0) < LARGEST)

    def finish(self) -> SiteStatistics:
        """The statistics of all rows; the accumulator is used up."""
        self._flush()
        count = max(self.rows, 1)
        empty = self.rows == 0
        low = np.zeros_like(self._low) if empty else self._low
        high = np.zeros_like(self._high) if empty else self._high
        moment, self._moment = self._moment, None
        if moment is not None:
            moment /= np.float32(count)
        sketch = None
        if self._sketch is not None:
            sketch = self._sketch.rows / np.float32(math.sqrt(count))
        elif self._sketch_rows and moment is not None:
            sketch = _root(moment)
        return SiteStatistics(
            rows=self.rows,
            second_moment=moment if self._keep_moment else None,
            sketch=sketch,
            mean_abs=(self._sum_abs / count).astype(np.float32),
            mean_square=(self._sum_square / count).astype(np.float32),
            abs_max=np.maximum(np.abs(low), np.abs(high)),
            low=low,
            high=high,
        )

    def _flush(self) -> None:
        if self._moment is None or not self._buffer:
            return
        rows = self._buffer[0] if len(self._buffer) == 1 else np.concatenate(self._buffer)
        self._buffer, self._buffered = [], 0
        if self.groups == 1:
            matrix = rows[:, 0]
            # NumPy sees the same array twice and computes one triangle only.
            self._moment[0] += matrix.T @ matrix
        else:
            stacked = rows.transpose(1, 0, 2)
            self._moment += stacked.transpose(0, 2, 1) @ stacked


class _Sketch:
    """A random projection of rows to a few: row ``i`` is added, with a random sign, to a random one.

    ``E[SᵀS] = XᵀX``, and the error of ``|S δ|²`` has the deviation ``|Xδ|² sqrt(2/R)`` at most
    (the count sketch, Charikar, Chen and Farach-Colton 2002). Every block of R rows goes to the R
    places in a random order, so that the first R rows are kept exactly.
    """

    def __init__(self, groups: int, width: int, size: int, seed: int) -> None:
        self._sums = np.zeros((size, groups, width), np.float32)
        self._rng = np.random.default_rng(seed)
        self._at = self._size = size
        self._places = np.arange(size)
        self._signs = np.ones(size, np.float32)

    def add(self, rows: np.ndarray) -> None:
        """Take in rows ``[n, G, K]``."""
        start = 0
        while start < len(rows):
            if self._at == self._size:
                self._places = self._rng.permutation(self._size)
                self._signs = self._rng.choice(np.array([-1, 1], np.float32), self._size)
                self._at = 0
            count = min(self._size - self._at, len(rows) - start)
            window = slice(self._at, self._at + count)
            self._sums[self._places[window]] += self._signs[window, None, None] * rows[start : start + count]
            self._at += count
            start += count

    @property
    def rows(self) -> np.ndarray:
        """``[G, R, K]``."""
        return np.ascontiguousarray(self._sums.transpose(1, 0, 2))


def _root(moment: np.ndarray) -> np.ndarray:
    """``R`` with ``RᵀR = moment``, group by group; the moment may be singular."""
    exact = moment.astype(np.float64)
    width = moment.shape[-1]
    # Inputs that are always zero, or copies of others, make it singular: far below float32's
    # precision, this much makes it definite.
    ridge = 1e-10 * np.trace(exact, axis1=1, axis2=2) / width + np.finfo(np.float32).tiny
    try:
        lower = np.linalg.cholesky(exact + ridge[:, None, None] * np.eye(width))
        return np.asarray(lower.transpose(0, 2, 1), np.float32)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(exact)
        roots = np.sqrt(np.maximum(values, 0.0))
        return np.asarray(roots[:, :, None] * vectors.transpose(0, 2, 1), np.float32)


def combine(parts: Sequence[SiteStatistics]) -> SiteStatistics:
    """The statistics of a weight with several uses: of the rows of all of them."""
    if len(parts) == 1:
        return parts[0]
    total = sum(p.rows for p in parts)
    shares = [p.rows / total if total else 1 / len(parts) for p in parts]
    moments = [p.second_moment for p in parts if p.second_moment is not None]
    sketches = [p.sketch for p in parts if p.sketch is not None]
    seen = [p for p in parts if p.rows] or list(parts)
    moment = None
    if len(moments) == len(parts):
        moment = np.zeros_like(moments[0])
        for share, one in zip(shares, moments, strict=True):
            moment += np.float32(share) * one
    sketch = None
    if len(sketches) == len(parts):
        scaled = [np.float32(math.sqrt(s)) * one for s, one in zip(shares, sketches, strict=True)]
        sketch = np.concatenate(scaled, axis=1)
    return SiteStatistics(
        rows=total,
        second_moment=moment,
        sketch=sketch,
        mean_abs=np.sum([np.float32(s) * p.mean_abs for s, p in zip(shares, parts, strict=True)], axis=0),
        mean_square=np.sum(
            [np.float32(s) * p.mean_square for s, p in zip(shares, parts, strict=True)], axis=0
        ),
        abs_max=np.max([p.abs_max for p in seen], axis=0),
        low=np.min([p.low for p in seen], axis=0),
        high=np.max([p.high for p in seen], axis=0),
    )


# -- ranges ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class RangeStatistics:
    """The values a tensor takes.

    Attributes:
        low: least value.
        high: largest value.
        counts: int64 ``[bins]``, histogram.
        edges: float64 ``[bins + 1]``; multiples of a power of two, zero among them. They reach from
            ``low`` (or zero) to ``high`` (or zero), in as many bins as were asked for or, since the
            width is a power of two, down to half as many.
        channel_low, channel_high, channel_mean: float32 ``[channels]`` along axis 1, or None for
            tensors of rank below 2 or of varying size.
    """

    low: float
    high: float
    counts: np.ndarray
    edges: np.ndarray
    channel_low: np.ndarray | None = None
    channel_high: np.ndarray | None = None
    channel_mean: np.ndarray | None = None


@dataclass(eq=False)
class RangeAccumulator:
    """A histogram whose bins double in width as values grow: the result does not depend on order."""

    bins: int
    low: float = math.inf
    high: float = -math.inf
    _exponent: int = -126
    _first: int = 0
    _counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    _channels: list[np.ndarray] | None = None
    _channel_rows: int = 0
    _seen: bool = False

    def add(self, array: np.ndarray) -> bool:
        """Take a tensor in; whether all its values were finite (otherwise it is left out)."""
        array = np.asarray(array, np.float32)
        if array.size == 0:
            return True
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen()
        index = np.floor(np.ldexp(array.reshape(-1), -self._exponent)).astype(np.int64) - self._first
        self._counts += np.bincount(index, minlength=len(self._counts))
        self._add_channels(array)
        self._seen = True
        return True

    def _widen(self) -> None:
        """Let the bins reach over zero and all values seen, and keep what was counted."""
        exponent, first, last = self._exponent, 0, 0
        while True:
            first = math.floor(math.ldexp(min(self.low, 0.0), -exponent))
            last = math.floor(math.ldexp(max(self.high, 0.0), -exponent))
            if last - first < self.bins:
                break
            exponent += 1
        old = np.flatnonzero(self._counts)
        places = ((old + self._first) >> (exponent - self._exponent)) - first
        counts = np.zeros(last - first + 1, np.int64)
        np.add.at(counts, places, self._counts[old])
        self._exponent, self._first, self._counts = exponent, first, counts

    def _add_channels(self, array: np.ndarray) -> None:
        if array.ndim < 2:
            return
        axes = (0, *range(2, array.ndim))
        rows = array.size // array.shape[1]
        now = [array.min(axis=axes), array.max(axis=axes), array.sum(axis=axes, dtype=np.float64)]
        if not self._seen:
            self._channels = now
        elif self._channels is not None and len(self._channels[0]) == array.shape[1]:
            old = self._channels
            self._channels = [np.minimum(old[0], now[0]), np.maximum(old[1], now[1]), old[2] + now[2]]
        else:
            self._channels = None
        self._channel_rows += rows

    def finish(self) -> RangeStatistics:
        """The histogram of all values so far; of none, it is one empty bin at zero."""
        if not self._seen:
            return RangeStatistics(0.0, 0.0, np.zeros(1, np.int64), np.array([0.0, 1.0]))
        edges = np.ldexp(
            np.arange(self._first, self._first + len(self._counts) + 1, dtype=np.float64), self._exponent
        )
        channels: list[np.ndarray | None] = [None, None, None]
        if self._channels is not None:
            low, high, total = self._channels
            channels = [low, high, (total / self._channel_rows).astype(np.float32)]
        return RangeStatistics(self.low, self.high, self._counts, edges, *channels)

"""Which range of an activation its 8 bits cover: thresholds from a histogram, and the grid they make.

Values beyond a threshold are clipped, values between are rounded to a step that grows with the
range. The methods weigh the two differently:

``minmax``      nothing is clipped.
``percentile``  the outermost values are clipped, the same share at both ends.
``mse``         the sum of squared clipping and rounding errors is least among the candidates.
``entropy``     the clipped and rounded distribution keeps most information (Migacz, "8-bit inference
                with TensorRT", GTC 2017: least Kullback-Leibler divergence).

A range always holds zero, so that padding and rectified values are exact, and never reaches beyond
what was seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from effic.passes.statistics import RangeStatistics

Method = Literal["minmax", "percentile", "entropy", "mse"]

LEVELS = 255
"""Steps between the lowest and the highest code of an unsigned byte."""

# Below this a range is taken for nothing: the scale, times that of a weight, must stay a normal float32.
LEAST_RANGE = 1e-10
# Candidates on either side of zero: a step of 1.5 % of the range is below what accuracy can tell.
_CANDIDATES = 64
# No more than nine tenths of a range are cut off; less is left only by statistics of a few outliers,
# which the percentile method is for.
_SHORTEST = 0.1
# TensorRT compares with 128 levels, not with 256: with few bins per level everything looks alike.
_ENTROPY_LEVELS = 128
# Share of the probability that is spread over all bins of the coarse distribution (as onnxruntime does).
_EVERYWHERE = 1e-4


class Thresholds(NamedTuple):
    """The range of a tensor that codes cover, ``low <= 0 <= high``."""

    low: float
    high: float

    def union(self, other: Thresholds) -> Thresholds:
        """The range that covers both."""
        return Thresholds(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, eq=False)
class ByteGrid:
    """How an activation is stored in unsigned bytes: ``value = scale * (code - zero_point)``."""

    scale: np.float32
    zero_point: np.uint8


def byte_grid(thresholds: Thresholds) -> ByteGrid:
    """The grid of 256 levels over a range; zero is a level.

    A range of nothing (an activation that is always zero) becomes ``[0, 1]``: any other value has to
    be clipped to something, and a bias, whose step is a multiple of this one, stays fine enough.
    """
    low, high = min(thresholds.low, 0.0), max(thresholds.high, 0.0)
    if high - low < LEAST_RANGE:
        return ByteGrid(np.float32(1 / LEVELS), np.uint8(0))
    scale = np.float32(high / LEVELS - low / LEVELS)
    zero = min(max(round(-low / float(scale)), 0), LEVELS)
    return ByteGrid(scale, np.uint8(zero))


def thresholds(statistics: RangeStatistics, method: Method, percentile: float = 99.99) -> Thresholds:
    """The range to cover, zero included.

    Args:
        statistics: least and largest value and histogram of a tensor.
        method: see the module.
        percentile: share of the values to keep, in percent; only for that method.
    """
    widest = Thresholds(min(float(statistics.low), 0.0), max(float(statistics.high), 0.0))
    if method == "minmax" or widest.high - widest.low < LEAST_RANGE or not statistics.counts.any():
        return widest
    if method == "percentile":
        found = _percentile(statistics, percentile)
    elif method == "mse":
        found = _least_squares(statistics, widest)
    else:
        found = _least_divergence(statistics, widest)
    return Thresholds(
        min(max(found.low, widest.low), 0.0),
        max(min(found.high, widest.high), 0.0),
    )


def _percentile(statistics: RangeStatistics, percentile: float) -> Thresholds:
    """The values between which ``percentile`` percent lie, half of the rest beyond either end."""
    sums = np.concatenate([[0], np.cumsum(statistics.counts)]).astype(np.float64)
    rest = (1 - percentile / 100) / 2
    low, high = np.interp([rest * sums[-1], (1 - rest) * sums[-1]], sums, statistics.edges)
    return Thresholds(float(low), float(high))


def squared_error(statistics: RangeStatistics, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Sum over all values of the squared error a range makes: of clipping, and ``step²/12`` of rounding.

    Args:
        statistics: histogram of a tensor.
        low, high: ends of the ranges, of shapes that broadcast.

    Returns:
        An error for each pair, in the broadcast shape.
    """
    counts, centres = _without_zeros(statistics)
    below = _Moments(counts[::-1], -centres[::-1])
    above = _Moments(counts, centres)
    clipped = above.beyond(high) + below.beyond(-low)
    inside = counts.sum() - above.count(high) - below.count(-low)
    step = (high - low) / LEVELS
    return np.asarray(clipped + inside * step * step / 12)


class _Moments:
    """Sums over the part of a histogram above any limit; ``centres`` ascend."""

    def __init__(self, counts: np.ndarray, centres: np.ndarray) -> None:
        self.centres = centres
        self.sums = [
            np.concatenate([np.cumsum((counts * centres**power)[::-1])[::-1], [0.0]]) for power in range(3)
        ]

    def count(self, limit: np.ndarray) -> np.ndarray:
        """How many values lie above."""
        return np.asarray(self.sums[0][np.searchsorted(self.centres, limit, side="right")])

    def beyond(self, limit: np.ndarray) -> np.ndarray:
        """Sum of ``(x - limit)²`` over the values above."""
        at = np.searchsorted(self.centres, limit, side="right")
        zeroth, first, second = (sums[at] for sums in self.sums)
        # Rounding of the three large sums may leave a tiny negative number.
        return np.asarray(np.maximum(second - 2 * limit * first + limit * limit * zeroth, 0))


def _without_zeros(statistics: RangeStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Counts and bin centres, without the zeros of a rectified tensor: they are exact on any grid."""
    counts = statistics.counts.astype(np.float64)
    centres = (statistics.edges[:-1] + statistics.edges[1:]) / 2
    if statistics.low >= 0 or statistics.high <= 0:
        at = int(np.clip(np.searchsorted(statistics.edges, 0.0, side="right") - 1, 0, len(counts) - 1))
        counts[at] = 0
    return counts, centres


def candidates(widest: Thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the ranges that the mse method tries: ``[n]`` lower and ``[m]`` upper ones."""
    parts = np.linspace(_SHORTEST, 1, _CANDIDATES)
    return (
        parts * widest.low if widest.low < 0 else np.zeros(1),
        parts * widest.high if widest.high > 0 else np.zeros(1),
    )


def _least_squares(statistics: RangeStatistics, widest: Thresholds) -> Thresholds:
    lows, highs = candidates(widest)
    errors = squared_error(statistics, lows[:, None], highs[None])
    # Of equal errors the widest range: it clips least of what calibration did not see.
    flat = errors.size - 1 - int(np.argmin(errors[::-1, ::-1]))
    row, column = divmod(flat, errors.shape[1])
    return Thresholds(float(lows[row]), float(highs[column]))


def _least_divergence(statistics: RangeStatistics, widest: Thresholds) -> Thresholds:
    counts, _ = _without_zeros(statistics)
    edges = statistics.edges
    best, least = widest, math.inf
    for part in np.linspace(1, _SHORTEST, _CANDIDATES):
        first = int(np.searchsorted(edges, part * widest.low, side="right")) - 1
        last = int(np.searchsorted(edges, part * widest.high, side="left"))
        first, last = max(first, 0), min(last, len(counts))
        if last - first < _ENTROPY_LEVELS:
            break
        divergence = _divergence(counts, first, last)
        if divergence < least:
            best, least = Thresholds(float(edges[first]), float(edges[last])), divergence
    return best


def _divergence(counts: np.ndarray, first: int, last: int) -> float:
    """Kullback-Leibler divergence of the histogram, clipped to some of its bins, from that at few levels."""
    inside = counts[first:last]
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    level = np.arange(len(inside)) * _ENTROPY_LEVELS // len(inside)
    filled = (clipped > 0).astype(np.float64)
    total = np.bincount(level, inside, _ENTROPY_LEVELS)
    bins = np.bincount(level, filled, _ENTROPY_LEVELS)
    coarse = (total / np.maximum(bins, 1))[level] * filled
    if clipped.sum() == 0 or coarse.sum() == 0:
        return math.inf
    p, q = clipped / clipped.sum(), coarse / coarse.sum()
    known = p > 0
    # What is clipped lands where nothing was: without a little everywhere that would count as infinitely bad.
    q = (1 - _EVERYWHERE) * q + _EVERYWHERE / int(known.sum())
    return float(np.sum(p[known] * np.log(p[known] / q[known])))

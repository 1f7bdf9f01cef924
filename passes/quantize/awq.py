"""Activation-aware weight quantization: the arithmetic.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (MLSys 2024,
arXiv 2306.00978). Input channels with large activations are scaled up before rounding and down after
it, which makes their part of the error smaller: ``Q(W·s)/s`` instead of ``Q(W)``. The factors are
``s = mean|x|^r``; ``r`` comes from a grid, by the error of the outputs. ``r = 0`` is rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import dequantize
from effic.ir.weights import WeightSite
from effic.passes.calibration import SiteStatistics
from effic.passes.quantize.affine import Grid, quantize
from effic.passes.quantize.fold_scales import weight_factor

RATIOS = tuple(step / 20 for step in range(20))
"""The grid of ``r``, as in the authors' code."""

CLIP_RATIOS = tuple(1 - step / 20 for step in range(10))
"""Shares of a group's range that the search for clipping tries, as in the authors' code."""

# The least mean|x|^r; a channel that is silent on the data must not get a factor of zero.
_LEAST = 1e-4


@dataclass(eq=False)
class Layer:
    """A weight whose input channels are to be scaled, and what its inputs look like.

    Attributes:
        site: the weight.
        channels: which of the shared channels each input channel is, int ``[C_in]``.
        grid: how it will be quantized.
        statistics: of its inputs, with a sketch or the second moment.
    """

    site: WeightSite
    channels: np.ndarray
    grid: Grid
    statistics: SiteStatistics

    def columns(self, factor: np.ndarray) -> np.ndarray:
        """Factors of the shared channels, shaped to multiply :meth:`WeightSite.read`."""
        stored = weight_factor(self.site, factor[self.channels], "in").astype(np.float32)
        if stored.ndim == 2:
            return stored if self.site.in_axis == 1 else stored.T
        matrix = np.broadcast_to(stored, self.site.shape).reshape(self.site.matrix_shape)
        return matrix if self.site.in_axis == 1 else matrix.T


@dataclass(frozen=True, eq=False)
class Search:
    """What the grid search found for layers that share their input channels.

    Attributes:
        ratio: the best ``r``.
        factor: its factors, float64 ``[channels]``; weights are multiplied by them.
        rtn: mean squared output error of each layer at ``r = 0``.
        errors: and at the best ``r``.
        signals: mean squared output of each layer.
    """

    ratio: float
    factor: np.ndarray
    rtn: list[float]
    errors: list[float]
    signals: list[float]


def search(layers: Sequence[Layer], loudness: np.ndarray, free: np.ndarray) -> Search:
    """The factors that lose least in the outputs of all layers together.

    Args:
        layers: the layers.
        loudness: ``mean|x|`` of each shared channel, ``[channels]``.
        free: channels that may be scaled, bool ``[channels]``; with none of them only the errors of
            rounding to nearest are computed.
    """
    weights = [layer.site.read() for layer in layers]
    signals = [layer.statistics.output_error(w) for layer, w in zip(layers, weights, strict=True)]
    best = Search(0.0, np.ones(loudness.size), [], [], signals)
    rtn: list[float] = []
    least = np.inf
    for ratio in RATIOS if free.any() else (0.0,):
        factor = factors(loudness, free, ratio)
        errors = [
            layer.statistics.output_error(scaled_rounding(weight, layer.columns(factor), layer) - weight)
            for layer, weight in zip(layers, weights, strict=True)
        ]
        rtn = rtn or errors
        best = best if best.rtn else Search(0.0, factor, rtn, rtn, signals)
        total = float(np.dot(errors, [len(weight) for weight in weights]))
        # NaN loses every comparison: a weight that is not finite stays at r = 0.
        if total < least:
            least, best = total, Search(ratio, factor, rtn, errors, signals)
    return best


def factors(loudness: np.ndarray, free: np.ndarray, ratio: float) -> np.ndarray:
    """``clamp(mean|x|^r, 1e-4)``, divided by the geometric mean of its extremes; 1 where not free.

    It is 1 as well for a channel that was silent on the data. The authors' code clamps it: its weights
    would be rounded to zero, and should it wake up, it would be ten thousand times as loud as before.
    """
    moved = free & (loudness > 0)
    if ratio == 0 or not moved.any():
        return np.ones(loudness.size)
    found = np.maximum(loudness.astype(np.float64) ** ratio, _LEAST)
    found /= np.sqrt(found[moved].max() * found[moved].min())
    return np.where(moved, found, 1.0)


def scaled_rounding(weight: np.ndarray, columns: np.ndarray, layer: Layer) -> np.ndarray:
    """``Q(W·s)/s``.

    Args:
        weight: ``[out, in]`` float32.
        columns: factors, broadcast to the weight.
        layer: for the grid and the dtype that scales are stored in.
    """
    kind = layer.site.dtype.numpy()
    return np.asarray(round_to_grid(np.asarray(weight * columns, kind), layer.grid) / columns)


def round_to_grid(matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """A matrix ``[out, in]`` rounded to nearest in groups along its rows, float32; NaN if it is not finite."""
    storage = ir.DataType.INT8 if grid.symmetric else ir.DataType.UINT8
    done = quantize(matrix, 1, grid, storage)
    if done is None:
        return np.full(matrix.shape, np.nan, np.float32)
    codes = done.packed.view(np.int8 if grid.symmetric else np.uint8).reshape(matrix.shape)
    block = grid.block(matrix.shape[1])
    decoded = dequantize(codes, done.scales, done.zero_points, 1 if block else 0, block)
    return np.asarray(decoded, np.float32)


# -- clipping -------------------------------------------------------------------------------------


def search_clipping(layer: Layer, factor: np.ndarray, error: float) -> tuple[np.ndarray | None, float]:
    """How far each group's range may shrink, by the error of its own part of the outputs.

    Args:
        layer: a layer without convolution groups (others are not clipped).
        factor: of the shared channels, as found by :func:`search`.
        error: mean squared output error without clipping.

    Returns:
        Shares of ``max|w|`` per output channel and group, float32 ``[out, groups]``, and the error with
        them; None and ``error`` when clipping does not lower the error of the whole outputs.
    """
    sketch = layer.statistics.sketch
    weight = layer.site.read()
    if sketch is None or sketch.shape[0] != 1 or sketch.shape[2] != weight.shape[1]:
        return None, error
    columns = np.broadcast_to(layer.columns(factor), weight.shape)
    scaled = np.asarray(weight * columns, layer.site.dtype.numpy())
    length = weight.shape[1]
    starts = range(0, length, layer.grid.block(length) or length)
    least = np.full((len(weight), len(starts)), np.inf)
    best = np.ones((len(weight), len(starts)), np.float32)
    for ratio in CLIP_RATIOS:
        shares = np.full(best.shape, ratio, np.float32)
        delta = round_to_grid(clipped(scaled, shares, layer.grid), layer.grid) / columns - weight
        for group, start in enumerate(starts):
            part = slice(start, starts[group + 1] if group + 1 < len(starts) else length)
            errors = np.square(delta[:, part] @ sketch[0, :, part].T).sum(axis=1, dtype=np.float64)
            better = errors < least[:, group]
            least[better, group], best[better, group] = errors[better], ratio
    rounded = round_to_grid(clipped(scaled, best, layer.grid), layer.grid) / columns
    after = layer.statistics.output_error(rounded - weight)
    return (best, after) if after < error else (None, error)


def clipped(matrix: np.ndarray, shares: np.ndarray, grid: Grid) -> np.ndarray:
    """A matrix with each group held within a share of its largest magnitude.

    Args:
        matrix: ``[out, in]``.
        shares: ``[out, groups]``.
        grid: for the group size.
    """
    length = matrix.shape[1]
    block = grid.block(length) or length
    limits = np.maximum.reduceat(np.abs(matrix), range(0, length, block), axis=1).astype(np.float32) * shares
    wide = np.repeat(limits, block, axis=1)[:, :length]
    return np.asarray(np.clip(matrix, -wide, wide), matrix.dtype)

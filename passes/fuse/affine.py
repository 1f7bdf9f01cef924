"""The arithmetic of folding: per-channel scale and shift, into weights from either side.

Everything is computed in float64, whatever the model's type, and rounded once at the end; but a weight's
output channels are scaled in the type that training computes in (:func:`multiply_type`).
No function here knows a graph; they take and return arrays.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

LARGE_SCALE = 1e3
"""A per-channel scale above this usually comes from a channel whose variance is almost zero; a
half-precision weight multiplied by it loses the small values of the channel or overflows."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``y[c] = scale[c] * x[c] + shift[c]`` for every channel ``c``; both float64, shape [C]."""

    scale: np.ndarray
    shift: np.ndarray

    @staticmethod
    def identity(channels: int) -> AffineMap:
        """The map that changes nothing."""
        return AffineMap(np.ones(channels), np.zeros(channels))

    @staticmethod
    def of_norm(
        gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float
    ) -> AffineMap:
        """What a batch norm does once its statistics are frozen (all arguments shape [C])."""
        gamma, beta, mean, variance = (v.astype(np.float64) for v in (gamma, beta, mean, variance))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = gamma / np.sqrt(variance + epsilon)
            return AffineMap(scale, beta - scale * mean)

    def then(self, outer: AffineMap) -> AffineMap:
        """This map followed by ``outer``."""
        return AffineMap(outer.scale * self.scale, outer.scale * self.shift + outer.shift)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.scale.size)

    @property
    def only_shifts(self) -> bool:
        """Whether the scale is exactly one everywhere."""
        return bool((self.scale == 1).all())

    @property
    def only_scales(self) -> bool:
        """Whether the shift is exactly zero everywhere."""
        return bool((self.shift == 0).all())

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @property
    def largest_scale(self) -> float:
        """``max |scale|``."""
        return float(np.abs(self.scale).max(initial=0.0))


@dataclass(frozen=True)
class Window:
    """How a convolution or pooling slides: one number per spatial axis in each tuple.

    Attributes:
        kernel: taps.
        strides: step between outputs.
        dilations: step between taps.
        begin: zeros put before the input.
        end: zeros put after it.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def pads(self) -> bool:
        """Whether any output may see a padded zero."""
        return any(self.begin) or any(self.end)

    @property
    def is_pointwise(self) -> bool:
        """One tap, step one, no padding: every output position depends on its own input only."""
        return not self.pads and all(k == 1 for k in self.kernel) and all(s == 1 for s in self.strides)

    def output_size(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Output positions per axis for an input of size ``spatial``."""
        return tuple(
            (size + b + e - d * (k - 1) - 1) // s + 1
            for size, k, s, d, b, e in zip(
                spatial, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True
            )
        )


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``array`` in ``dtype``; what does not fit becomes infinite, for the caller to look at."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def scaled(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """``weight * factor`` (broadcast), multiplied in float64 and rounded once to the weight's type."""
    if weight.dtype not in (np.float16, np.float32, np.float64):
        return rounded(weight.astype(np.float64) * factor, weight.dtype)
    out = np.empty(weight.shape, weight.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        # numpy converts piece by piece here: no float64 copy of a large weight is ever made.
        np.multiply(weight, factor, out=out, casting="same_kind", dtype=np.float64)
    return out


def multiply_type(weight: np.dtype) -> type[np.floating]:
    """The type in which a weight's output channels are scaled: float32, float64 for float64.

    Exactly what the tune form's Mul node does on a live weight. There, a copy of every weight in double
    would take more memory than the batch norms' activations; the second rounding moves a float32 weight
    by at most 2^-24 of its size.
    """
    return np.float64 if weight == np.float64 else np.float32


def scaled_outputs(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """``weight * factor`` (broadcast) as the tune form computes it, see :func:`multiply_type`."""
    wide = multiply_type(weight.dtype)
    narrow = rounded(factor, np.dtype(wide))
    if weight.dtype not in (np.float16, np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            return rounded(weight.astype(wide) * narrow, weight.dtype)
    out = np.empty(weight.shape, weight.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(weight, narrow, out=out, casting="same_kind", dtype=wide)
    return out


def conv_output_factor(scale: np.ndarray, rank: int) -> np.ndarray:
    """Factor for a Conv weight ``[C_o, C_i/G, k…]`` that scales its output channels."""
    return scale.reshape(-1, *[1] * (rank - 1))


def conv_transpose_output_factor(scale: np.ndarray, shape: tuple[int, ...], group: int) -> np.ndarray:
    """Factor for a ConvTranspose weight ``[C_i, C_o/G, k…]`` that scales its output channels.

    Output channel ``p * C_o/G + j`` of group ``p`` reads the rows ``p * C_i/G …`` of the weight, so
    the scale is cut by groups first; ``scale.reshape(1, -1, 1, 1)`` is right for one group only.
    """
    rows, per_group = shape[0], shape[1]
    by_group = np.broadcast_to(scale.reshape(group, 1, per_group), (group, rows // group, per_group))
    return by_group.reshape(rows, per_group, *[1] * (len(shape) - 2))


def conv_input_factor(scale: np.ndarray, shape: tuple[int, ...], group: int) -> np.ndarray:
    """Factor for a Conv weight ``[C_o, C_i/G, k…]`` that scales its input channels."""
    outs, per_group = shape[0], shape[1]
    by_group = np.broadcast_to(scale.reshape(group, 1, per_group), (group, outs // group, per_group))
    return by_group.reshape(outs, per_group, *[1] * (len(shape) - 2))


def conv_of_shift(weight: np.ndarray, shift: np.ndarray, group: int) -> np.ndarray:
    """What each kernel tap adds when input channel ``c`` holds the constant ``shift[c]``.

    Args:
        weight: Conv weight ``[C_o, C_i/G, k…]``.
        shift: one constant per input channel, shape ``[C_i]``.
        group: the convolution's groups.

    Returns:
        Float64 array ``[C_o, k…]``; its sum over the taps is the shift of an unpadded output.
    """
    factor = conv_input_factor(shift, weight.shape, group)
    return np.asarray((weight.astype(np.float64) * factor).sum(axis=1))


def border_map(taps: np.ndarray, window: Window, spatial: tuple[int, ...]) -> np.ndarray:
    """Sum over the taps that lie inside the input, at every output position.

    Near the border a padded convolution sees fewer taps, so a constant input gives a map, not a
    constant. Whether a tap is inside is decided axis by axis, hence one small product per axis.

    Args:
        taps: ``[C_o, k…]`` from :func:`conv_of_shift`.
        window: the convolution's window.
        spatial: input size per axis.

    Returns:
        Float64 array ``[C_o, out…]``.
    """
    sizes = window.output_size(spatial)
    result = taps
    for axis, (size, out) in enumerate(zip(spatial, sizes, strict=True)):
        starts = np.arange(out) * window.strides[axis] - window.begin[axis]
        position = starts[None, :] + (np.arange(window.kernel[axis]) * window.dilations[axis])[:, None]
        inside = ((position >= 0) & (position < size)).astype(np.float64)
        # Contracts the first kernel axis left; its output axis goes last, so the order is kept.
        result = np.tensordot(result, inside, axes=([1], [0]))
    return result


def spread_groups(depthwise: np.ndarray, group: int) -> np.ndarray:
    """A depthwise kernel ``[C, 1, k…]`` as the kernel ``[C, C/group, k…]`` that does the same."""
    channels = depthwise.shape[0]
    per_group = channels // group
    dense = np.zeros((channels, per_group, *depthwise.shape[2:]))
    index = np.arange(channels)
    dense[index, index % per_group] = depthwise[:, 0]
    return dense


def embed(kernel: np.ndarray, taps: tuple[int, ...], offsets: tuple[int, ...]) -> np.ndarray:
    """``kernel`` ``[o, i, k…]`` inside a zero kernel of size ``taps``, its first tap at ``offsets``."""
    larger = np.zeros((*kernel.shape[:2], *taps))
    at = tuple(slice(o, o + k) for o, k in zip(offsets, kernel.shape[2:], strict=True))
    larger[(slice(None), slice(None), *at)] = kernel
    return larger


def explicit_pads(
    auto_pad: str,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    spatial: tuple[int | None, ...] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The padding that ``SAME_UPPER`` or ``SAME_LOWER`` stands for, as (begin, end).

    Returns:
        None when it depends on an input size that is not known: with a step above one it does.
    """
    sizes: tuple[int | None, ...] = spatial or (None,) * len(kernel)
    begin, end = [], []
    for k, s, d, size in itertools.zip_longest(kernel, strides, dilations, sizes):
        if s == 1:
            total = d * (k - 1)
        elif size is None:
            return None
        else:
            total = max(0, (math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size)
        small, large = total // 2, total - total // 2
        begin.append(small if auto_pad == "SAME_UPPER" else large)
        end.append(large if auto_pad == "SAME_UPPER" else small)
    return tuple(begin), tuple(end)

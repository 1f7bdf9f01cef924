"""Resize and grid sampling as ONNX defines them.

One axis after the other: each output place is a weighted sum of a few input places (its taps).

Where ONNX's reference and ONNX Runtime differ, this follows the runtime, and torch: with
``align_corners`` the last output lies on the last input also where a scale makes no whole number of
outputs, and ``tf_crop_and_resize`` makes as many outputs as it would without the crop. Unlike the runtime,
it crops an axis whose scale is 1 as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def output_size(size: int, scale: float) -> int:
    """floor(size · scale), the product in double precision."""
    return math.floor(size * scale)


def fit_sizes(sizes: Sequence[int], wanted: Sequence[int], policy: str) -> tuple[list[int], list[float]]:
    """Sizes and scales that keep the aspect ratio, for ``keep_aspect_ratio_policy``."""
    if policy == "stretch":
        return list(wanted), [want / size for want, size in zip(wanted, sizes, strict=True)]
    ratios = [want / size for want, size in zip(wanted, sizes, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    # Halves go up here, and not to the even neighbour.
    return [math.floor(size * scale + 0.5) for size in sizes], [scale] * len(sizes)


def source_places(
    count: int, size: int, scale: float, mode: str, roi: tuple[float, float] = (0.0, 1.0)
) -> torch.Tensor:
    """Where each of ``count`` outputs lies on an axis of ``size`` entries (not clamped).

    In single precision, as ONNX Runtime computes them: which of two entries is the nearest can hang on it.
    """
    out = torch.arange(count, dtype=torch.float32)
    if mode == "asymmetric":
        return out / scale
    if mode == "align_corners":
        return out * (size - 1) / (count - 1) if count > 1 else torch.zeros_like(out)
    if mode == "half_pixel":
        return (out + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (out + 0.5) / scale - 0.5 if count > 1 else torch.zeros_like(out)
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - count / (scale * size)) + (out + 0.5) / scale - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (out + 0.5) / scale
    # tf_crop_and_resize
    start, end = roi
    if count > 1:
        return start * (size - 1) + out * (end - start) * (size - 1) / (count - 1)
    return torch.full_like(out, 0.5 * (start + end) * (size - 1))


def _round(x: torch.Tensor, nearest: str) -> torch.Tensor:
    if nearest == "round_prefer_floor":
        return torch.ceil(x - 0.5)
    if nearest == "round_prefer_ceil":
        return torch.floor(x + 0.5)
    return torch.floor(x) if nearest == "floor" else torch.ceil(x)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel (1981) with coefficient ``a``."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def taps(
    places: torch.Tensor,
    size: int,
    scale: float,
    *,
    mode: str,
    nearest_mode: str,
    cubic_coeff_a: float,
    antialias: bool,
    exclude_outside: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input places ``[out, taps]`` and their weights for each output of one axis."""
    if mode == "nearest":
        index = _round(places, nearest_mode).clamp(0, size - 1).to(torch.int64)
        return index.unsqueeze(1), torch.ones(len(index), 1)
    squeeze = min(scale, 1.0) if antialias else 1.0
    support = (2.0 if mode == "cubic" else 1.0) / squeeze
    if mode == "linear" and not antialias:
        places = places.clamp(0, size - 1)
    lowest = torch.floor(places - support) + 1
    around = lowest.unsqueeze(1) + torch.arange(2 * math.ceil(support), dtype=torch.float32)
    distance = (around - places.unsqueeze(1)) * squeeze
    if mode == "cubic":
        weights = _cubic(distance, cubic_coeff_a)
    else:
        weights = (1 - distance.abs()).clamp(min=0)
    inside = (around >= 0) & (around <= size - 1)
    if exclude_outside:
        weights = torch.where(inside, weights, torch.zeros_like(weights))
    if exclude_outside or antialias:
        weights = weights / weights.sum(1, keepdim=True)
    return around.clamp(0, size - 1).to(torch.int64), weights


def resize_axis(
    x: torch.Tensor,
    axis: int,
    count: int,
    scale: float,
    *,
    mode: str = "linear",
    coordinates: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    antialias: bool = False,
    exclude_outside: bool = False,
    roi: tuple[float, float] = (0.0, 1.0),
    extrapolation_value: float = 0.0,
) -> torch.Tensor:
    """Resize one axis of ``x`` to ``count`` entries."""
    size = x.shape[axis]
    crops = coordinates == "tf_crop_and_resize"
    if scale == 1.0 and count == size and not crops:
        return x
    places = source_places(count, size, scale, coordinates, roi)
    index, weights = taps(
        places,
        size,
        scale,
        mode=mode,
        nearest_mode=nearest_mode,
        cubic_coeff_a=cubic_coeff_a,
        antialias=antialias,
        exclude_outside=exclude_outside,
    )
    index = index.to(x.device)
    if mode == "nearest":
        result = x.index_select(axis, index[:, 0])
    else:
        kind = x.dtype if x.is_floating_point() else torch.float32
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        factors = weights.to(device=x.device, dtype=kind)
        result = x.index_select(axis, index[:, 0]) * factors[:, 0].reshape(shape)
        for tap in range(1, index.shape[1]):
            result = result + x.index_select(axis, index[:, tap]) * factors[:, tap].reshape(shape)
    if crops:
        outside = ((places < 0) | (places > size - 1)).to(x.device)
        mask = outside.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        result = torch.where(
            mask, torch.full((), extrapolation_value, dtype=result.dtype, device=x.device), result
        )
    return result


def resize(
    x: torch.Tensor,
    *,
    axes: Sequence[int],
    sizes: Sequence[int] | None,
    scales: Sequence[float] | None,
    policy: str = "stretch",
    roi: Sequence[float] = (),
    mode: str = "nearest",
    coordinates: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    antialias: bool = False,
    exclude_outside: bool = False,
    extrapolation_value: float = 0.0,
) -> torch.Tensor:
    """ONNX Resize over ``axes``.

    Args:
        sizes: the wanted sizes of these axes, or None to take ``scales``.
        roi: for ``tf_crop_and_resize``: starts of the axes, then ends, normalized to the size.
        extrapolation_value: what ``tf_crop_and_resize`` puts outside of ``x``.

    Returns:
        The type of ``x``; integers are rounded towards zero, as a cast does.
    """
    have = [x.shape[axis] for axis in axes]
    if sizes is not None:
        counts, ratios = fit_sizes(have, sizes, policy)
    else:
        ratios = [float(s) for s in scales or ()]
        counts = [output_size(size, ratio) for size, ratio in zip(have, ratios, strict=True)]
    given = list(roi) or [0.0] * len(axes) + [1.0] * len(axes)
    result = x
    for i, axis in enumerate(axes):
        result = resize_axis(
            result,
            axis,
            counts[i],
            ratios[i],
            mode=mode,
            coordinates=coordinates,
            nearest_mode=nearest_mode,
            cubic_coeff_a=cubic_coeff_a,
            antialias=antialias,
            exclude_outside=exclude_outside,
            roi=(given[i], given[len(axes) + i]),
            extrapolation_value=extrapolation_value,
        )
    return result.to(x.dtype)

"""Sampling of images at given places: GridSample in any rank, RoiAlign."""

from __future__ import annotations

import itertools

import torch


def grid_sample(
    x: torch.Tensor, grid: torch.Tensor, mode: str, padding_mode: str, align_corners: bool
) -> torch.Tensor:
    """ONNX GridSample in any number of dimensions.

    Args:
        x: ``[N, C, D1, ..., Dr]``.
        grid: ``[N, O1, ..., Or, r]``, coordinates in [-1, 1], the last axis first.
        mode: ``nearest``, ``linear`` or ``cubic`` (coefficient -0.75).
        padding_mode: ``zeros``, ``border`` or ``reflection``.

    Returns:
        ``[N, C, O1, ..., Or]``.
    """
    sizes = x.shape[2:]
    rank = len(sizes)
    choices = []
    for i, size in enumerate(sizes):
        place = grid[..., rank - 1 - i].to(x.dtype)
        place = (place + 1) / 2 * (size - 1) if align_corners else ((place + 1) * size - 1) / 2
        bounds = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        if mode != "cubic":
            place = _settle(place, size, bounds, padding_mode)
        choices.append(_neighbours(place, size, bounds, mode, padding_mode))
    n, c = x.shape[:2]
    flat = x.reshape(n, c, -1)
    result = x.new_zeros((n, c, *grid.shape[1:-1]))
    for combination in itertools.product(*choices):
        index, weight = combination[0]
        for size, (place, factor) in zip(sizes[1:], combination[1:], strict=True):
            index = index * size + place
            weight = weight * factor
        wanted = index.reshape(n, 1, -1).expand(n, c, -1)
        picked = flat.gather(2, wanted).reshape(n, c, *grid.shape[1:-1])
        result = result + picked * weight.unsqueeze(1)
    return result


def _settle(place: torch.Tensor, size: int, bounds: tuple[float, float], padding_mode: str) -> torch.Tensor:
    if padding_mode == "border":
        return place.clamp(0, size - 1)
    if padding_mode == "reflection":
        return _reflect(place, bounds).clamp(0, size - 1)
    return place


def _reflect(place: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    low, high = bounds
    length = high - low
    if length <= 0:
        return torch.zeros_like(place)
    away = (place - low).abs()
    turns = torch.floor(away / length)
    rest = away - turns * length
    return torch.where(turns % 2 == 0, low + rest, high - rest)


def _neighbours(
    place: torch.Tensor, size: int, bounds: tuple[float, float], mode: str, padding_mode: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Entries of one axis around each place, with their weights; zero where they are outside."""
    base = torch.floor(place)
    if mode == "nearest":
        found = [(torch.round(place), torch.ones_like(place))]
    elif mode == "linear":
        part = place - base
        found = [(base, 1 - part), (base + 1, part)]
    else:
        part = place - base
        found = [(base + k, _cubic_weight(part - k)) for k in (-1, 0, 1, 2)]
        if padding_mode != "zeros":
            found = [(_settle(entry, size, bounds, padding_mode), factor) for entry, factor in found]
    result = []
    for entry, factor in found:
        inside = (entry >= 0) & (entry <= size - 1)
        result.append((entry.clamp(0, size - 1).to(torch.int64), factor * inside.to(factor.dtype)))
    return result


def _cubic_weight(distance: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, far)


def roi_align(
    x: torch.Tensor,
    rois: torch.Tensor,
    batch_indices: torch.Tensor,
    *,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    spatial_scale: float,
    mode: str,
    half_pixel: bool,
) -> torch.Tensor:
    """RoiAlign (He et al. 2017, Mask R-CNN, section 3).

    Args:
        x: ``[N, C, H, W]``.
        rois: ``[R, 4]`` as x1, y1, x2, y2.
        batch_indices: ``[R]``.
        sampling_ratio: samples per bin and axis; 0 takes as many as the bin has pixels.

    Returns:
        ``[R, C, output_height, output_width]``. With ``mode="max"`` the largest of the four weighted
        neighbours of all samples counts, as ONNX defines it.
    """
    shift = 0.5 if half_pixel else 0.0
    corners = rois.to(x.dtype) * spatial_scale - shift
    sides = corners[:, 2:] - corners[:, :2]
    if not half_pixel:
        sides = sides.clamp(min=1.0)
    bins = torch.stack((sides[:, 1] / output_height, sides[:, 0] / output_width), 1)
    batch = batch_indices.to(torch.int64)
    shape = (output_height, output_width)
    if sampling_ratio > 0 or not len(rois):
        samples = max(sampling_ratio, 1)
        return _align(x, batch, corners, bins, shape, (samples, samples), mode)
    counts = torch.ceil(bins).clamp(min=1).to(torch.int64).tolist()
    return torch.cat(
        [
            _align(
                x,
                batch[i : i + 1],
                corners[i : i + 1],
                bins[i : i + 1],
                shape,
                (counts[i][0], counts[i][1]),
                mode,
            )
            for i in range(len(counts))
        ]
    )


def _align(
    x: torch.Tensor,
    batch: torch.Tensor,
    corners: torch.Tensor,
    bins: torch.Tensor,
    shape: tuple[int, int],
    samples: tuple[int, int],
    mode: str,
) -> torch.Tensor:
    ys = corners[:, 1:2] + _centres(shape[0], samples[0], x) * bins[:, :1]
    xs = corners[:, 0:1] + _centres(shape[1], samples[1], x) * bins[:, 1:]
    image = batch[:, None, None]
    parts = []
    for row, row_weight in _around(ys, x.shape[2]):
        for column, column_weight in _around(xs, x.shape[3]):
            # Advanced indices around a slice come first: [R, rows, columns, C].
            values = x[image, :, row[:, :, None], column[:, None, :]]
            parts.append(values * (row_weight[:, :, None] * column_weight[:, None, :]).unsqueeze(-1))
    if mode == "max":
        sampled = torch.stack(parts).amax(0)
    else:
        sampled = parts[0] + parts[1] + parts[2] + parts[3]
    grouped = sampled.reshape(len(batch), shape[0], samples[0], shape[1], samples[1], x.shape[1])
    pooled = grouped.amax((2, 4)) if mode == "max" else grouped.mean((2, 4))
    return pooled.permute(0, 3, 1, 2)


def _centres(bins: int, samples: int, like: torch.Tensor) -> torch.Tensor:
    return (torch.arange(bins * samples, dtype=like.dtype, device=like.device) + 0.5) / samples


def _around(place: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two entries around each place with their weights; beyond one pixel outside there is nothing."""
    inside = ((place >= -1.0) & (place <= size)).to(place.dtype)
    settled = place.clamp(0, size - 1)
    low = torch.floor(settled)
    part = settled - low
    high = (low + 1).clamp(max=size - 1)
    return [(low.to(torch.int64), (1 - part) * inside), (high.to(torch.int64), part * inside)]

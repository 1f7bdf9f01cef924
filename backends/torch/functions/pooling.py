"""Pooling with any padding, dilation and rounding.

A window's sum and maximum are taken one axis after the other: ``k`` shifted slices along each axis
instead of ``k**rank`` entries per window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effic.backends.torch.functions.windows import every_offset, pad_axes, resolve_pads, span, window_count


def _geometry(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
    ceil_mode: bool,
) -> tuple[list[tuple[int, int]], list[int], list[tuple[int, int]]]:
    """Declared padding, number of windows, and the padding with which all of the windows fit."""
    amounts = resolve_pads(sizes, kernel, strides, dilations, pads, auto_pad)
    counts, needed = [], []
    for i, size in enumerate(sizes):
        reach = span(kernel[i], dilations[i])
        count = window_count(size, reach, strides[i], amounts[i], ceil_mode)
        counts.append(count)
        end = (count - 1) * strides[i] + reach - size - amounts[i][0]
        needed.append((amounts[i][0], max(end, 0)))
    return amounts, counts, needed


def _sums(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    counts: Sequence[int],
) -> torch.Tensor:
    """Sum of each window of a padded ``[..., spatial]`` tensor."""
    first = x.ndim - len(kernel)
    for i in range(len(kernel)):
        parts = every_offset(x, first + i, kernel[i], strides[i], dilations[i], counts[i])
        x = parts[0]
        for part in parts[1:]:
            x = x + part
    return x


def average_pool(
    x: torch.Tensor,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
    ceil_mode: bool,
    count_include_pad: bool,
) -> torch.Tensor:
    """ONNX AveragePool. ``x`` is ``[N, C, ...]``.

    What ``ceil_mode`` adds at the end is never counted, declared padding only with ``count_include_pad``.
    """
    sizes = x.shape[2:]
    amounts, counts, needed = _geometry(sizes, kernel, strides, dilations, pads, auto_pad, ceil_mode)
    sums = _sums(pad_axes(x, needed), kernel, strides, dilations, counts)
    ones = torch.ones(sizes, dtype=x.dtype, device=x.device)
    extra = [(before, min(end, after)) for (before, end), (_, after) in zip(needed, amounts, strict=True)]
    inside = pad_axes(ones, extra, float(count_include_pad))
    rest = [(0, end - have) for (_, end), (_, have) in zip(needed, extra, strict=True)]
    return sums / _sums(pad_axes(inside, rest), kernel, strides, dilations, counts)


def lp_pool(
    x: torch.Tensor,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
    ceil_mode: bool,
    p: int,
) -> torch.Tensor:
    """(Σ |x|^p)^(1/p) over each window of ``x [N, C, ...]``."""
    _, counts, needed = _geometry(x.shape[2:], kernel, strides, dilations, pads, auto_pad, ceil_mode)
    sums = _sums(pad_axes(x.abs() ** p, needed), kernel, strides, dilations, counts)
    return sums ** (1.0 / p)


def max_pool(
    x: torch.Tensor,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
    ceil_mode: bool,
    storage_order: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ONNX MaxPool: values, and where they are in the flattened ``x [N, C, ...]``.

    The first of equal entries wins, in row-major order, and has the gradient.

    Args:
        storage_order: 1 counts positions with the spatial axes column-major.
    """
    sizes = x.shape[2:]
    rank = len(kernel)
    _, counts, needed = _geometry(sizes, kernel, strides, dilations, pads, auto_pad, ceil_mode)
    lowest = float("-inf") if x.is_floating_point() else float(torch.iinfo(x.dtype).min)
    # A window that lies in the padding as a whole points at the last entry.
    order = range(rank) if storage_order else range(rank - 1, -1, -1)
    where = torch.zeros((1,) * rank, dtype=torch.int64, device=x.device)
    step = 1
    for i in order:
        line = torch.arange(sizes[i], device=x.device) * step
        where = where + line.reshape([-1 if j == i else 1 for j in range(rank)])
        step = step * sizes[i]
    values = pad_axes(x, needed, lowest)
    place = pad_axes(where, needed, -1).expand(values.shape)
    for i in range(rank - 1, -1, -1):
        geometry = (2 + i, kernel[i], strides[i], dilations[i], counts[i])
        parts = every_offset(values, *geometry)
        places = every_offset(place, *geometry)
        values, place = parts[0], places[0]
        for part, other in zip(parts[1:], places[1:], strict=True):
            better = (part > values) | (part != part) & (values == values) | ((place < 0) & (other >= 0))
            values = torch.where(better, part, values)
            place = torch.where(better, other, place)
    n, c = x.shape[:2]
    start = torch.arange(n * c, device=x.device).reshape(n, c, *([1] * rank)) * step
    return values, place + start


def max_unpool(
    x: torch.Tensor,
    indices: torch.Tensor,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    output_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Put the values of a MaxPool back where they came from, zeros elsewhere.

    The indices count in the tensor that the kernel, strides and pads imply; an ``output_shape`` larger
    than that appends zeros.
    """
    rank = len(kernel)
    implied = [*x.shape[:2]]
    for i in range(rank):
        implied.append((x.shape[2 + i] - 1) * strides[i] + kernel[i] - pads[i] - pads[i + rank])
    total = 1
    for size in implied:
        total = total * size
    flat = torch.zeros(total, dtype=x.dtype, device=x.device)
    result = flat.scatter(0, indices.reshape(-1).to(torch.int64), x.reshape(-1)).reshape(implied)
    if output_shape is None:
        return result
    return pad_axes(result, [(0, want - have) for want, have in zip(output_shape, implied, strict=True)])


def local_response_norm(x: torch.Tensor, size: int, alpha: float, beta: float, bias: float) -> torch.Tensor:
    """x / (bias + alpha/size · Σ x²)^beta, the sum over ``size`` neighbouring channels (axis 1).

    An even window reaches one channel further up than down, as ONNX has it; torch's reaches down.
    """
    down, up = (size - 1) // 2, size - 1 - (size - 1) // 2
    channels = x.shape[1]
    squares = pad_axes((x * x).transpose(1, -1), [(down, up)])
    sums = _sums(squares, [size], [1], [1], [channels]).transpose(1, -1)
    return x / (bias + alpha / size * sums) ** beta

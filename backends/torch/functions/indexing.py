"""Gathering, scattering and searching, with ONNX's rules for negative indices, ties and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def wrap(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Indices as int64, negative ones counted from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather(x: torch.Tensor, indices: torch.Tensor, axis: int) -> torch.Tensor:
    """Entries of ``x`` along ``axis``; the axes of ``indices`` take its place."""
    axis = axis % x.ndim
    places = wrap(indices, x.shape[axis])
    picked = x.index_select(axis, places.reshape(-1))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(x: torch.Tensor, indices: torch.Tensor, axis: int) -> torch.Tensor:
    """``x`` at ``indices`` along ``axis``, both of one rank."""
    return x.gather(axis, wrap(indices, x.shape[axis]))


def gather_nd(x: torch.Tensor, indices: torch.Tensor, batch_dims: int) -> torch.Tensor:
    """``x[b, indices[b, ..., :]]``: the last axis of ``indices`` holds positions in the axes after the batch."""
    depth = indices.shape[-1]
    places = [wrap(indices[..., i], x.shape[batch_dims + i]) for i in range(depth)]
    rest = places[0].ndim - batch_dims
    batch = [
        torch.arange(x.shape[i], device=x.device).reshape(
            [-1 if j == i else 1 for j in range(batch_dims)] + [1] * rest
        )
        for i in range(batch_dims)
    ]
    return x[(*batch, *places)]


def scatter_elements(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: int, reduction: str
) -> torch.Tensor:
    """A copy of ``x`` with ``updates`` written, added, multiplied… at ``indices`` along ``axis``."""
    places = wrap(indices, x.shape[axis])
    updates = updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[reduction])


def scatter_nd(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, reduction: str) -> torch.Tensor:
    """A copy of ``x`` with slices replaced: ``x[indices[..., :]] = updates``."""
    depth = indices.shape[-1]
    flat_index = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for i in range(depth):
        flat_index = flat_index * x.shape[i] + wrap(indices[..., i], x.shape[i])
    rows = 1
    for size in x.shape[:depth]:
        rows = rows * size
    inner = x.shape[depth:]
    table = x.reshape(rows, -1) if x.numel() else x.reshape(rows, 0)
    values = updates.reshape(flat_index.numel(), table.shape[1])
    places = flat_index.reshape(-1, 1).expand(-1, table.shape[1])
    if reduction == "none":
        result = table.scatter(0, places, values)
    else:
        result = table.scatter_reduce(0, places, values, REDUCTIONS[reduction])
    return result.reshape(*x.shape[:depth], *inner)


def nonzero(x: torch.Tensor) -> torch.Tensor:
    """Positions of entries that are not zero, ``[rank, count]``; a scalar counts as a vector of one."""
    return torch.nonzero(x.reshape(1) if x.ndim == 0 else x).transpose(0, 1)


def top_k(x: torch.Tensor, k: int, axis: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest (or smallest) along ``axis``, in order; of equal entries the one at the lowest index."""
    # topk leaves the order of equal entries open, a stable sort does not.
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


def one_hot(indices: torch.Tensor, depth: int, values: torch.Tensor, axis: int) -> torch.Tensor:
    """``values`` is (off, on); an index outside of [-depth, depth) makes a row of off."""
    rank = indices.ndim + 1
    axis = axis % rank
    places = torch.arange(depth, device=indices.device).reshape([-1 if i == axis else 1 for i in range(rank)])
    # Float indices are allowed; they stand for whole numbers.
    whole = indices.to(torch.int64)
    wanted = torch.where(whole < 0, whole + depth, whole).unsqueeze(axis)
    return torch.where(wanted == places, values[1], values[0])


def eye_like(x: torch.Tensor, k: int, dtype: torch.dtype | None) -> torch.Tensor:
    """Ones on the k-th diagonal of a matrix shaped as ``x``."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[1], device=x.device)
    return (columns - rows == k).to(dtype or x.dtype)


def compress(x: torch.Tensor, condition: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The entries along ``axis`` (of the flattened tensor without one) where ``condition`` is true."""
    places = torch.nonzero(condition.reshape(-1)).reshape(-1)
    return x.reshape(-1).index_select(0, places) if axis is None else x.index_select(axis, places)


def reverse_sequence(x: torch.Tensor, lengths: torch.Tensor, batch_axis: int, time_axis: int) -> torch.Tensor:
    """The first ``lengths[b]`` steps of each batch item backwards, the rest as it is."""
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(moved.shape[1], device=x.device)
    ends = lengths.to(torch.int64).reshape(-1, 1)
    order = torch.where(steps < ends, ends - 1 - steps, steps)
    batch = torch.arange(moved.shape[0], device=x.device).unsqueeze(1)
    return moved[batch, order].movedim((0, 1), (batch_axis, time_axis))


def unique(
    x: torch.Tensor, axis: int | None, in_order: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct entries (or slices along ``axis``), where each is first, which each entry is, how many there are."""
    if axis is None:
        values, inverse, counts = torch.unique(
            x.reshape(-1), sorted=True, return_inverse=True, return_counts=True
        )
        along = 0
    else:
        values, inverse, counts = torch.unique(
            x, sorted=True, return_inverse=True, return_counts=True, dim=axis
        )
        along = axis
    inverse = inverse.reshape(-1)
    places = torch.arange(len(inverse), device=x.device)
    first = torch.full_like(counts, len(inverse)).scatter_reduce(0, inverse, places, "amin")
    if in_order:
        order = torch.argsort(first)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        return values.index_select(along, order), first[order], rank[inverse], counts[order]
    return values, first, inverse, counts


def center_crop_pad(x: torch.Tensor, sizes: Sequence[int], axes: Sequence[int]) -> torch.Tensor:
    """Crop or zero-pad the middle of ``axes`` to ``sizes``; the odd entry is at the end."""
    for axis, wanted in zip(axes, sizes, strict=True):
        axis, have = axis % x.ndim, x.shape[axis]
        if wanted < have:
            x = x.narrow(axis, (have - wanted) // 2, wanted)
        elif wanted > have:
            before = (wanted - have) // 2
            x = pad(x, [before], [wanted - have - before], [axis], "constant", 0)
    return x


def pad(
    x: torch.Tensor,
    before: Sequence[int],
    after: Sequence[int],
    axes: Sequence[int],
    mode: str,
    value: Any = 0,
) -> torch.Tensor:
    """ONNX Pad; negative amounts cut off. Modes other than constant take their entries by index.

    Args:
        mode: ``constant``, ``edge``, ``reflect`` (any amount: it goes back and forth) or ``wrap``.
        value: of the constant, a number or a tensor of one.
    """
    amounts = {axis % x.ndim: (b, a) for axis, b, a in zip(axes, before, after, strict=True)}
    if mode == "constant":
        flat = [amount for axis in range(x.ndim - 1, -1, -1) for amount in amounts.get(axis, (0, 0))]
        if isinstance(value, torch.Tensor):
            if x.dtype == torch.bool:
                return F.pad(x ^ value, flat, value=0) ^ value
            # A constant that is computed: pad zeros, and put it where ones were not.
            inside = F.pad(torch.ones(x.shape, dtype=torch.bool, device=x.device), flat)
            return torch.where(inside, F.pad(x, flat), value.reshape(()).to(x.dtype))
        return F.pad(x, flat, value=value)
    for axis, (start, end) in amounts.items():
        if start == 0 and end == 0:
            continue
        # A negative amount crops first, and only what is left is repeated.
        if start < 0 or end < 0:
            cut = max(-start, 0)
            x = x.narrow(axis, cut, x.shape[axis] - cut - max(-end, 0))
            start, end = max(start, 0), max(end, 0)
        size = x.shape[axis]
        places = torch.arange(-start, size + end, device=x.device)
        if mode == "edge":
            places = places.clamp(0, size - 1)
        elif mode == "wrap":
            places = places % size
        elif size == 1:
            places = torch.zeros_like(places)
        else:
            folded = places % (2 * size - 2)
            places = torch.where(folded < size, folded, 2 * size - 2 - folded)
        x = x.index_select(axis, places)
    return x


def pad_by_list(
    x: torch.Tensor, pads: Sequence[int], axes: Sequence[int], mode: str, value: Any = 0
) -> torch.Tensor:
    """:func:`pad` with all befores and then all afters in one list."""
    return pad(x, pads[: len(axes)], pads[len(axes) :], axes, mode, value)


def depth_to_space(x: torch.Tensor, block: int) -> torch.Tensor:
    """Channels to blocks of pixels, ``[N, C, H, W] -> [N, C/b², H·b, W·b]``; the block's place comes first (DCR)."""
    n, c, h, w = x.shape
    parts = x.reshape(n, block, block, c // (block * block), h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // (block * block), h * block, w * block)


def space_to_depth(x: torch.Tensor, block: int) -> torch.Tensor:
    """Blocks of pixels to channels, ``[N, C, H, W] -> [N, C·b², H/b, W/b]``; the block's place comes first (DCR)."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block * block, h // block, w // block)


def non_max_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    limit: int,
    iou_threshold: float,
    score_threshold: float | None,
    center_point_box: bool,
) -> torch.Tensor:
    """ONNX NonMaxSuppression, box by box.

    Args:
        boxes: ``[N, B, 4]``, as (y1, x1, y2, x2) with corners in any order or as (x, y, width, height)
            about the centre.
        scores: ``[N, classes, B]``.
        limit: at most so many boxes per batch item and class.

    Returns:
        ``[selected, 3]``: batch item, class, box, in order of falling scores within a class.
    """
    if center_point_box:
        half = boxes[..., 2:] / 2
        low, high = boxes[..., :2] - half, boxes[..., :2] + half
    else:
        low = torch.minimum(boxes[..., :2], boxes[..., 2:])
        high = torch.maximum(boxes[..., :2], boxes[..., 2:])
    area = (high - low).prod(-1)
    selected: list[list[int]] = []
    for n in range(boxes.shape[0]):
        inner_low = torch.maximum(low[n, :, None], low[n, None])
        inner_high = torch.minimum(high[n, :, None], high[n, None])
        common = (inner_high - inner_low).clamp(min=0).prod(-1)
        union = area[n, :, None] + area[n, None] - common
        overlaps = ((common > iou_threshold * union) & (common > 0)).cpu()
        for kind in range(scores.shape[1]):
            found = scores[n, kind]
            order = torch.sort(found, descending=True, stable=True).indices
            if score_threshold is not None:
                order = order[found[order] > score_threshold]
            kept: list[int] = []
            alive = torch.ones(boxes.shape[1], dtype=torch.bool)
            for box in order.tolist():
                if len(kept) >= limit:
                    break
                if alive[box]:
                    kept.append(box)
                    alive &= ~overlaps[box]
            selected.extend([n, kind, box] for box in kept)
    return torch.tensor(selected, dtype=torch.int64, device=boxes.device).reshape(-1, 3)

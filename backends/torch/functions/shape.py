"""Sizes to tensors and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def from_sizes(
    anchor: Tensor, items: Sequence[int | float | bool], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A tensor of the given shape with these numbers, on the device of ``anchor``."""
    if not items:
        return torch.empty(list(shape), dtype=dtype, device=anchor.device)
    parts = [torch.scalar_tensor(item, dtype=dtype, device=anchor.device) for item in items]
    return torch.stack(parts).reshape(list(shape))


def to_ints(tensor: Tensor) -> list[int]:
    """The integers in a tensor, as a flat list."""
    found: list[int] = tensor.reshape(-1).tolist()
    return found


def truncated_division(a: int, b: int) -> int:
    """Integer division towards zero, as ONNX divides."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def truth(a: int) -> bool:
    return a != 0


def both(a: bool, b: bool) -> bool:
    return a and b


def either(a: bool, b: bool) -> bool:
    return a or b


def larger(a: int, b: int) -> int:
    return torch.sym_max(a, b)  # type: ignore[no-any-return, no-untyped-call]


def smaller(a: int, b: int) -> int:
    return torch.sym_min(a, b)  # type: ignore[no-any-return, no-untyped-call]


def choose(condition: bool, a: int, b: int) -> int:
    return a if condition else b


def shape_of(x: Tensor, start: int, end: int | None) -> Tensor:
    """ONNX Shape of a tensor whose rank is not known beforehand."""
    dims = list(x.shape)[start:end]
    return from_sizes(x, dims, [len(dims)], torch.int64)


def size_of(x: Tensor) -> Tensor:
    return from_sizes(x, [x.numel()], [], torch.int64)


def reshape(x: Tensor, shape: Sequence[int], allow_zero: bool) -> Tensor:
    """ONNX Reshape: 0 copies the input's dimension unless it is allowed to mean itself."""
    if not allow_zero:
        shape = [x.size(i) if dim == 0 else dim for i, dim in enumerate(shape)]
    return x.reshape(list(shape))


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    """ONNX Expand, which broadcasts both ways: a 1 in ``shape`` keeps the input's dimension."""
    rank = max(x.ndim, len(shape))
    wanted = [1] * (rank - len(shape)) + list(shape)
    have = [1] * (rank - x.ndim) + list(x.shape)
    return x.expand([want if dim == 1 else dim for want, dim in zip(wanted, have, strict=True)])


def slice_along(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """One axis of ONNX Slice; steps may be negative."""
    length = x.size(axis)
    if step < 0:
        start = min(start if start >= 0 else start + length, length - 1)
        end = max(end if end >= 0 else end + length, -1)
        x = torch.flip(x, [axis])
        start, end, step = length - 1 - start, length - 1 - end, -step
    at = [slice(None)] * x.ndim
    at[axis] = slice(start, end, step)
    return x[tuple(at)]


def slices(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None,
    steps: Sequence[int] | None,
) -> Tensor:
    """ONNX Slice."""
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        x = slice_along(x, i if axes is None else axes[i], start, end, 1 if steps is None else steps[i])
    return x


def split_evenly(x: Tensor, parts: int, axis: int) -> tuple[Tensor, ...]:
    """ONNX Split without sizes: equal parts, the last one smaller where it does not come out even."""
    length = x.size(axis)
    part = -(-length // parts)
    return torch.split(x, [part] * (parts - 1) + [length - part * (parts - 1)], axis)


def unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    """ONNX Unsqueeze: axes of the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = torch.unsqueeze(x, axis)
    return x


def flatten(x: Tensor, axis: int) -> Tensor:
    """ONNX Flatten: two axes, split before ``axis``."""
    rows = 1
    for dim in x.shape[: axis if axis >= 0 else axis + x.ndim]:
        rows = rows * dim
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, x.numel() // max(rows, 1))


def reverse_axes(x: Tensor) -> Tensor:
    return x.permute(list(range(x.ndim))[::-1])


def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """ONNX Range over bounds that are computed."""
    wide = torch.float64 if start.dtype.is_floating_point else torch.int64
    span = (limit.to(wide) - start.to(wide)) / delta.to(wide)
    count = max(int(torch.ceil(span).item()), 0)
    return start + torch.arange(count, device=start.device).to(start.dtype) * delta

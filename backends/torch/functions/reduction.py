"""Reductions, softmax and running sums as ONNX means them. ``axes`` None or empty means all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Axes = Sequence[int] | None


def _all(x: Tensor, axes: Axes) -> list[int]:
    return list(axes) if axes else list(range(x.ndim))


def total(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    dims = _all(x, axes)
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype) if dims else x


def mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """Integers divide towards zero."""
    dims = _all(x, axes)
    if not dims:
        return x
    if x.dtype.is_floating_point:
        return torch.mean(x, dims, keepdim=keep)
    count = 1
    for dim in dims:
        count = count * x.size(dim)
    return torch.div(total(x, axes, keep), count, rounding_mode="trunc")


def largest(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _extremum(x, axes, keep, torch.amax, low=True)


def smallest(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _extremum(x, axes, keep, torch.amin, low=False)


def _extremum(x: Tensor, axes: Axes, keep: bool, function: Callable[..., Tensor], low: bool) -> Tensor:
    dims = _all(x, axes)
    if not dims:
        return x
    if any(x.size(dim) == 0 for dim in dims):
        gone = {dim % x.ndim for dim in dims}
        shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keep or i not in gone]
        if x.dtype.is_floating_point:
            return torch.full(shape, float("-inf" if low else "inf"), dtype=x.dtype, device=x.device)
        if x.dtype == torch.bool:
            return torch.full(shape, not low, dtype=x.dtype, device=x.device)
        limits = torch.iinfo(x.dtype)
        return torch.full(shape, limits.min if low else limits.max, dtype=x.dtype, device=x.device)
    return function(x, dims, keepdim=keep)


def product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for dim in sorted((axis % x.ndim for axis in _all(x, axes)), reverse=True):
        x = torch.prod(x, dim, keepdim=keep, dtype=x.dtype)
    return x


def norm1(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return total(torch.abs(x), axes, keep)


def norm2(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    dims = _all(x, axes)
    if not x.dtype.is_floating_point:
        return torch.sqrt(total(x * x, axes, keep).to(torch.float64)).to(x.dtype)
    return torch.linalg.vector_norm(x, 2, dims, keepdim=keep) if dims else torch.abs(x)


def log_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return torch.log(total(x, axes, keep))


def log_sum_exp(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if not x.dtype.is_floating_point:
        return torch.logsumexp(x.to(torch.float64), _all(x, axes), keepdim=keep).to(x.dtype)
    dims = _all(x, axes)
    return torch.logsumexp(x, dims, keepdim=keep) if dims else x


def sum_square(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return total(x * x, axes, keep)


def arg_extremum(x: Tensor, axis: int, keep: bool, largest_one: bool, last: bool) -> Tensor:
    """ONNX ArgMax and ArgMin; ``last`` takes the last of equal ones."""
    function = torch.argmax if largest_one else torch.argmin
    if not last:
        return function(x, axis, keepdim=keep)
    return x.size(axis) - 1 - function(torch.flip(x, [axis]), axis, keepdim=keep)


def running(x: Tensor, axis: int, exclusive: bool, backwards: bool, multiply: bool) -> Tensor:
    """ONNX CumSum and CumProd."""
    if backwards:
        x = torch.flip(x, [axis])
    function = torch.cumprod if multiply else torch.cumsum
    result = function(x, axis, dtype=x.dtype)
    if exclusive:
        first = torch.full_like(x.narrow(axis, 0, 1), 1 if multiply else 0)
        result = torch.cat([first, result.narrow(axis, 0, x.size(axis) - 1)], axis)
    return torch.flip(result, [axis]) if backwards else result


def hardmax(x: Tensor, axis: int) -> Tensor:
    places = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, places, 1.0)


def flat_softmax(x: Tensor, axis: int) -> Tensor:
    """ONNX Softmax before opset 13: over everything from ``axis`` on."""
    return _flat(F.softmax, x, axis)


def flat_log_softmax(x: Tensor, axis: int) -> Tensor:
    """ONNX LogSoftmax before opset 13."""
    return _flat(F.log_softmax, x, axis)


def flat_hardmax(x: Tensor, axis: int) -> Tensor:
    """ONNX Hardmax before opset 13."""
    return _flat(hardmax, x, axis)


def _flat(function: Callable[..., Tensor], x: Tensor, axis: int) -> Tensor:
    axis = axis if axis >= 0 else axis + x.ndim
    return function(torch.flatten(x, axis), axis).reshape(x.shape)

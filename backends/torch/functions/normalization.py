"""Normalizations as ONNX means them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor, stash: bool) -> Tensor:
    """In float32 where ONNX computes there (``stash_type`` 1)."""
    return x.to(torch.float32) if stash and x.dtype in (torch.float16, torch.bfloat16) else x


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float, stash: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX LayerNormalization with all its outputs: the result, the mean, one over the deviation."""
    wide = _wide(x, stash)
    dims = list(range(axis % x.ndim, x.ndim))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + epsilon)
    result = (centred * inverse).to(x.dtype) * scale
    return result if bias is None else result + bias, mean, inverse


def layer_norm_only(
    x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float, stash: bool
) -> Tensor:
    return layer_norm(x, scale, bias, axis, epsilon, stash)[0]


def rms_norm(x: Tensor, scale: Tensor, axis: int, epsilon: float, stash: bool) -> Tensor:
    """ONNX RMSNormalization."""
    wide = _wide(x, stash)
    dims = list(range(axis % x.ndim, x.ndim))
    inverse = torch.rsqrt((wide * wide).mean(dims, keepdim=True) + epsilon)
    return (wide * inverse).to(scale.dtype) * scale


def group_norm(
    x: Tensor, groups: int, scale: Tensor, bias: Tensor, epsilon: float, per_group: bool, stash: bool
) -> Tensor:
    """ONNX GroupNormalization; before opset 21 scale and bias are per group."""
    if per_group:
        repeats = x.size(1) // groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    wide = _wide(x, stash)
    result = torch.group_norm(wide, groups, scale.to(wide.dtype), bias.to(wide.dtype), epsilon)
    return result.to(x.dtype)


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """ONNX InstanceNormalization; ``F.instance_norm`` refuses a single pixel."""
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, False)


def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    """ONNX BatchNormalization with statistics that are computed, or of another type than the input."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    wide = x.to(mean.dtype)
    factor = (scale.to(mean.dtype) * torch.rsqrt(variance + epsilon)).reshape(shape)
    return ((wide - mean.reshape(shape)) * factor + bias.to(mean.dtype).reshape(shape)).to(x.dtype)


def batch_norm_training(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX BatchNormalization with ``training_mode``: the batch's statistics, and the new running ones."""
    dims = [0, *range(2, x.ndim)]
    wide = x.to(mean.dtype)
    batch_mean = wide.mean(dims)
    batch_variance = wide.var(dims, correction=0)
    result = batch_norm(x, scale, bias, batch_mean, batch_variance, epsilon)
    kept = 1 - momentum
    return result, mean * momentum + batch_mean * kept, variance * momentum + batch_variance * kept


def mean_variance(x: Tensor, axes: list[int]) -> Tensor:
    """ONNX MeanVarianceNormalization."""
    mean = x.mean(axes, keepdim=True)
    deviation = torch.sqrt((x * x).mean(axes, keepdim=True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


def lp_norm(x: Tensor, axis: int, p: int) -> Tensor:
    """ONNX LpNormalization: a vector of zeros stays one."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    zero = norm == 0
    return torch.where(zero, torch.zeros_like(x), x / torch.where(zero, torch.ones_like(norm), norm))


def skip_norm(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    simplified: bool,
) -> tuple[Tensor, Tensor]:
    """``com.microsoft`` Skip(Simplified)LayerNormalization: the result, and what was normalized."""
    total = x + skip
    if bias is not None:
        total = total + bias
    shape = [x.size(-1)]
    if simplified:
        return F.rms_norm(total, shape, scale, epsilon), total
    return F.layer_norm(total, shape, scale, beta, epsilon), total

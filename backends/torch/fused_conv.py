"""A convolution and the frozen batch norm after it as one differentiable function that keeps only its input.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond" (arXiv 2305.11624), tune mode. With
``r = 1/sqrt(var + eps)`` and ``a = gamma * r`` the function is a convolution by ``w' = a * w`` and
``b' = beta + a * (b - mean)``; with ``G`` and ``g`` the gradients of ``w'`` and ``b'``, the gradients are
``dw = a * G``, ``db = a * g``, ``dbeta = g``, ``dgamma = r * (<w, G> + (b - mean) * g)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The arithmetic is a batch norm of the weight: with mean and shift of zero it scales its channels, and the
# bias's norm is the fused bias. So torch's own kernels do each in one pass over the weight, forward and
# backward; written in single operators it took longer than the norm of the feature map that it replaces.
_norm: Any = torch.native_batch_norm
_convolution: Any = torch.convolution
_norm_backward: Any = torch.ops.aten.native_batch_norm_backward.default
_convolution_backward: Any = torch.ops.aten.convolution_backward.default


SMALL = 4
"""A weight this many times smaller than the convolution's output is kept in its fused form: that takes at
most a quarter of what is saved, and spares the calls that compute it again."""


class Geometry(NamedTuple):
    """How a convolution slides, in the order torch's convolution takes it; one number per spatial axis."""

    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    transposed: bool = False
    output_padding: Sequence[int] = ()
    groups: int = 1


class Pair(NamedTuple):
    """The parameters of a convolution and its norm, ``[C_o]`` each but the weight.

    Attributes:
        weight: ``[C_o, C_i/G, k…]``, transposed ``[C_i, C_o/G, k…]``: then group ``p`` owns the rows
            ``p * C_i/G …`` and the output channels ``p * C_o/G …``.
        bias: of the convolution, or None.
        gamma, beta: of the norm, or None for ones and zeros.
        mean, variance: running statistics.
        epsilon: added to the variance.
    """

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    epsilon: float


def fused_conv(x: Tensor, pair: Pair, geometry: Geometry) -> Tensor:
    """Convolution and frozen batch norm of ``x`` ``[N, C_i, …]``; under autocast in its type.

    Keeps ``x`` and the parameters for the backward pass and not the convolution's output; ``w'`` only where
    it is small beside that output, else it is computed again.
    """
    kind, dtype = x.device.type, pair.weight.dtype
    # Autocast lets doubles be.
    autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, dtype)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
    result: Tensor
    forward_mode = forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_mode:
        # They decide themselves what to keep and what to compute again, or go forward only.
        result = _convolution(x, *fused_parameters(pair, geometry, dtype), *geometry)
        return result
    call: Any = _keeping_weight if _weight_is_small(x, pair, geometry) else _FusedConv.apply
    if autocast:
        with torch.autocast(kind, enabled=False):
            result = call(x, *pair, geometry, dtype)
    else:
        result = call(x, *pair, geometry, dtype)
    return result


def _weight_is_small(x: Tensor, pair: Pair, geometry: Geometry) -> bool:
    outputs = x.numel() // max(1, x.shape[1]) * pair.mean.shape[0]
    step = math.prod(geometry.stride)
    outputs = outputs * step if geometry.transposed else outputs // step
    return pair.weight.numel() * SMALL <= outputs


def _keeping_weight(x: Tensor, *args: Any) -> Tensor:
    """As :class:`_FusedConv`, by torch's own derivatives: less work, and ``w'`` is kept."""
    *parameters, geometry, dtype = args
    pair = _wide(Pair(*parameters))
    shift, fused = _fused_bias(pair), _fused_weight(pair, geometry)
    if fused.dtype is not dtype:
        fused, shift = fused.to(dtype), shift.to(dtype)
    result: Tensor = _convolution(x, fused, shift, *geometry)
    return result


def fused_parameters(pair: Pair, geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``w'`` and ``b'``, computed in float32 at least and cast to ``dtype`` at the end."""
    weight, bias, gamma, beta, mean, variance, epsilon = _wide(pair)
    deviation = (variance + epsilon).sqrt()
    scale = deviation.reciprocal() if gamma is None else gamma / deviation
    shift = -mean if bias is None else bias - mean
    shift = scale * shift if beta is None else beta + scale * shift
    factor, ones = scale, [1] * (weight.dim() - 2)
    if not geometry.transposed:
        factor = scale.reshape(-1, 1, *ones)
    else:
        groups, rows = geometry.groups, weight.shape[0] // geometry.groups
        factor = scale.reshape(groups, 1, -1).expand(groups, rows, -1).reshape(*weight.shape[:2], *ones)
    return (weight * factor).to(dtype), shift.to(dtype)


def _wide(pair: Pair) -> Pair:
    """The pair in one type: float32, or float64 where the weight is."""
    wide = torch.promote_types(pair.weight.dtype, torch.float32)
    if all(tensor is None or tensor.dtype is wide for tensor in pair[:6]):
        return pair  # A cast that does nothing costs as much as one of a short vector.
    weight, bias, gamma, beta, mean, variance = (None if t is None else t.to(wide) for t in pair[:6])
    made: Any = (weight, bias, gamma, beta, mean, variance, pair.epsilon)
    return Pair(*made)


def _flat(weight: Tensor, geometry: Geometry) -> Tensor:
    """A convolution's weight as ``[rows, C_o, taps]``, a view wherever its memory allows."""
    if not geometry.transposed:
        if _channels_last(weight):
            weight = weight.permute(0, 2, 3, 1)
        return weight.reshape(1, weight.shape[0], -1)
    if geometry.groups == 1:
        return weight.flatten(2)
    rows, columns = weight.shape[0] // geometry.groups, weight.shape[1]
    grouped = weight.reshape(geometry.groups, rows, columns, -1).transpose(0, 1)
    return grouped.reshape(rows, geometry.groups * columns, -1)


def _unflat(flat: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of :func:`_flat`, in the shape and memory format of ``like``."""
    if geometry.transposed and geometry.groups > 1:
        rows, columns = like.shape[0] // geometry.groups, like.shape[1]
        flat = flat.reshape(rows, geometry.groups, columns, -1).transpose(0, 1)
    elif not geometry.transposed and _channels_last(like):
        out, into, *taps = like.shape
        return flat.reshape(out, *taps, into).permute(0, 3, 1, 2)
    return flat.reshape(like.shape)


def _channels_last(weight: Tensor) -> bool:
    last = torch.channels_last
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=last)


def _fused_weight(pair: Pair, geometry: Geometry) -> Tensor:
    """``w'``; ``pair`` is of one type."""
    flat, zeros = _flat(pair.weight, geometry), torch.zeros_like(pair.mean)
    made = _norm(flat, pair.gamma, None, zeros, pair.variance, False, 0.0, pair.epsilon)
    return _unflat(made[0], pair.weight, geometry)


def _bias_row(pair: Pair) -> Tensor:
    return (torch.zeros_like(pair.mean) if pair.bias is None else pair.bias).unsqueeze(0)


def _fused_bias(pair: Pair) -> Tensor:
    """``b'``; ``pair`` is of one type."""
    row, mean, variance = _bias_row(pair), pair.mean, pair.variance
    made: Tensor = _norm(row, pair.gamma, pair.beta, mean, variance, False, 0.0, pair.epsilon)[0]
    return made.squeeze(0)


class _FusedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        # A setup_context of its own would have torch read this signature on every call.
        *parameters, ctx.geometry, ctx.dtype = args
        given = Pair(*parameters)
        weight, bias, gamma, _, mean, variance, ctx.epsilon = given
        # The input is needed for the gradients of weight and gamma alone.
        keep_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if keep_x else None, weight, bias, gamma, mean, variance)
        ctx.input_shape = x.shape
        pair = _wide(given)
        shift, fused = _fused_bias(pair), _fused_weight(pair, ctx.geometry)
        if fused.dtype is not ctx.dtype:
            fused, shift = fused.to(ctx.dtype), shift.to(ctx.dtype)
        result: Tensor = _convolution(x, fused, shift, *ctx.geometry)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, bias, gamma, mean, variance = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        given = Pair(weight, bias, gamma, None, mean, variance, ctx.epsilon)
        pair = _wide(given)
        to_x, to_weight, to_bias, to_gamma, to_beta = ctx.needs_input_grad[:5]
        by_weight, by_shift = to_weight or to_gamma, to_bias or to_beta or to_gamma
        if x is None:  # Without gradients of the weight nothing reads the input's values: its shape does.
            x = grad.new_empty(1).expand(ctx.input_shape)
        fused = _fused_weight(pair, geometry) if to_x else weight
        if fused.dtype is not ctx.dtype:
            fused = fused.to(ctx.dtype)
        grad_x, grad_fused, grad_shift = _convolution_backward(
            grad, x, fused, [mean.shape[0]], *geometry, [to_x, by_weight, by_shift]
        )
        grad_weight = grad_bias = grad_gamma = None
        grad_beta: Any = None
        frozen = (pair.gamma, None, pair.variance, None, None, False, pair.epsilon)
        if by_weight:
            flat, wide = _flat(pair.weight, geometry), _flat(grad_fused.to(pair.weight.dtype), geometry)
            made = _scaled_gradients(wide, flat, torch.zeros_like(pair.mean), frozen, to_weight, to_gamma)
            grad_weight = None if made[0] is None else _unflat(made[0], pair.weight, geometry)
            grad_gamma = made[1]
        if by_shift:
            grad_beta = grad_shift.to(pair.weight.dtype)
        if to_bias or to_gamma:
            made = _scaled_gradients(
                grad_beta.unsqueeze(0), _bias_row(pair), pair.mean, frozen, to_bias, to_gamma
            )
            grad_bias = None if made[0] is None else made[0].squeeze(0)
            grad_gamma = None if made[1] is None or grad_gamma is None else grad_gamma + made[1]
        found: tuple[Any, ...] = (grad_x, grad_weight, grad_bias, grad_gamma, grad_beta if to_beta else None)
        if pair is not given:
            kinds = (ctx.dtype, *(None if t is None else t.dtype for t in (weight, bias, gamma, gamma)))
            # What has no gamma has no beta, and both are of one type.
            found = tuple(g if g is None or k is None else g.to(k) for g, k in zip(found, kinds, strict=True))
        return (*found, None, None, None, None, None)


def _scaled_gradients(
    grad: Tensor, value: Tensor, mean: Tensor, frozen: tuple[Any, ...], to_value: bool, to_gamma: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``value`` and gamma from that of their frozen norm."""
    gamma, _, *rest = frozen
    made = _norm_backward(grad, value, gamma, mean, *rest, [to_value, to_gamma, False])
    return made[0] if to_value else None, made[1] if to_gamma else None

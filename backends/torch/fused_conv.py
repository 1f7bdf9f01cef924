"""A convolution and the frozen batch norm after it as one differentiable function that keeps only its input.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond" (arXiv 2305.11624), tune mode. With
``r = 1/sqrt(var + eps)`` and ``a = gamma * r`` the function is a convolution by ``w' = a * w`` and
``b' = beta + a * (b - mean)``; with ``G`` and ``g`` the gradients of ``w'`` and ``b'``, the gradients are
``dw = a * G``, ``db = a * g``, ``dbeta = g``, ``dgamma = r * (<w, G> + (b - mean) * g)``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

# torch._C names the overloads at run time, so that their types are not known to a type checker.
_convolution: Any = torch.ops.aten.convolution.default
_convolution_backward: Any = torch.ops.aten.convolution_backward.default


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a convolution slides; one number per spatial axis in each list."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order torch's convolution takes them."""
        return (
            list(self.stride), list(self.padding), list(self.dilation),
            self.transposed, list(self.output_padding), self.groups,
        )  # fmt: skip


def by_channel(vector: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """One value per output channel, shaped to multiply a convolution's weight.

    A transposed convolution's weight is ``[C_i, C_o/G, k…]``: group ``p`` owns the rows
    ``p * C_i/G …`` and the output channels ``p * C_o/G …``.
    """
    ones = [1] * (weight.dim() - 2)
    if not transposed:
        return vector.reshape(-1, 1, *ones)
    if groups == 1:
        return vector.reshape(1, -1, *ones)
    rows = weight.shape[0] // groups
    return vector.reshape(groups, 1, -1).expand(groups, rows, -1).reshape(weight.shape[0], -1, *ones)


def per_channel(product: Tensor, transposed: bool, groups: int) -> Tensor:
    """The adjoint of :func:`by_channel`: sums a tensor of the weight's shape per output channel."""
    if not transposed:
        return product.flatten(1).sum(1)
    rows, columns = product.shape[0] // groups, product.shape[1]
    return product.reshape(groups, rows, columns, -1).sum((1, 3)).reshape(-1)


def fused_parameters(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    transposed: bool,
    groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``w'`` and ``b'``, computed in float32 at least and cast to ``dtype`` at the end."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    deviation = (variance.to(wide) + epsilon).sqrt()
    scale = deviation.reciprocal() if gamma is None else gamma.to(wide) / deviation
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    shift = scale * shift if beta is None else beta.to(wide) + scale * shift
    fused = weight.to(wide) * by_channel(scale, weight, transposed, groups)
    return fused.to(dtype), shift.to(dtype)


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    geometry: Geometry,
) -> Tensor:
    """Convolution and frozen batch norm of ``x`` ``[N, C_i, …]``; under autocast in its type.

    Keeps ``x`` and the parameters for the backward pass, neither the convolution's output nor ``w'``.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if dtype != weight.dtype:
        x = x.to(dtype)
    if torch.compiler.is_compiling():
        # A compiler decides itself what to keep and what to compute again.
        made = fused_parameters(
            weight, bias, gamma, beta, mean, variance, epsilon, geometry.transposed, geometry.groups, dtype
        )
        result: Tensor = _convolution(x, *made, *geometry.arguments)
        return result
    with torch.autocast(kind, enabled=False):
        call: Any = _FusedConv.apply
        output: Tensor = call(x, weight, bias, gamma, beta, mean, variance, epsilon, geometry, dtype)
        return output


class _FusedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
        mean: Tensor, variance: Tensor, epsilon: float, geometry: Geometry, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        made = fused_parameters(
            weight, bias, gamma, beta, mean, variance, epsilon, geometry.transposed, geometry.groups, dtype
        )
        result: Tensor = _convolution(x, *made, *geometry.arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, gamma, _, mean, variance, ctx.epsilon, ctx.geometry, ctx.dtype = inputs
        # The input is needed for the gradients of weight and scale alone.
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, weight, bias, gamma, mean, variance)
        ctx.input_shape = x.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, bias, gamma, mean, variance = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        transposed, groups = geometry.transposed, geometry.groups
        to_x, to_weight, to_bias, to_gamma, to_beta = ctx.needs_input_grad[:5]
        wide = torch.promote_types(weight.dtype, torch.float32)
        inverse = (variance.to(wide) + ctx.epsilon).sqrt().reciprocal()
        scale = inverse if gamma is None else gamma.to(wide) * inverse
        factor = by_channel(scale, weight, transposed, groups)
        by_weight, by_shift = to_weight or to_gamma, to_bias or to_beta or to_gamma
        # Without gradients of the weight nothing reads the input's values, only its shape.
        given = grad.new_empty(1).expand(ctx.input_shape) if x is None else x
        fused = (weight.to(wide) * factor).to(ctx.dtype)
        grad_x, grad_fused, grad_shift = _convolution_backward(
            grad, given, fused, [scale.shape[0]], *geometry.arguments, [to_x, by_weight, by_shift]
        )
        grad_weight = grad_bias = grad_gamma = grad_beta = None
        if by_weight:
            grad_fused = grad_fused.to(wide)
        if by_shift:
            grad_shift = grad_shift.to(wide)
        if to_gamma:
            moved = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
            inner = per_channel(weight.to(wide) * grad_fused, transposed, groups)
            grad_gamma = (inverse * (inner + moved * grad_shift)).to(gamma.dtype)
        if to_weight:
            grad_weight = (grad_fused * factor).to(weight.dtype)
        if to_bias:
            grad_bias = (scale * grad_shift).to(bias.dtype)
        if to_beta:
            grad_beta = grad_shift
        return grad_x, grad_weight, grad_bias, grad_gamma, grad_beta, None, None, None, None, None

"""BDWP: another mask forwards than backwards, each along the dimension its product sums over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from effic.backends.torch.sparse_training.masks import nm_mask
from effic.backends.torch.sparse_training.parametrization import Mask
from effic.backends.torch.sparse_training.recipes import Recipe
from effic.backends.torch.sparse_training.weights import Weight
from effic.ir.sparsity import Pattern


@dataclasses.dataclass(frozen=True)
class BDWP(Recipe):
    """Bidirectional weight pruning (arXiv 2309.13015): both products with the weight are sparse.

    Forwards the layer computes with W_F, whose groups run along its input channels; the gradient of its
    input is computed with W_B, whose groups run along its output channels; the gradient of the weight is
    dense and goes to the dense weight. The gradient of the input is therefore not that of the forward.
    What is baked in the end is W_F. Two thirds of the multiplications shrink to N/M.

    Attributes:
        n: weights kept of a group.
        m: weights in a group.
        decay: SR-STE's pull on weights pruned forwards; whether the paper has it could not be verified.
    """

    m: int = 8
    decay: float = 0.0

    def mask(self, weight: Weight, pattern: Pattern) -> Mask:
        return TwoWayMask(pattern, weight.layout, decay=self.decay)

    def why_not(self, weight: Weight, pattern: Pattern) -> str | None:
        if not weight.plain:
            return "is read by a call whose gradient cannot be given a mask of its own"
        outputs = weight.layout.turned.length(weight.tensor)
        if outputs < pattern.m:
            return f"has {outputs} output channels, fewer than a group of {pattern}"
        return None


class TwoWayMask(Mask):
    """Hands the layer W_F, with W_B along for the backward pass."""

    def backward_weight(self, weight: Tensor) -> Tensor:
        """W_B: groups along the output channels."""
        weight = weight.detach()
        return torch.where(nm_mask(weight.abs(), self.pattern, self.layout.turned), weight, 0.0)

    def forward(self, weight: Tensor) -> Tensor:
        masked = super().forward(weight)
        return _two_way(masked, self.backward_weight(weight)) if torch.is_grad_enabled() else masked


class TwoWayWeight(Tensor):
    """W_F, which products compute with, and in ``back`` W_B, which gradients of their inputs go through.

    Attributes:
        plain: W_F without W_B.
        back: W_B.
    """

    plain: Tensor
    back: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = [_plain(arg) for arg in args]
        options = {name: _plain(value) for name, value in kwargs.items()}
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if isinstance(weight, TwoWayWeight) and func in _PRODUCTS:
            return _PRODUCTS[func](weight.back, *plain, **options)
        if len(args) > 2 and isinstance(args[2], TwoWayWeight) and func is torch.addmm:
            return plain[0] + _matmul(args[2].back, *plain[1:])
        if func in _TRANSPOSES and isinstance(args[0], TwoWayWeight):
            return _two_way(func(*plain, **options), func(args[0].back, *plain[1:], **options))
        return func(*plain, **options)


def _two_way(weight: Tensor, back: Tensor) -> TwoWayWeight:
    made = weight.as_subclass(TwoWayWeight)
    made.plain, made.back = weight, back
    return made


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, TwoWayWeight) else value


_TRANSPOSES: set[Any] = {
    torch.t, torch.transpose, torch.permute, Tensor.t, Tensor.transpose, Tensor.permute,
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
}  # fmt: skip


def _linear(back: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = cast(Tensor, _Linear.apply(*_as_autocast(x, weight, back)))  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(back: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _linear(back.t(), x, weight.t())


class _Linear(torch.autograd.Function):
    """Y = X W_Fᵀ; dX = dY W_B; dW = dYᵀ X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(x, back)
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, back = ctx.saved_tensors
        return dy @ back, dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]), None


def _convolution(rank: int, transposed: bool) -> Callable[..., Tensor]:
    def convolve(
        back: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        *rest: Any, **named: Any,
    ) -> Tensor:  # fmt: skip
        order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        given = {**dict(zip(order, rest, strict=False)), **named}
        dilation = _each(given.get("dilation", 1), rank)
        if isinstance(padding, str):
            x, padding = _padded(x, padding, weight.shape[2:], dilation)
        single = x.dim() == rank + 1
        x, weight, back = _as_autocast(x.unsqueeze(0) if single else x, weight, back)
        y = cast(Tensor, _Convolution.apply(  # type: ignore[no-untyped-call]
            x, weight, back, None if bias is None else bias.to(x.dtype), _each(stride, rank),
            _each(padding, rank), dilation, transposed, _each(given.get("output_padding", 0), rank),
            given.get("groups", 1),
        ))  # fmt: skip
        return y.squeeze(0) if single else y

    return convolve


class _Convolution(torch.autograd.Function):
    """A convolution, or its transpose, by W_F, with dX by W_B and dense dW."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(x, back)
        ctx.how, ctx.bias_sizes = how, None if bias is None else list(bias.shape)
        return torch.convolution(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        biased = ctx.bias_sizes is not None
        # Of the weight it is given, the gradient of the weight reads the shape alone.
        found = torch.ops.aten.convolution_backward(
            dy, x, back, ctx.bias_sizes, *ctx.how, [ctx.needs_input_grad[0], True, biased]
        )
        return found[0], found[1], None, found[2], *[None] * len(ctx.how)


def _each(value: Any, rank: int) -> list[int]:
    """One number per spatial axis; torch takes a single one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _padded(x: Tensor, how: str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, int]:
    if how == "valid":
        return x, 0
    pads: list[int] = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads), 0


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of them: it does not look into functions with their own backward."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    **{f: _convolution(i + 1, False) for i, f in enumerate((torch.conv1d, torch.conv2d, torch.conv3d))},
    **{
        f: _convolution(i + 1, True)
        for i, f in enumerate((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d))
    },
}

"""Element by element, where ONNX and torch differ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """ONNX Div: integers towards zero."""
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def power(a: Tensor, b: Tensor) -> Tensor:
    """ONNX Pow: the result has the type of the base."""
    result = torch.pow(a, b)
    return result if result.dtype == a.dtype else result.to(a.dtype)


def fold(function: Callable[[Tensor, Tensor], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """A function of two over any number, from the left."""
    return functools.reduce(function, tensors)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors) / len(tensors)


def clip(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """ONNX Clip with bounds that are computed; where they cross, the upper one wins."""
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def shift(a: Tensor, b: Tensor, left: bool) -> Tensor:
    """ONNX BitShift, whose values are unsigned: torch shifts signed ones of twice the width."""
    wide = a.to(torch.int64), b.to(torch.int64)
    if a.dtype == torch.uint64 and not left:
        # The sign bit would be copied on the way right.
        top = torch.bitwise_right_shift(wide[0], 1) & 0x7FFF_FFFF_FFFF_FFFF
        moved = torch.bitwise_right_shift(top, (wide[1] - 1).clamp(min=0))
        return torch.where(wide[1] == 0, wide[0], moved).to(a.dtype)
    moved = torch.bitwise_left_shift(*wide) if left else torch.bitwise_right_shift(*wide)
    bits = torch.iinfo(a.dtype).bits
    return (moved if bits == 64 else moved & ((1 << bits) - 1)).to(a.dtype)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def thresholded(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


def shrink(x: Tensor, bias: float, threshold: float) -> Tensor:
    """ONNX Shrink; integers stay integers."""
    moved = torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, torch.zeros_like(x)))
    return moved.to(x.dtype)


def swish(x: Tensor, alpha: float) -> Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def is_inf(x: Tensor, negative: bool, positive: bool) -> Tensor:
    if negative and positive:
        return torch.isinf(x)
    found = torch.zeros_like(x, dtype=torch.bool)
    if negative:
        found = found | torch.isneginf(x)
    return found | torch.isposinf(x) if positive else found


def sign(x: Tensor) -> Tensor:
    """ONNX Sign: NaN stays NaN."""
    found = torch.sign(x)
    return torch.where(torch.isnan(x), x, found) if x.dtype.is_floating_point else found


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """ONNX PRelu: the slope broadcasts as any second operand does."""
    return torch.where(x >= 0, x, slope * x)


def cast(x: Tensor, dtype: torch.dtype, bits: int = 0) -> Tensor:
    """ONNX Cast.

    Args:
        x: any.
        dtype: the type that holds the result.
        bits: width of a sub-byte integer type, whose values wrap as they do in a wider one; 0 otherwise.
    """
    if x.dtype == dtype and not bits:
        return x
    if dtype == torch.bool:
        return x != 0
    if x.dtype.is_floating_point and dtype in (*_UNSIGNED, torch.uint8, torch.int8, torch.int16):
        x = x.to(torch.int64)
    if bits:
        span = 1 << bits
        wide = torch.remainder(x.to(torch.int64), span)
        x = wide if dtype == torch.uint8 else torch.where(wide >= span // 2, wide - span, wide)
    return x.to(dtype)


def cast_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """ONNX Cast to an 8-bit float: beyond the range the largest value, or without ``saturate`` Inf or NaN."""
    largest = torch.finfo(dtype).max
    wide = x.to(torch.float32)
    result = torch.clamp(wide, -largest, largest).to(dtype)
    infinite = dtype == torch.float8_e5m2
    if not saturate:
        # Half a step beyond the largest still rounds to it.
        step = {torch.float8_e4m3fn: 32, torch.float8_e4m3fnuz: 16}.get(
            dtype, 2.0**14 if infinite else 2.0**13
        )
        over = wide.abs() > largest + step / 2
        beyond = torch.copysign(torch.full_like(wide, float("inf" if infinite else "nan")), wide)
        result = torch.where(over | torch.isinf(wide), beyond, result.to(torch.float32)).to(dtype)
    return torch.where(torch.isnan(wide), wide, result.to(torch.float32)).to(dtype)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    return cast(x, like.dtype)


def dropout(x: Tensor, ratio: Tensor | float, training: Tensor | bool) -> tuple[Tensor, Tensor]:
    """ONNX Dropout: the result and what was kept. Drops only where the model's own flag says so."""
    if not bool(training) or float(ratio) == 0.0:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = torch.rand_like(x) >= ratio
    return torch.where(kept, x / (1 - ratio), torch.zeros_like(x)), kept

"""Codes and numbers: linear quantization, integer products, packed weights.

Integers narrower than a byte are held one per byte. The gradient of rounding is zero, as in the
definition: a model that quantizes its activations passes no gradient through them; one that only
decodes constant weights has gradients of the scales (and of what is multiplied by the weights).
"""

from __future__ import annotations

import torch


def spread(factor: torch.Tensor, shape: torch.Size, axis: int, block: int) -> torch.Tensor:
    """Scales or zero points in a form that broadcasts against a tensor of ``shape``.

    One for all (a scalar or a single entry), one per entry of ``axis``, or one per ``block`` entries of it.
    """
    if block:
        whole = factor.repeat_interleave(block, dim=axis)
        return whole if whole.shape[axis] == shape[axis] else whole.narrow(axis, 0, shape[axis])
    if factor.ndim == 0:
        return factor
    if factor.numel() == 1:
        return factor.reshape(())
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return factor.reshape(view)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *,
    axis: int,
    block: int,
    low: int,
    high: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """clamp(round(x / scale) + zero point, low, high), halves to even."""
    ratio = torch.round(x.to(scale.dtype) / spread(scale, x.shape, axis, block))
    if zero_point is not None:
        ratio = ratio + spread(zero_point, x.shape, axis, block).to(ratio.dtype)
    return ratio.clamp(low, high).to(dtype)


def quantize_float8(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    axis: int,
    block: int,
    dtype: torch.dtype,
    saturate: bool,
) -> torch.Tensor:
    """x / scale as an 8-bit float."""
    return to_float8(x.to(scale.dtype) / spread(scale, x.shape, axis, block), dtype, saturate)


def to_float8(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """Cast to an 8-bit float; what is too large becomes the largest, or NaN (infinity where there is one)."""
    largest = torch.finfo(dtype).max
    if saturate:
        return x.clamp(-largest, largest).to(dtype)
    return x.to(dtype)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *,
    axis: int,
    block: int,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """(codes - zero point) · scale, in the type of the scale or in ``dtype``."""
    numbers = codes.to(scale.dtype)
    if zero_point is not None:
        if codes.is_floating_point() or codes.dtype == torch.int32:
            numbers = numbers - spread(zero_point, codes.shape, axis, block).to(scale.dtype)
        else:
            # Differences of codes can be more than a half-precision scale tells apart: subtract integers.
            offset = spread(zero_point, codes.shape, axis, block).to(torch.int32)
            numbers = (codes.to(torch.int32) - offset).to(scale.dtype)
    result = numbers * spread(scale, codes.shape, axis, block)
    return result if dtype is None else result.to(dtype)


def quantize_dynamically(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DynamicQuantizeLinear: codes (uint8), scale and zero point from the range of ``x`` with zero in it."""
    low = torch.clamp(x.amin(), max=0.0)
    high = torch.clamp(x.amax(), min=0.0)
    scale = (high - low) / 255.0
    # All zeros: any scale will do, and dividing by zero will not.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255))
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def centred(codes: torch.Tensor, zero_point: torch.Tensor | None, axis: int | None = None) -> torch.Tensor:
    """codes - zero point as int64; a vector of zero points runs along ``axis``."""
    wide = codes.to(torch.int64)
    if zero_point is None:
        return wide
    offset = zero_point.to(torch.int64)
    if offset.ndim == 1 and offset.numel() > 1 and axis is not None:
        view = [1] * codes.ndim
        view[axis] = -1
        offset = offset.reshape(view)
    elif offset.numel() == 1:
        offset = offset.reshape(())
    return wide - offset


def multiply_exactly(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of integers, as int64.

    Computed in double precision, in which sums of products of 8-bit numbers are exact on every device.
    """
    return torch.matmul(a.to(torch.float64), b.to(torch.float64)).round().to(torch.int64)


def matmul_integer(
    a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None, b_zero: torch.Tensor | None
) -> torch.Tensor:
    """MatMulInteger; a vector of zero points is one per row of ``a`` or per column of ``b``."""
    return multiply_exactly(centred(a, a_zero, a.ndim - 2), centred(b, b_zero, b.ndim - 1)).to(torch.int32)


def requantize(
    sums: torch.Tensor,
    factor: torch.Tensor,
    zero_point: torch.Tensor,
    low: int,
    high: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """clamp(round(sums · factor) + zero point): from the scale of a product to that of its output."""
    numbers = torch.round(sums.to(factor.dtype) * factor) + zero_point.to(factor.dtype)
    return numbers.clamp(low, high).to(dtype)


def qlinear_matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
    low: int,
    high: int,
) -> torch.Tensor:
    """QLinearMatMul; ``a``'s scale may be one per row, ``b``'s one per column."""
    sums = multiply_exactly(centred(a, a_zero, a.ndim - 2), centred(b, b_zero, b.ndim - 1))
    rows = a_scale.reshape(-1, 1) if a_scale.ndim == 1 and a_scale.numel() > 1 else a_scale
    scale = rows.to(torch.float32) * b_scale.to(torch.float32) / y_scale.to(torch.float32)
    return requantize(sums, scale, y_zero, low, high, y_zero.dtype)


def requantize_channels(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
    low: int,
    high: int,
) -> torch.Tensor:
    """The end of a QLinearConv: the int32 bias, and the codes of the output.

    Args:
        sums: ``[N, M, ...]``, the convolution of the centred codes.
        w_scale: one, or one per output channel.
    """
    rest = [1] * (sums.ndim - 2)
    if bias is not None:
        sums = sums + bias.to(torch.int64).reshape(-1, *rest)
    per_channel = w_scale.reshape(-1, *rest) if w_scale.numel() > 1 else w_scale.reshape(())
    return requantize(sums, x_scale * per_channel / y_scale, y_zero, low, high, y_zero.dtype)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 2, 4 or 8 bits from bytes, the low bits first; the last axis grows by 8 / bits."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)


def decode_blocks(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    *,
    rows: int,
    columns: int,
    bits: int,
    block: int,
) -> torch.Tensor:
    """The weight ``[rows, columns]`` of a MatMulNBits from its blocks along the columns.

    Args:
        packed: ``[rows, blocks, block·bits/8]`` bytes.
        scales: one per row and block, in any shape.
        zero_points: packed codes ``[rows, ceil(blocks·bits/8)]``, or floats one per row and block; half of
            the range of codes when None.
    """
    blocks = -(-columns // block)
    codes = unpack(packed.reshape(rows, -1), bits).reshape(rows, blocks, block)
    factor = scales.reshape(rows, blocks, 1)
    if zero_points is None:
        middle = float(1 << (bits - 1))
        centred_codes = codes.to(factor.dtype) - middle
    elif zero_points.is_floating_point():
        centred_codes = codes.to(factor.dtype) - zero_points.reshape(rows, blocks, 1)
    else:
        offsets = unpack(zero_points.reshape(rows, -1), bits)[:, :blocks].unsqueeze(-1)
        centred_codes = (codes.to(torch.int16) - offsets.to(torch.int16)).to(factor.dtype)
    return (centred_codes * factor).reshape(rows, blocks * block)[:, :columns]


def gather_decoded(
    codes: torch.Tensor,
    indices: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    *,
    gather_axis: int,
    quantize_axis: int,
    block: int,
    default_zero: int,
) -> torch.Tensor:
    """GatherBlockQuantized: decode what is gathered. ``codes`` one per entry, factors one per block."""
    from effic.backends.torch.functions.indexing import gather

    shape = codes.shape
    gather_axis, quantize_axis = gather_axis % codes.ndim, quantize_axis % codes.ndim
    if gather_axis == quantize_axis:
        whole = codes.to(torch.int16) - (
            default_zero
            if zero_points is None
            else spread(zero_points, shape, quantize_axis, block).to(torch.int16)
        )
        return gather(
            whole.to(scales.dtype) * spread(scales, shape, quantize_axis, block), indices, gather_axis
        )
    picked = gather(codes, indices, gather_axis).to(torch.int16)
    factor = gather(scales, indices, gather_axis)
    axis = quantize_axis if quantize_axis < gather_axis else quantize_axis + indices.ndim - 1
    if zero_points is None:
        picked = picked - default_zero
    else:
        picked = picked - spread(gather(zero_points, indices, gather_axis), picked.shape, axis, block).to(
            torch.int16
        )
    return picked.to(factor.dtype) * spread(factor, picked.shape, axis, block)

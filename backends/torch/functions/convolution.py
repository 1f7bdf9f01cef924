"""Convolutions that torch's own calls do not cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from effic.backends.torch.functions.windows import pad_axes, resolve_pads, span

CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
    output_shape: Sequence[int],
    auto_pad: str,
    group: int,
) -> torch.Tensor:
    """ONNX ConvTranspose with any padding: the full result, cut (or grown) to what is asked for.

    Args:
        x: ``[N, C, ...]``.
        weight: ``[C, M/group, ...]``.
        bias: ``[M]``.
        pads: what is cut off, all befores and then all afters; unused where the sizes follow from
            ``output_shape`` or ``auto_pad``.
        output_shape: spatial sizes of the result, or empty.

    Returns:
        ``[N, M, ...]``.
    """
    rank = len(strides)
    kernel = weight.shape[2:]
    full = TRANSPOSED[rank](x, weight, None, tuple(strides), 0, 0, group, tuple(dilations))
    cut: list[tuple[int, int]] = []
    for i in range(rank):
        whole = (x.shape[2 + i] - 1) * strides[i] + span(kernel[i], dilations[i]) + output_padding[i]
        if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = output_shape[i] if output_shape else x.shape[2 + i] * strides[i]
            # Sizes that ask for more than there is grow the end by zeros.
            total = max(whole - wanted, 0)
            half = total // 2
            before, after = (half, total - half) if auto_pad == "SAME_UPPER" else (total - half, half)
            after = whole - before - wanted
        elif auto_pad == "VALID":
            before = after = 0
        else:
            before, after = pads[i], pads[i + rank]
        cut.append((-before, output_padding[i] - after))
    result = pad_axes(full, cut)
    if bias is None:
        return result
    return result + bias.reshape(-1, *([1] * rank))


def deform_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    offset_group: int,
) -> torch.Tensor:
    """Deformable convolution in two dimensions (Dai et al. 2017, arXiv:1703.06211; v2 with a mask).

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[M, C/group, kH, kW]``.
        offset: ``[N, offset_group·kH·kW·2, oH, oW]``, y before x.
        mask: ``[N, offset_group·kH·kW, oH, oW]``.

    Returns:
        ``[N, M, oH, oW]``; values outside of ``x`` are zero, those between are bilinear.
    """
    n, c, height, width = x.shape
    kh, kw = weight.shape[2:]
    oh, ow = offset.shape[2:]
    places = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    kind: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    ky = torch.arange(kh, **kind).mul(dilations[0]).repeat_interleave(kw)
    kx = torch.arange(kw, **kind).mul(dilations[1]).repeat(kh)
    oy = torch.arange(oh, **kind) * strides[0] - pads[0]
    ox = torch.arange(ow, **kind) * strides[1] - pads[1]
    y = places[:, :, :, 0] + ky.view(-1, 1, 1) + oy.view(1, -1, 1)
    xs = places[:, :, :, 1] + kx.view(-1, 1, 1) + ox.view(1, 1, -1)
    # [N·offset_group, kH·kW·oH, oW, 2] in grid_sample's coordinates, in which pixel i of n lies at 2i/(n-1) - 1.
    grid = torch.stack((2 * xs / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)
    if width == 1 or height == 1:
        # There, align_corners has one place only: shift the grid so that one pixel is one step.
        x = F.pad(x, (0, int(width == 1), 0, int(height == 1)))
        wide, high = max(width, 2), max(height, 2)
        grid = torch.stack((2 * xs / (wide - 1) - 1, 2 * y / (high - 1) - 1), dim=-1)
        height, width = high, wide
    sampled = F.grid_sample(
        x.reshape(n * offset_group, c // offset_group, height, width),
        grid.reshape(n * offset_group, kh * kw * oh, ow, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    ).reshape(n, offset_group, c // offset_group, kh * kw, oh, ow)
    if mask is not None:
        sampled = sampled * mask.reshape(n, offset_group, 1, kh * kw, oh, ow)
    columns = sampled.reshape(n, group, c // group * kh * kw, oh * ow)
    kernels = weight.reshape(group, weight.shape[0] // group, c // group * kh * kw)
    result = torch.matmul(kernels, columns).reshape(n, weight.shape[0], oh, ow)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


def convolve_exactly(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    auto_pad: str,
    group: int,
) -> torch.Tensor:
    """Convolution of integers (zero points taken off already), as int64.

    Computed in double precision, in which sums of products of 8-bit numbers are exact on every device.
    """
    kernel = weight.shape[2:]
    amounts = resolve_pads(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    padded = pad_axes(x.to(torch.float64), amounts)
    result = CONVOLUTIONS[len(strides)](
        padded, weight.to(torch.float64), None, tuple(strides), 0, tuple(dilations), group
    )
    return result.round().to(torch.int64)


def col2im(
    x: torch.Tensor,
    image: Sequence[int],
    block: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> torch.Tensor:
    """Add columns of blocks up to an image, in any number of dimensions.

    Args:
        x: ``[N, C·prod(block), L]``.
        image: spatial sizes of the result.

    Returns:
        ``[N, C, *image]``.
    """
    rank = len(image)
    counts = [
        (image[i] + pads[i] + pads[i + rank] - span(block[i], dilations[i])) // strides[i] + 1
        for i in range(rank)
    ]
    n, channels = x.shape[0], x.shape[1] // math.prod(block)
    # An identity kernel per place in the block makes the transposed convolution put each entry there.
    places = math.prod(block)
    weight = torch.eye(places, dtype=x.dtype, device=x.device).reshape(places, 1, *block)
    columns = x.reshape(n * channels, places, *counts)
    whole = TRANSPOSED[rank](columns, weight, None, tuple(strides), 0, 0, 1, tuple(dilations))
    cut = [(-pads[i], image[i] + pads[i] - whole.shape[2 + i]) for i in range(rank)]
    return pad_axes(whole, cut).reshape(n, channels, *image)

"""Windows that slide over an axis: where they start, how many there are, what padding they need.

Shared by convolution and pooling. Spatial sizes are read from the tensor, so that they may vary from
call to call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def span(kernel: int, dilation: int) -> int:
    """How many entries a dilated kernel reaches over."""
    return (kernel - 1) * dilation + 1


def same_pads(size: int, kernel: int, stride: int, dilation: int, upper: bool) -> tuple[int, int]:
    """Padding before and after for ``auto_pad``: there are ceil(size / stride) windows.

    Args:
        upper: an odd entry goes to the end (``SAME_UPPER``) or to the beginning (``SAME_LOWER``).
    """
    total = max((-(-size // stride) - 1) * stride + span(kernel, dilation) - size, 0)
    small = total // 2
    return (small, total - small) if upper else (total - small, small)


def resolve_pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    auto_pad: str,
) -> list[tuple[int, int]]:
    """(before, after) for each spatial axis, from ONNX's ``pads`` (all befores, all afters) or ``auto_pad``."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return [
            same_pads(sizes[i], kernel[i], strides[i], dilations[i], auto_pad == "SAME_UPPER")
            for i in range(rank)
        ]
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    return [(pads[i], pads[i + rank]) for i in range(rank)]


def pad_axes(x: torch.Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    """Pad the last ``len(pads)`` axes by (before, after) with a constant; negative amounts cut off."""
    if all(p == (0, 0) for p in pads):
        return x
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], value=value)


def pad_same(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    upper: bool,
) -> torch.Tensor:
    """Zeros around the spatial axes of ``x [N, C, ...]``, as ``auto_pad=SAME_*`` asks for."""
    sizes = x.shape[2:]
    auto_pad = "SAME_UPPER" if upper else "SAME_LOWER"
    return pad_axes(x, resolve_pads(sizes, kernel, strides, dilations, (), auto_pad))


def window_count(size: int, reach: int, stride: int, pads: tuple[int, int], ceil_mode: bool) -> int:
    """How many windows there are; with ``ceil_mode`` none that starts in the padding at the end."""
    room = size + pads[0] + pads[1] - reach
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    if (count - 1) * stride >= size + pads[0]:
        count -= 1
    return count


def every_offset(
    x: torch.Tensor, axis: int, kernel: int, stride: int, dilation: int, count: int
) -> list[torch.Tensor]:
    """For each place in the kernel, what ``count`` windows along ``axis`` see there."""
    reach = (count - 1) * stride + 1
    index: list[slice] = [slice(None)] * axis
    return [x[(*index, slice(k * dilation, k * dilation + reach, stride))] for k in range(kernel)]

"""One branch of a sum as a single convolution kernel: composition and alignment, on arrays alone.

Source: conv_bn re-parameterisation as in RepVGG (arXiv 2101.03697) and Diverse Branch Block
(arXiv 2103.13425), with the padding rule stated in tap positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from effic.passes.fuse.affine import (
    AffineMap,
    Window,
    conv_input_factor,
    conv_of_shift,
    conv_output_factor,
    embed,
    spread_groups,
)
from effic.passes.fuse.reading import Refused


@dataclass(frozen=True, eq=False)
class Kernel:
    """A convolution in float64.

    Attributes:
        weight: ``[C_o, C_i/group, k…]``.
        bias: ``[C_o]``.
        group: groups.
        window: how it slides.
        diagonal: an identity, a pooling or a scale: depthwise, and rewritable to any groups.
    """

    weight: np.ndarray
    bias: np.ndarray
    group: int
    window: Window
    diagonal: bool = False

    @property
    def outputs(self) -> int:
        """Output channels."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Input channels."""
        return int(self.weight.shape[1] * self.group)


def identity_kernel(channels: int, axes: int) -> Kernel:
    """The kernel that changes nothing."""
    ones, zeros = (1,) * axes, (0,) * axes
    weight = np.ones((channels, 1, *ones))
    return Kernel(weight, np.zeros(channels), channels, Window(ones, ones, ones, zeros, zeros), diagonal=True)


def pooling_kernel(channels: int, window: Window) -> Kernel:
    """An average pooling that counts padded zeros."""
    weight = np.full((channels, 1, *window.kernel), 1.0 / np.prod(window.kernel))
    return Kernel(weight, np.zeros(channels), channels, window, diagonal=True)


def then_map(kernel: Kernel, found: AffineMap) -> Kernel:
    """``kernel`` followed by a scale and shift of its output channels."""
    weight = kernel.weight * conv_output_factor(found.scale, kernel.weight.ndim)
    return replace(kernel, weight=weight, bias=found.scale * kernel.bias + found.shift)


def then_kernel(first: Kernel, second: Kernel) -> Kernel:
    """Two convolutions in a row as one; one of them must be pointwise.

    Raises:
        Refused: they have no single kernel, or ``second`` pads where ``first`` leaves a bias.
    """
    if first.outputs != second.inputs:
        raise Refused(f"a convolution of {second.inputs} channels follows one of {first.outputs}")
    if first.window.is_pointwise:
        return _pointwise_first(first, second)
    if second.window.is_pointwise and second.diagonal:
        return then_map(first, AffineMap(second.weight.reshape(-1), second.bias))
    if second.window.is_pointwise and second.group == 1 and first.group in (1, first.outputs):
        if first.group == 1:
            weight = np.tensordot(second.weight.reshape(second.outputs, -1), first.weight, axes=1)
        elif first.diagonal:
            # [o, c] by the depthwise [c, 1, k…]: every pair of channels gets the pooling's taps.
            spread = np.moveaxis(first.weight, 0, 1)
            weight = second.weight.reshape(*second.weight.shape[:2], *[1] * (first.weight.ndim - 2)) * spread
        else:
            raise Refused("a depthwise convolution and a dense one in a row make a larger kernel")
        bias = second.bias + second.weight.reshape(second.outputs, -1) @ first.bias
        return Kernel(weight, bias, 1, first.window)
    raise Refused("two convolutions in a row, neither of them a plain 1x1, have no kernel of the same size")


def _pointwise_first(first: Kernel, second: Kernel) -> Kernel:
    if first.bias.any() and second.window.pads:
        raise Refused("a shift before a padded convolution does not reach the border")
    bias = second.bias + conv_of_shift(second.weight, first.bias, second.group).reshape(
        second.outputs, -1
    ).sum(1)
    if first.diagonal:
        factor = conv_input_factor(first.weight.reshape(-1), second.weight.shape, second.group)
        return replace(second, weight=second.weight * factor, bias=bias)
    matrix = first.weight.reshape(first.outputs, -1)
    if second.diagonal:
        taps = second.weight[:, 0].reshape(second.outputs, 1, *second.weight.shape[2:])
        shaped = first.weight * np.ones((1, 1, *second.window.kernel)) * taps
        return Kernel(shaped, bias, first.group, second.window)
    if first.group != 1 or second.group != 1:
        raise Refused("convolutions with groups in a row make a larger kernel")
    weight = np.moveaxis(np.tensordot(second.weight, matrix, axes=([1], [0])), -1, 1)
    return Kernel(weight, bias, 1, second.window)


def merge(kernels: list[Kernel], grow: bool) -> Kernel:
    """The sum of parallel branches as one convolution.

    Every tap of a branch reads the input at some offset from ``stride * output``; a branch fits
    when its offsets are taps of the merged kernel. For one size, stride and dilation that is the
    known rule: padding ``p - (K - k) / 2`` for a kernel of ``k`` inside one of ``K``.

    Args:
        kernels: at least two branches over the same input.
        grow: allow a kernel larger than that of every convolution branch.

    Raises:
        Refused: channels, groups, strides or positions do not match.
    """
    convs = [kernel for kernel in kernels if not kernel.diagonal]
    if not convs:
        raise Refused("none of its branches is a convolution")
    main = max(convs, key=lambda kernel: int(np.prod(kernel.window.kernel)))
    kernels = [_in_groups(kernel, main) for kernel in kernels]
    window = _common_window(kernels)
    if not grow and window.kernel != main.window.kernel:
        raise Refused(
            f"the merged kernel {_x(window.kernel)} would be larger than that of any convolution branch (grow=true)"
        )
    weight = np.zeros((*main.weight.shape[:2], *window.kernel))
    for kernel in kernels:
        own = kernel.window
        if own.dilations != window.dilations:
            own = replace(own, dilations=window.dilations)
        offsets = tuple(
            (b - o) // d for b, o, d in zip(window.begin, own.begin, window.dilations, strict=True)
        )
        weight += embed(kernel.weight, window.kernel, offsets)
    bias = np.sum([kernel.bias for kernel in kernels], axis=0)
    return Kernel(weight, bias, main.group, window)


def _in_groups(kernel: Kernel, main: Kernel) -> Kernel:
    if (kernel.outputs, kernel.inputs) != (main.outputs, main.inputs):
        raise Refused(
            f"its branches map {kernel.inputs} to {kernel.outputs} and {main.inputs} to {main.outputs} channels"
        )
    if kernel.diagonal:
        return replace(kernel, weight=spread_groups(kernel.weight, main.group), group=main.group)
    if kernel.group != main.group:
        raise Refused(f"its branches have {kernel.group} and {main.group} groups")
    return kernel


def _common_window(kernels: list[Kernel]) -> Window:
    """The smallest window that holds every branch's taps."""
    taps, dilations, begins, ends = [], [], [], []
    for axis in range(len(kernels[0].window.kernel)):
        windows = [kernel.window for kernel in kernels]
        if len({w.strides[axis] for w in windows}) != 1:
            raise Refused(f"its branches step by {sorted({w.strides[axis] for w in windows})}")
        # A kernel of one tap has no dilation of its own.
        found = {w.dilations[axis] for w in windows if w.kernel[axis] > 1} or {1}
        if len(found) != 1:
            raise Refused(f"its branches are dilated by {sorted(found)}")
        d = found.pop()
        low = min(-w.begin[axis] for w in windows)
        reach = [d * (w.kernel[axis] - 1) - w.begin[axis] for w in windows]
        # What is left of the end padding after the last tap decides the output size.
        slack = {w.end[axis] - high for w, high in zip(windows, reach, strict=True)}
        if len(slack) != 1 or any((-w.begin[axis] - low) % d for w in windows):
            raise Refused(
                "its branches are misaligned: their paddings do not centre the kernels on each other"
            )
        taps.append((max(reach) - low) // d + 1)
        dilations.append(d)
        begins.append(-low)
        ends.append(slack.pop() + max(reach))
        if begins[-1] < 0 or ends[-1] < 0:
            raise Refused("its branches are misaligned: the merged kernel would need negative padding")
    return Window(tuple(taps), kernels[0].window.strides, tuple(dilations), tuple(begins), tuple(ends))


def _x(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))

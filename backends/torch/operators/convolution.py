"""Convolutions and the rearrangements that belong to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import convolution as functions
from effic.backends.torch.functions import quantization
from effic.backends.torch.functions.windows import pad_same
from effic.backends.torch.operators.arguments import rank, tensor
from effic.backends.torch.operators.quantization import bounds


class Windows(NamedTuple):
    """The attributes of a sliding window, defaults filled in."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]
    auto_pad: str

    @property
    def symmetric(self) -> list[int] | None:
        """Padding per axis where both ends have the same, else None (also for ``auto_pad``)."""
        half = len(self.strides)
        if self.auto_pad == "VALID":
            return [0] * half
        if self.auto_pad != "NOTSET" or self.pads[:half] != self.pads[half:] or min(self.pads, default=0) < 0:
            return None
        return self.pads[:half]


def windows(node: OperatorNode, weight: int | None = None) -> Windows:
    """The window of a convolution (whose kernel may follow from its weight) or of a pooling."""
    kernel = node.attributes.get("kernel_shape")
    if kernel is None and weight is not None:
        shape = node.shape(weight)
        kernel = None if shape is None else list(shape[2:])
    auto_pad = str(node.attributes.get("auto_pad", "NOTSET"))
    if kernel is None or (None in kernel and auto_pad.startswith("SAME")):
        node.refuse("has a kernel whose size is not known")
    spatial = len(kernel)
    return Windows(
        kernel=list(kernel),
        strides=list(node.attributes.get("strides", [1] * spatial)),
        dilations=list(node.attributes.get("dilations", [1] * spatial)),
        pads=list(node.attributes.get("pads", [0] * 2 * spatial)),
        auto_pad=auto_pad,
    )


def flat_pads(pads: list[int]) -> list[int]:
    """ONNX's pads (all befores, all afters) in the order of ``torch.nn.functional.pad``."""
    half = len(pads) // 2
    return [amount for i in range(half - 1, -1, -1) for amount in (pads[i], pads[i + half])]


def conv(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    w = windows(node, 1)
    function = functions.CONVOLUTIONS.get(len(w.strides))
    if function is None:
        node.refuse(f"convolves over {len(w.strides)} axes; torch does over one to three")
    x, weight, bias = tensor(node, 0), tensor(node, 1), node.input(2)
    padding = w.symmetric
    if padding is None:
        padding = [0] * len(w.strides)
        if w.auto_pad == "NOTSET":
            x = graph.call(F.pad, x, flat_pads(w.pads))
        else:
            x = graph.call(pad_same, x, w.kernel, w.strides, w.dilations, w.auto_pad == "SAME_UPPER")
    return graph.call(
        function,
        x,
        weight,
        bias,
        stride=tuple(w.strides),
        padding=tuple(padding),
        dilation=tuple(w.dilations),
        groups=int(node.attributes.get("group", 1)),
    )


def conv_transpose(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    w = windows(node, 1)
    function = functions.TRANSPOSED.get(len(w.strides))
    if function is None:
        node.refuse(f"convolves over {len(w.strides)} axes; torch does over one to three")
    x, weight, bias = tensor(node, 0), tensor(node, 1), node.input(2)
    group = int(node.attributes.get("group", 1))
    extra = list(node.attributes.get("output_padding", [0] * len(w.strides)))
    shape = list(node.attributes.get("output_shape", []))
    # torch wants output padding smaller than the stride or the dilation.
    fits = all(e < max(s, d) for e, s, d in zip(extra, w.strides, w.dilations, strict=True))
    if w.symmetric is not None and not shape and fits:
        return graph.call(
            function,
            x,
            weight,
            bias,
            stride=tuple(w.strides),
            padding=tuple(w.symmetric),
            output_padding=tuple(extra),
            groups=group,
            dilation=tuple(w.dilations),
        )
    return graph.call(
        functions.conv_transpose,
        x,
        weight,
        bias,
        strides=w.strides,
        pads=w.pads,
        dilations=w.dilations,
        output_padding=extra,
        output_shape=shape[-len(w.strides) :] if shape else [],
        auto_pad=w.auto_pad,
        group=group,
    )


def deform_conv(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    if rank(node, 0) != 4:
        node.refuse("deforms over other than two axes")
    w = windows(node, 1)
    if w.pads[:2] != w.pads[2:] and min(w.pads) < 0:
        node.refuse("has negative padding")
    return graph.call(
        functions.deform_conv,
        tensor(node, 0),
        tensor(node, 1),
        tensor(node, 2),
        node.input(3),
        node.input(4),
        strides=w.strides,
        pads=w.pads,
        dilations=w.dilations,
        group=int(node.attributes.get("group", 1)),
        offset_group=int(node.attributes.get("offset_group", 1)),
    )


def _exact(node: OperatorNode, weight: int) -> dict[str, Any]:
    w = windows(node, weight)
    if len(w.strides) not in functions.CONVOLUTIONS:
        node.refuse(f"convolves over {len(w.strides)} axes; torch does over one to three")
    group = int(node.attributes.get("group", 1))
    return {
        "strides": w.strides, "pads": w.pads, "dilations": w.dilations, "auto_pad": w.auto_pad, "group": group
    }  # fmt: skip


def conv_integer(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    x = graph.call(quantization.centred, tensor(node, 0), node.input(2))
    weight = graph.call(quantization.centred, tensor(node, 1), node.input(3), 0)
    sums = graph.call(functions.convolve_exactly, x, weight, **_exact(node, 1))
    return graph.method("to", sums, torch.int32)


def qlinear_conv(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    low, high = bounds(node, node.dtype(7))
    x = graph.call(quantization.centred, tensor(node, 0), tensor(node, 2))
    weight = graph.call(quantization.centred, tensor(node, 3), tensor(node, 5), 0)
    sums = graph.call(functions.convolve_exactly, x, weight, **_exact(node, 3))
    scales = [tensor(node, i) for i in (1, 4, 6, 7)]
    return graph.call(quantization.requantize_channels, sums, node.input(8), *scales, low, high)


def col2im(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    image, block = graph.sizes(node, 1), graph.sizes(node, 2)
    shape = node.shape(2)
    spatial = shape[0] if shape else None
    if spatial not in functions.TRANSPOSED:
        node.refuse("works on a number of axes that is not known, or not one to three")
    return graph.call(
        functions.col2im,
        tensor(node, 0),
        image,
        block,
        strides=list(node.attributes.get("strides", [1] * spatial)),
        pads=list(node.attributes.get("pads", [0] * 2 * spatial)),
        dilations=list(node.attributes.get("dilations", [1] * spatial)),
    )

"""Where the window of a Conv or a pool lies, from ONNX's attributes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from effic.backends.tvm.kernels.conv import Window


def read_window(
    node: ir.Node,
    height: int,
    width: int,
    kernel: Sequence[int],
    more_pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Window | None:
    """The window of a node over an image; a signal's attributes count for the one row it is.

    Args:
        node: Conv, MaxPool or AveragePool.
        height, width: of the image.
        kernel: sizes along both axes.
        more_pads: zeros that a Pad before the node adds (top, left, bottom, right).

    Returns:
        The window, None where the attributes fit no image (or ask for what windows do not have).
    """
    axes = len(node.attributes.get_ints("kernel_shape", ()) or ()) or None
    strides = list(node.attributes.get_ints("strides", ()) or ())
    dilations = list(node.attributes.get_ints("dilations", ()) or ())
    pads = list(node.attributes.get_ints("pads", ()) or ())
    for given in (strides, dilations):
        if len(given) == 1:
            given.insert(0, 1)
        if not given:
            given += [1, 1]
    if len(pads) == 2 and (axes in (None, 1)):
        pads = [0, pads[0], 0, pads[1]]
    pads = pads or [0, 0, 0, 0]
    if len(strides) != 2 or len(dilations) != 2 or len(pads) != 4 or len(kernel) != 2:
        return None
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = (height, width)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0, 0, 0, 0]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        for axis in range(2):
            out = -(-size[axis] // strides[axis])
            total = max(0, (out - 1) * strides[axis] + reach[axis] - size[axis])
            less, more = total // 2, total - total // 2
            pads[axis], pads[axis + 2] = (less, more) if auto == "SAME_UPPER" else (more, less)
    if node.attributes.get_int("ceil_mode", 0):
        for axis in range(2):
            places = size[axis] + pads[axis] + pads[axis + 2] - reach[axis]
            out = -(-places // strides[axis]) + 1
            # A window that would start in the padding behind the image is dropped.
            if (out - 1) * strides[axis] >= size[axis] + pads[axis]:
                out -= 1
            pads[axis + 2] += max(0, (out - 1) * strides[axis] - places)
    top, left, bottom, right = (own + more for own, more in zip(pads, more_pads, strict=True))
    window = Window(
        height,
        width,
        (int(kernel[0]), int(kernel[1])),
        (strides[0], strides[1]),
        (top, left, bottom, right),
        (dilations[0], dilations[1]),
    )
    return None if window.why_not() else window

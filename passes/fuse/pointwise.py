"""Two convolutions in a row, one of them 1x1 with nothing in between, as one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, describe, sole_consumer
from effic.ir.tensors import borrow
from effic.passes.fuse.affine import rounded
from effic.passes.fuse.branch import Kernel, then_kernel
from effic.passes.fuse.layers import finite, read_layer
from effic.passes.fuse.reading import Orphans, Refused, int_attr, read_weight, read_window


def read_kernel(node: ir.Node) -> Kernel:
    """A Conv node with constant weights, in float64.

    Raises:
        Refused: its weights or padding are not fixed.
    """
    layer = read_layer(node)
    bias = layer.bias()
    window = read_window(node, layer.weight.shape[2:], node.inputs[0])
    with borrow(layer.weight.tensor) as array:
        weight = array.transpose(layer.weight.perm).astype(np.float64)
    group = int_attr(node, "group", 1)
    # A depthwise 1x1 is a scale per channel, which fits into a kernel of any groups.
    diagonal = window.is_pointwise and group > 1 and layer.inputs.channels == layer.outputs.channels == group
    return Kernel(weight, np.zeros(len(weight)) if bias is None else bias, group, window, diagonal)


def new_conv(source: ir.Value, main: ir.Node, kernel: Kernel, model: Model) -> ir.Node:
    """A Conv node, not yet in a graph, that takes over the name and metadata of ``main``.

    Raises:
        Refused: the weights do not fit the type of those of ``main``.
    """
    old = read_weight(main.inputs[1])
    dtype, base = old.tensor.dtype, main.name or old.name
    weight, bias = (finite(rounded(array, dtype.numpy())) for array in (kernel.weight, kernel.bias))
    inputs = [source, model.add_initializer(old.graph, f"{base}.weight_merged", weight, dtype)]
    if kernel.bias.any():
        inputs.append(model.add_initializer(old.graph, f"{base}.bias_merged", bias, dtype))
    window = kernel.window
    attributes = [
        ir.AttrInt64s("kernel_shape", window.kernel),
        ir.AttrInt64s("strides", window.strides),
        ir.AttrInt64s("dilations", window.dilations),
        ir.AttrInt64s("pads", (*window.begin, *window.end)),
        ir.AttrInt64("group", kernel.group),
    ]
    conv = ir.Node("", "Conv", inputs, attributes, name=main.name, metadata_props=dict(main.metadata_props))
    conv.outputs[0].name = model.unique_name(f"{main.outputs[0].name}_merged")
    return conv


def merge_pointwise(second: ir.Node, model: Model, orphans: Orphans) -> ir.Node | None:
    """Merge a Conv with the Conv that alone feeds it, where that leaves fewer weights.

    A pair that is a low-rank factorisation, or a narrow waist, holds fewer weights than its
    product, and stays.

    Returns:
        The new node, or None when no Conv feeds this one alone or neither of the two is 1x1.

    Raises:
        Refused: they cannot be one, or it would be larger.
    """
    data = second.inputs[0]
    first = None if data is None else data.producer()
    if first is None or data is None or first.op_type != "Conv" or first.domain != "":
        return None
    if first.graph is not second.graph or sole_consumer(data) is not second or first.inputs[0] is None:
        return None
    if not any(_is_single_tap(node) for node in (first, second)):
        return None
    kernels = [read_kernel(first), read_kernel(second)]
    if len({read_weight(node.inputs[1]).tensor.dtype for node in (first, second)}) > 1:
        raise Refused("the two have different types")
    merged = then_kernel(*kernels)
    before = sum(kernel.weight.size for kernel in kernels)
    if (
        merged.weight.size > before
        or read_weight(first.inputs[1]).shared
        or read_weight(second.inputs[1]).shared
    ):
        raise Refused(
            f"merged with {describe(first)} it would hold {merged.weight.size} weights, not {before}"
        )
    larger = max((first, second), key=lambda node: read_weight(node.inputs[1]).tensor.size)
    conv = new_conv(first.inputs[0], larger, merged, model)
    conv.outputs[0].type, conv.outputs[0].shape = second.outputs[0].type, second.outputs[0].shape
    if second.graph is not None:
        second.graph.insert_before(second, conv)
    model.replace_value(second.outputs[0], conv.outputs[0])
    orphans.remove_node(second)
    orphans.remove_node(first)
    return conv


def _is_single_tap(node: ir.Node) -> bool:
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    return shape is not None and len(shape) > 2 and all(size == 1 for size in shape.dims[2:])

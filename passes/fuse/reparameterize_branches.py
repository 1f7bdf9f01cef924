"""reparameterize-branches: one convolution for a sum of parallel linear branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, describe
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.fuse.branch import Kernel, identity_kernel, merge, pooling_kernel, then_kernel, then_map
from effic.passes.fuse.layers import read_layer
from effic.passes.fuse.pointwise import new_conv, read_kernel
from effic.passes.fuse.reading import (
    Layout,
    Orphans,
    Refused,
    int_attr,
    is_pass_through,
    rank_of,
    read_map,
    read_weight,
    read_window,
)
from effic.passes.fuse.steps import Step, data_input, steps_after
from effic.passes.fuse.sum_tree import (
    SUMS,
    Point,
    common_source,
    is_inner,
    is_sum,
    part_below,
    path_of,
    terms_of,
)


@dataclass(frozen=True)
class ReparameterizeBranches(Pass):
    """Replace a sum of parallel linear branches by the one convolution they add up to.

    Before:  y = BN(Conv3x3(x)) + BN(Conv1x1(x)) + BN(x)
    After:   y = Conv3x3(x)

    A branch is a row of convolutions, batch norms, average poolings and per-channel constants from
    one common input; the sum is a Sum node or a tree of Adds. Kernels of 1x1, 1xk and kx1 are set
    into the K x K one, an identity is a kernel with a single one per channel, an average pooling a
    constant kernel, and a 1x1 before or after a convolution is multiplied into it. Batch norms are
    folded on the way, those after the sum too. Kernels are added up in float64. Terms of the sum
    that come from elsewhere stay in it.

    Missed when a branch holds an activation or is read elsewhere, when groups, strides, dilations or
    types differ, when paddings do not align the kernels, when a pooling leaves padding uncounted, or
    when a shift would have to pass a padded border. Running it twice changes nothing more.
    """

    name: ClassVar[str] = "reparameterize-branches"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    grow: bool = option(
        False, help="merge although the kernel gets larger than every branch's (1xk + kx1, 1x1 + 3x3 pooling)"
    )

    def apply(self, model: Model, remarks: Remarks) -> None:
        """Rewrite ``model`` in place, leaving remarks."""
        orphans = Orphans()
        for root in model.nodes(*SUMS):
            if is_sum(root) and not is_inner(root):
                self._merge_sum(root, model, remarks, orphans)
        orphans.sweep()

    def _merge_sum(self, root: ir.Node, model: Model, remarks: Remarks, orphans: Orphans) -> None:
        tree, terms = terms_of(root)
        paths = [path_of(term, root.graph, model) for term in terms]
        source = common_source(paths)
        if source is None:
            if any(len(path) > 1 and path[0].is_linear_op for path in paths):
                remarks.missed(
                    root, "no two of its branches come from one input through linear operators alone"
                )
            return
        chosen = [i for i, path in enumerate(paths) if any(p.value is source for p in path)]
        try:
            parts = [part_below(paths[i], source) for i in chosen]
            _check_types(parts)
            rank, channels = _rank(parts, source), _channels(parts)
            merged = merge([_kernel(part, channels, rank, model) for part in parts], self.grow)
            after, merged = self._after(root, merged, len(chosen) == len(terms), rank, model)
            conv = new_conv(source, _main_conv(parts), merged, model)
        except Refused as refusal:
            remarks.missed(root, str(refusal))
            return
        result = conv.outputs[0]
        last = after[-1].node.outputs[0] if after else root.outputs[0]
        result.type, result.shape = last.type, last.shape
        if root.graph is not None:
            root.graph.insert_before(root, conv)
        for i, term in enumerate(terms):
            if i not in chosen:
                result = _add(result, term, root, model)
        model.replace_value(last, result)
        where = describe(root)
        for step in reversed(after):
            for node in (step.node, *reversed(step.crossed)):
                orphans.remove_node(node)
        for node in (*tree, *(p.node for part in parts for p in part if p.node is not None)):
            orphans.remove_node(node)
        size = "x".join(map(str, merged.window.kernel))
        remarks.passed(
            where,
            f"{len(chosen)} branches became one {size} convolution",
            branches=len(chosen),
            parameters=int(merged.weight.size + merged.bias.size),
        )

    @staticmethod
    def _after(
        root: ir.Node, merged: Kernel, whole: bool, rank: int, model: Model
    ) -> tuple[list[Step], Kernel]:
        """The scales and shifts after the sum, folded into its kernel when the sum is all there is."""
        done: list[Step] = []
        if not whole:
            return done, merged
        layout = Layout(merged.outputs, rank)
        for step in steps_after(root.outputs[0], model):
            try:
                merged = then_map(merged, read_map(step.node, step.value, layout, model))
            except Refused:
                break  # fuse-conv-bn says why.
            done.append(step)
        return done, merged


def _convs(parts: list[list[Point]]) -> list[ir.Node]:
    return [p.node for part in parts for p in part if p.node is not None and p.node.op_type == "Conv"]


def _check_types(parts: list[list[Point]]) -> None:
    found = {read_weight(node.inputs[1]).tensor.dtype for node in _convs(parts)}
    if not found:
        raise Refused("none of its branches is a convolution")
    if len(found) > 1:
        raise Refused(f"its branches have different types ({', '.join(sorted(t.name for t in found))})")


def _rank(parts: list[list[Point]], source: ir.Value) -> int:
    ranks = {len(read_weight(node.inputs[1]).shape) for node in _convs(parts)}
    known = rank_of(source)
    if len(ranks) != 1 or (known is not None and known not in ranks):
        raise Refused("its branches have different numbers of axes")
    return ranks.pop()


def _main_conv(parts: list[list[Point]]) -> ir.Node:
    """The convolution with the largest kernel: the merged one takes over its name."""
    return max(_convs(parts), key=lambda node: int(np.prod(read_weight(node.inputs[1]).shape[2:])))


def _channels(parts: list[list[Point]]) -> int:
    """Channels of the source: what the first convolution of a branch takes."""
    for part in parts:
        convs = _convs([part])
        if convs:
            return read_layer(convs[-1]).inputs.channels
    raise Refused("none of its branches is a convolution")


def _kernel(part: list[Point], channels: int, rank: int, model: Model) -> Kernel:
    """A branch as one kernel, built from its source on."""
    kernel = identity_kernel(channels, rank - 2)
    for point in reversed(part):
        node = point.node
        if node is None or is_pass_through(node, model):
            continue
        try:
            if node.op_type == "Conv":
                kernel = then_kernel(kernel, read_kernel(node))
            elif node.op_type == "AveragePool":
                kernel = then_kernel(kernel, _read_pooling(node, kernel.outputs, rank))
            else:
                data = data_input(node)
                if data is not None:
                    kernel = then_map(kernel, read_map(node, data, Layout(kernel.outputs, rank), model))
        except Refused as refusal:
            raise Refused(f"{describe(node)}: {refusal}") from None
    return kernel


def _read_pooling(node: ir.Node, channels: int, rank: int) -> Kernel:
    attr = node.attributes.get("kernel_shape")
    taps = () if attr is None or attr.is_ref() else tuple(attr.as_ints())
    if len(taps) != rank - 2:
        raise Refused("its kernel shape is not fixed")
    window = read_window(node, taps, node.inputs[0])
    if int_attr(node, "ceil_mode", 0):
        raise Refused("it rounds its output size up (ceil_mode)")
    if window.pads and not int_attr(node, "count_include_pad", 0):
        raise Refused("it averages without the padding (count_include_pad=0)")
    return pooling_kernel(channels, window)


def _add(left: ir.Value, right: ir.Value, root: ir.Node, model: Model) -> ir.Value:
    node = ir.Node("", "Add", [left, right], metadata_props=dict(root.metadata_props))
    out, whole = node.outputs[0], root.outputs[0]
    out.name, out.type, out.shape = model.unique_name(f"{whole.name}_rest"), whole.type, whole.shape
    if root.graph is not None:
        root.graph.insert_before(root, node)
    return out

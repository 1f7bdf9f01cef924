"""reparameterize-branches: one convolution for a sum of parallel linear branches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe, sole_consumer
from effic.ir.tensors import borrow
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.fuse.affine import rounded
from effic.passes.fuse.branch import Kernel, identity_kernel, merge, pooling_kernel, then_kernel, then_map
from effic.passes.fuse.layers import finite, read_layer
from effic.passes.fuse.reading import (
    Layout,
    Refused,
    int_attr,
    is_candidate,
    is_pass_through,
    rank_of,
    read_map,
    read_weight,
    read_window,
    remove_node,
)
from effic.passes.fuse.steps import Step, data_input, steps_after

SUMS = ("Add", "Sum")

# Published blocks have at most five linear operators in a branch (1x1, norm, K x K, norm, Identity).
# The limit keeps the search linear in the size of a model that is one long chain.
MAX_BRANCH_NODES = 12


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
        for root in model.nodes(*SUMS):
            if _is_sum(root) and not _is_inner(root):
                self._merge_sum(root, model, remarks)

    def _merge_sum(self, root: ir.Node, model: Model, remarks: Remarks) -> None:
        tree, terms = _terms(root)
        paths = [_path(term, root.graph, model) for term in terms]
        source = _common_source(paths)
        if source is None:
            if any(len(path) > 1 and path[0].is_linear_op for path in paths):
                remarks.missed(
                    root, "no two of its branches come from one input through linear operators alone"
                )
            return
        chosen = [i for i, path in enumerate(paths) if any(p.value is source for p in path)]
        try:
            parts = [_until(paths[i], source) for i in chosen]
            dtype, rank, channels = _weight_dtype(parts), _rank(parts, source), _channels(parts)
            merged = merge([_kernel(part, channels, rank, model) for part in parts], self.grow)
            after, merged = self._after(root, merged, len(chosen) == len(terms), rank, model)
            constants = _Constants(
                finite(rounded(merged.weight, dtype.numpy())),
                finite(rounded(merged.bias, dtype.numpy())),
                dtype,
            )
        except Refused as refusal:
            remarks.missed(root, str(refusal))
            return
        conv = _new_conv(source, _main_conv(parts), merged, constants, model)
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
                remove_node(node)
        for node in (*tree, *(p.node for part in parts for p in part if p.node is not None)):
            remove_node(node)
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


@dataclass(frozen=True, eq=False)
class _Constants:
    """The merged weight and bias, rounded to the model's type."""

    weight: np.ndarray
    bias: np.ndarray
    dtype: ir.DataType


@dataclass(frozen=True, eq=False)
class _Point:
    """A value on the way from a term of the sum up to its source, and the node that makes it."""

    value: ir.Value
    node: ir.Node | None
    problem: str | None = None

    @property
    def is_linear_op(self) -> bool:
        """Whether a convolution, pooling or norm makes the value."""
        return self.node is not None and self.node.op_type in ("Conv", "AveragePool", "BatchNormalization")


def _is_sum(node: ir.Node) -> bool:
    if node.op_type == "Add" and ("axis" in node.attributes or "broadcast" in node.attributes):
        return False
    return len(node.inputs) > 1 and all(v is not None and constant_tensor(v) is None for v in node.inputs)


def _is_inner(node: ir.Node) -> bool:
    """Whether the sum is itself a term of a larger one."""
    reader = sole_consumer(node.outputs[0])
    return (
        reader is not None
        and reader.op_type in SUMS
        and reader.domain in ONNX_DOMAINS
        and reader.graph is node.graph
        and _is_sum(reader)
    )


def _terms(root: ir.Node) -> tuple[list[ir.Node], list[ir.Value]]:
    """The Adds of a sum, the outer before the inner ones, and what they add up."""
    tree, terms, stack = [root], [], [v for v in reversed(root.inputs) if v is not None]
    while stack:
        value = stack.pop()
        node = value.producer()
        if (
            node is not None
            and node.op_type in SUMS
            and node.domain in ONNX_DOMAINS
            and node.graph is root.graph
            and _is_sum(node)
            and sole_consumer(value) is not None
        ):
            tree.append(node)
            stack += [v for v in reversed(node.inputs) if v is not None]
        else:
            terms.append(value)
    return tree, terms


def _path(term: ir.Value, graph: object, model: Model) -> list[_Point]:
    """Values from a term upwards for as long as linear operators make them, with what forbids each step."""
    path: list[_Point] = []
    value: ir.Value | None = term
    while value is not None and len(path) < MAX_BRANCH_NODES:
        node = value.producer()
        data = None if node is None or node.graph is not graph else _data_of(node, model)
        if node is None or data is None:
            path.append(_Point(value, None))
            break
        reused = sole_consumer(value) is None
        path.append(
            _Point(value, node, f"the output of {describe(node)} is read elsewhere" if reused else None)
        )
        value = data
    return path


def _data_of(node: ir.Node, model: Model) -> ir.Value | None:
    if node.domain not in ONNX_DOMAINS or not node.inputs:
        return None
    if node.op_type in ("Conv", "AveragePool") or is_pass_through(node, model):
        return node.inputs[0]
    data = data_input(node)
    return data if data is not None and is_candidate(node, data) else None


def _common_source(paths: list[list[_Point]]) -> ir.Value | None:
    """The input that most branches share, the nearest of these; None when no two share one."""
    counts = Counter(value for path in paths for value in {point.value for point in path})
    best = max(counts.values(), default=0)
    if best < 2:
        return None
    depth: Counter[ir.Value] = Counter()
    for path in paths:
        for steps, point in enumerate(path):
            depth[point.value] += steps
    return min((value for value, count in counts.items() if count == best), key=lambda value: depth[value])


def _until(path: list[_Point], source: ir.Value) -> list[_Point]:
    """The part of a path below its source, the term first."""
    part: list[_Point] = []
    for point in path:
        if point.value is source:
            return part
        if point.problem is not None:
            raise Refused(point.problem)
        part.append(point)
    return part


def _convs(parts: list[list[_Point]]) -> list[ir.Node]:
    return [p.node for part in parts for p in part if p.node is not None and p.node.op_type == "Conv"]


def _weight_dtype(parts: list[list[_Point]]) -> ir.DataType:
    found = {read_weight(node.inputs[1]).tensor.dtype for node in _convs(parts)}
    if not found:
        raise Refused("none of its branches is a convolution")
    if len(found) > 1:
        raise Refused(f"its branches have different types ({', '.join(sorted(t.name for t in found))})")
    return found.pop()


def _rank(parts: list[list[_Point]], source: ir.Value) -> int:
    ranks = {len(read_weight(node.inputs[1]).shape) for node in _convs(parts)}
    known = rank_of(source)
    if len(ranks) != 1 or (known is not None and known not in ranks):
        raise Refused("its branches have different numbers of axes")
    return ranks.pop()


def _main_conv(parts: list[list[_Point]]) -> ir.Node:
    """The convolution with the largest kernel: the merged one takes over its name."""
    return max(_convs(parts), key=lambda node: int(np.prod(read_weight(node.inputs[1]).shape[2:])))


def _channels(parts: list[list[_Point]]) -> int:
    """Channels of the source: what the first convolution of a branch takes."""
    for part in parts:
        convs = _convs([part])
        if convs:
            return read_layer(convs[-1]).inputs.channels
    raise Refused("none of its branches is a convolution")


def _kernel(part: list[_Point], channels: int, rank: int, model: Model) -> Kernel:
    """A branch as one kernel, built from its source on."""
    kernel = identity_kernel(channels, rank - 2)
    for point in reversed(part):
        node = point.node
        if node is None or is_pass_through(node, model):
            continue
        try:
            if node.op_type == "Conv":
                kernel = then_kernel(kernel, _read_conv(node))
            elif node.op_type == "AveragePool":
                kernel = then_kernel(kernel, _read_pooling(node, kernel.outputs, rank))
            else:
                data = data_input(node)
                if data is not None:
                    kernel = then_map(kernel, read_map(node, data, Layout(kernel.outputs, rank), model))
        except Refused as refusal:
            raise Refused(f"{describe(node)}: {refusal}") from None
    return kernel


def _read_conv(node: ir.Node) -> Kernel:
    layer = read_layer(node)
    bias = layer.bias()
    window = read_window(node, layer.weight.shape[2:], node.inputs[0])
    with borrow(layer.weight.tensor) as array:
        weight = array.transpose(layer.weight.perm).astype(np.float64)
    return Kernel(weight, np.zeros(len(weight)) if bias is None else bias, int_attr(node, "group", 1), window)


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


def _new_conv(
    source: ir.Value, main: ir.Node, merged: Kernel, constants: _Constants, model: Model
) -> ir.Node:
    home = read_weight(main.inputs[1]).graph
    base = main.name or read_weight(main.inputs[1]).name
    inputs = [source, model.add_initializer(home, f"{base}.weight_merged", constants.weight, constants.dtype)]
    if merged.bias.any():
        inputs.append(model.add_initializer(home, f"{base}.bias_merged", constants.bias, constants.dtype))
    window = merged.window
    attributes = [
        ir.AttrInt64s("kernel_shape", window.kernel),
        ir.AttrInt64s("strides", window.strides),
        ir.AttrInt64s("dilations", window.dilations),
        ir.AttrInt64s("pads", (*window.begin, *window.end)),
        ir.AttrInt64("group", merged.group),
    ]
    conv = ir.Node("", "Conv", inputs, attributes, name=main.name, metadata_props=dict(main.metadata_props))
    conv.outputs[0].name = model.unique_name(f"{main.outputs[0].name}_merged")
    return conv


def _add(left: ir.Value, right: ir.Value, root: ir.Node, model: Model) -> ir.Value:
    node = ir.Node("", "Add", [left, right], metadata_props=dict(root.metadata_props))
    out, whole = node.outputs[0], root.outputs[0]
    out.name, out.type, out.shape = model.unique_name(f"{whole.name}_rest"), whole.type, whole.shape
    if root.graph is not None:
        root.graph.insert_before(root, node)
    return out

"""The layers a scale and shift can be folded into: Conv, ConvTranspose, Gemm, MatMul, Gather.

A layer says where its channels are and computes its folded constants; nothing is changed until
:func:`rewrite`. So a fold that several layers must agree on can still be refused.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, describe
from effic.ir.tensors import borrow
from effic.passes.fuse.affine import (
    AffineMap,
    border_map,
    conv_input_factor,
    conv_of_shift,
    conv_output_factor,
    conv_transpose_output_factor,
    rounded,
    scaled,
    scaled_outputs,
)
from effic.passes.fuse.reading import (
    Layout,
    Orphans,
    Refused,
    WeightRef,
    float_attr,
    int_attr,
    per_channel,
    rank_of,
    read_vector,
    read_weight,
    read_window,
    spatial_size,
)

CONVOLUTIONS = ("Conv", "ConvTranspose")
LINEARS = ("Gemm", "MatMul", "Gather")


@dataclass(frozen=True, eq=False)
class Folded:
    """A layer's new constants; None leaves what is there.

    Attributes:
        weight: in the layer's own layout.
        bias: one value per output channel, the layer's bias input.
        addend: added to the layer's output by an Add node (broadcast).
    """

    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    addend: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Layer(abc.ABC):
    """A node with a constant weight.

    Attributes:
        node: the node.
        weight: its weight.
        inputs: where the channels of its input are.
        outputs: where the channels of its output are.
    """

    node: ir.Node
    weight: WeightRef
    inputs: Layout
    outputs: Layout

    weight_index: ClassVar[int] = 1

    @abc.abstractmethod
    def output_factor(self, scale: np.ndarray) -> np.ndarray:
        """``scale`` per output channel, shaped to multiply the weight."""

    @abc.abstractmethod
    def fold_inputs(self, found: AffineMap, source: ir.Value, by_map: bool) -> Folded:
        """The constants that make this layer do ``found`` first.

        Args:
            found: what is done to the layer's input now.
            source: what the layer would read instead.
            by_map: whether a padded convolution may get a map of biases.

        Raises:
            Refused: there is no such constant.
        """

    def fold_outputs(self, found: AffineMap) -> Folded:
        """The constants that make this layer do ``found`` as well, after its own work.

        Raises:
            Refused: they do not fit the weight's type, or the bias is not a constant.
        """
        return Folded(self.scaled_outputs(found), self.shifted_bias(found))

    def scaled_outputs(self, found: AffineMap) -> np.ndarray | None:
        """The weight with its output channels scaled, or None when it stays."""
        if found.only_shifts:
            return None
        with borrow(self.weight.tensor) as array:
            weight = array.transpose(self.weight.perm)
            return finite(scaled_outputs(weight, self.output_factor(found.scale)))

    def shifted_bias(self, found: AffineMap) -> np.ndarray | None:
        """The bias after ``found``, or None when there is none before and after."""
        bias = self.bias()
        if bias is None and found.only_scales:
            return None
        return self.in_dtype(found.shift if bias is None else found.scale * bias + found.shift)

    def bias(self) -> np.ndarray | None:
        """The bias per output channel in float64, or None.

        Raises:
            Refused: it is not constant, or differs within a channel.
        """
        value = self.bias_value()
        return None if value is None else read_vector(value, "bias")

    def bias_value(self) -> ir.Value | None:
        """The bias input, or None where there is none."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    def in_dtype(self, array: np.ndarray) -> np.ndarray:
        """``array`` rounded to the weight's type; Refused when it does not fit."""
        return finite(rounded(array, self.weight.tensor.dtype.numpy()))


def finite(array: np.ndarray) -> np.ndarray:
    """``array``, unless it holds NaN or infinity: then Refused."""
    if not np.isfinite(array).all():
        raise Refused(f"the fused constants would overflow {array.dtype}")
    return array


@dataclass(frozen=True, eq=False)
class ConvLayer(Layer):
    """Conv: weight ``[C_o, C_i/G, k…]``."""

    group: int

    def output_factor(self, scale: np.ndarray) -> np.ndarray:
        return conv_output_factor(scale, len(self.weight.shape))

    def fold_inputs(self, found: AffineMap, source: ir.Value, by_map: bool) -> Folded:
        bias = None if found.only_scales else self.bias()
        window = (
            None if found.only_scales else read_window(self.node, self.weight.shape[2:], self.node.inputs[0])
        )
        if window is not None and window.pads and not by_map:
            raise Refused(
                f"{describe(self.node)} pads with zeros, which the shift before it does not reach at the "
                "border (bn_conv_padding=bias_map folds it)"
            )
        with borrow(self.weight.tensor) as array:
            weight = array.transpose(self.weight.perm)
            new = None
            if not found.only_shifts:
                new = finite(scaled(weight, conv_input_factor(found.scale, weight.shape, self.group)))
            if window is None:
                return Folded(new)
            taps = conv_of_shift(weight, found.shift, self.group)
        if not window.pads:
            shift = taps.reshape(len(taps), -1).sum(axis=1)
            return Folded(new, self.in_dtype(shift if bias is None else bias + shift))
        shown = self.node.inputs[0]
        spatial = spatial_size(shown) or spatial_size(source)
        if spatial is None or None in spatial:
            raise Refused(
                f"{describe(self.node)} pads its input, whose size is not fixed: no map of biases fits"
            )
        # The map takes no bias in: the convolution keeps its own.
        addend = border_map(taps, window, tuple(s for s in spatial if s is not None))
        return Folded(new, addend=self.in_dtype(addend[None]))


@dataclass(frozen=True, eq=False)
class ConvTransposeLayer(Layer):
    """ConvTranspose: weight ``[C_i, C_o/G, k…]``."""

    group: int

    def output_factor(self, scale: np.ndarray) -> np.ndarray:
        return conv_transpose_output_factor(scale, self.weight.shape, self.group)

    def fold_inputs(self, found: AffineMap, source: ir.Value, by_map: bool) -> Folded:
        if not found.only_scales:
            raise Refused(f"{describe(self.node)} spreads its input, so the shift differs at the border")
        if found.only_shifts:
            return Folded()
        with borrow(self.weight.tensor) as array:
            weight = array.transpose(self.weight.perm)
            return Folded(finite(scaled(weight, conv_output_factor(found.scale, weight.ndim))))


@dataclass(frozen=True, eq=False)
class MatMulLayer(Layer):
    """MatMul by a constant ``[K, N]`` on the right; its bias is an Add node's."""

    def output_factor(self, scale: np.ndarray) -> np.ndarray:
        return scale[None, :]

    def fold_outputs(self, found: AffineMap) -> Folded:
        shift = None if found.only_scales else self.in_dtype(found.shift)
        return Folded(self.scaled_outputs(found), addend=shift)

    def fold_inputs(self, found: AffineMap, source: ir.Value, by_map: bool) -> Folded:
        with borrow(self.weight.tensor) as array:
            weight = array.transpose(self.weight.perm)
            new = None if found.only_shifts else finite(scaled(weight, found.scale[:, None]))
            addend = None if found.only_scales else self.in_dtype(found.shift @ weight.astype(np.float64))
            return Folded(new, addend=addend)


@dataclass(frozen=True, eq=False)
class GemmLayer(Layer):
    """Gemm: ``alpha * A @ B + beta * C`` with B constant; the new C takes beta in."""

    alpha: float
    beta: float
    transposed: bool

    def output_factor(self, scale: np.ndarray) -> np.ndarray:
        return scale[:, None] if self.transposed else scale[None, :]

    def bias(self) -> np.ndarray | None:
        value = self.bias_value()
        if value is None or self.beta == 0:
            return None
        return self.beta * per_channel(read_weight(value, "bias"), self.outputs)

    def fold_inputs(self, found: AffineMap, source: ir.Value, by_map: bool) -> Folded:
        if int_attr(self.node, "transA", 0):
            raise Refused(f"{describe(self.node)} transposes its input")
        with borrow(self.weight.tensor) as array:
            weight = array.transpose(self.weight.perm)
            factor = found.scale[None, :] if self.transposed else found.scale[:, None]
            new = None if found.only_shifts else finite(scaled(weight, factor))
            if found.only_scales:
                return Folded(new)
            wide = weight.astype(np.float64)
            shift = self.alpha * (wide @ found.shift if self.transposed else found.shift @ wide)
        bias = self.bias()
        return Folded(new, self.in_dtype(shift if bias is None else bias + shift))


@dataclass(frozen=True, eq=False)
class GatherLayer(Layer):
    """Gather from the rows of a constant table ``[V, D]``: an embedding."""

    weight_index: ClassVar[int] = 0

    def output_factor(self, scale: np.ndarray) -> np.ndarray:
        return scale[None, :]

    def fold_outputs(self, found: AffineMap) -> Folded:
        with borrow(self.weight.tensor) as array:
            table = array.transpose(self.weight.perm)
            if found.only_scales:
                return Folded(finite(scaled(table, found.scale[None, :])))
            return Folded(self.in_dtype(table.astype(np.float64) * found.scale + found.shift))

    def fold_inputs(self, found: AffineMap, source: ir.Value, by_map: bool) -> Folded:
        raise Refused(f"{describe(self.node)} is an embedding")


def read_layer(node: ir.Node) -> Layer:
    """The layer a node is.

    Raises:
        Refused: its weight is not a constant, or its form is not one that can be folded into.
    """
    if node.op_type == "Gather":
        return _read_gather(node)
    weight = read_weight(node.inputs[1])
    shape = weight.shape
    if node.op_type in CONVOLUTIONS:
        group = int_attr(node, "group", 1)
        if len(shape) < 3 or group < 1 or shape[0] % group:
            raise Refused(f"its weight {list(shape)} does not fit {group} groups")
        rows, columns = Layout(shape[0], len(shape)), Layout(shape[1] * group, len(shape))
        if node.op_type == "Conv":
            return ConvLayer(node, weight, columns, rows, group)
        return ConvTransposeLayer(node, weight, rows, columns, group)
    if len(shape) != 2:
        raise Refused(f"its weight has {len(shape)} axes, not 2")
    if node.op_type == "MatMul":
        rank = rank_of(node.inputs[0])
        return MatMulLayer(node, weight, Layout(shape[0], rank, last=True), Layout(shape[1], rank, last=True))
    transposed = bool(int_attr(node, "transB", 0))
    wide, narrow = Layout(shape[0], 2, last=True), Layout(shape[1], 2, last=True)
    if transposed:
        wide, narrow = narrow, wide
    alpha, beta = float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)
    return GemmLayer(node, weight, wide, narrow, alpha, beta, transposed)


def _read_gather(node: ir.Node) -> Layer:
    table = read_weight(node.inputs[0], "table")
    if len(table.shape) != 2 or int_attr(node, "axis", 0) != 0:
        raise Refused("it does not take whole rows of a table")
    rank = rank_of(node.inputs[1])
    rows = Layout(table.shape[0], rank, last=True)
    return GatherLayer(
        node, table, rows, Layout(table.shape[1], None if rank is None else rank + 1, last=True)
    )


def rewrite(layer: Layer, folded: Folded, model: Model, orphans: Orphans) -> ir.Value:
    """Give a layer its folded constants; the old ones may be orphans then.

    Returns:
        The layer's output, after the addend if there is one. Readers are not moved to it.
    """
    node, name = layer.node, layer.node.name
    if folded.weight is not None:
        label = f"{name}.weight_fused" if name else f"{layer.weight.name}_fused"
        _replace(node, layer.weight_index, _constant(layer, label, folded.weight, model), orphans)
    if folded.bias is not None:
        label = f"{name}.bias_fused" if name else f"{layer.weight.name}_bias_fused"
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        _replace(node, 2, _constant(layer, label, folded.bias, model), orphans)
        if node.op_type == "Gemm":
            node.attributes.pop("beta", None)
    output = node.outputs[0]
    if folded.addend is None:
        return output
    label = f"{name}.addend_fused" if name else f"{layer.weight.name}_addend_fused"
    addend = _constant(layer, label, folded.addend, model)
    add = ir.Node("", "Add", [output, addend], num_outputs=1, metadata_props=dict(node.metadata_props))
    add.outputs[0].name = model.unique_name(f"{output.name}_shifted")
    add.outputs[0].type, add.outputs[0].shape = output.type, output.shape
    if node.graph is not None:
        node.graph.insert_after(node, add)
    return add.outputs[0]


def _constant(layer: Layer, label: str, array: np.ndarray, model: Model) -> ir.Value:
    return model.add_initializer(layer.weight.graph, label, array, layer.weight.tensor.dtype)


def _replace(node: ir.Node, index: int, value: ir.Value, orphans: Orphans) -> None:
    orphans.add(node.inputs[index])
    node.replace_input_with(index, value)

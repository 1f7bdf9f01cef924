"""The tune form: a fused weight and bias as graph arithmetic over the live parameters.

Source: conv_bn tune mode, "Efficient ConvBN Blocks for Transfer Learning and Beyond"
(arXiv 2305.11624). Every node written here does what :mod:`effic.passes.fuse.affine` does on arrays, in
the same type and order, so that folding the constants gives the deploy form to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe
from effic.ir.torch_capture import ROLE_KEY
from effic.passes.fuse.affine import multiply_type
from effic.passes.fuse.layers import ConvTransposeLayer, GatherLayer, GemmLayer, Layer
from effic.passes.fuse.reading import NORM, Refused, float_attr, other_operand
from effic.passes.fuse.steps import Step

# Operators broadcast as NumPy does since then; before, every Mul named an axis.
NEEDS_OPSET = 7


@dataclass(frozen=True, eq=False)
class LiveMap:
    """``y = scale * x + shift`` as values of the graph, double, shape [C] or [1]; None is 1 or 0."""

    scale: ir.Value | None = None
    shift: ir.Value | None = None


class Writer:
    """Writes nodes before ``anchor``, named after what they are for.

    Args:
        model: the model.
        anchor: the node that reads the results.
        base: first part of the names.
    """

    def __init__(self, model: Model, anchor: ir.Node, base: str) -> None:
        self.model, self.anchor, self.base = model, anchor, base

    def op(self, kind: str, label: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """One node; its result has the type of its first input unless ``to`` says otherwise."""
        made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        props = dict(self.anchor.metadata_props)
        node = ir.Node("", kind, list(inputs), made, num_outputs=1, metadata_props=props)
        out = node.outputs[0]
        out.name = self.model.unique_name(f"{self.base}.{label}")
        dtype = ir.DataType(attributes["to"]) if "to" in attributes else inputs[0].dtype
        out.type = None if dtype is None else ir.TensorType(dtype)
        if self.anchor.graph is not None:
            self.anchor.graph.insert_before(self.anchor, node)
        return out

    def number(self, label: str, array: np.ndarray) -> ir.Value:
        """A constant that is no parameter: a Constant node, which nobody trains."""
        name = self.model.unique_name(f"{self.base}.{label}")
        tensor = ir.Tensor(np.asarray(array), name=name)
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
        value = node.outputs[0]
        value.name, value.const_value = name, tensor
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
        if self.anchor.graph is not None:
            self.anchor.graph.insert_before(self.anchor, node)
        return value

    def cast(self, value: ir.Value, to: ir.DataType, label: str) -> ir.Value:
        """``value`` in another type."""
        return value if value.dtype == to else self.op("Cast", label, value, to=int(to))

    def shaped(self, value: ir.Value, shape: tuple[int, ...], label: str) -> ir.Value:
        """``value`` reshaped."""
        target = self.number(f"{label}_shape", np.array(shape, np.int64))
        out = self.op("Reshape", label, value, target)
        out.shape = None if -1 in shape else ir.Shape(shape)
        return out

    def vector(self, value: ir.Value, label: str) -> ir.Value:
        """A parameter with one value per channel, in double, flat."""
        self._bring_forward(value)
        tensor = constant_tensor(value)
        if tensor is None or len(tensor.shape) != 1:
            value = self.shaped(value, (-1,), f"{label}_flat")
        return self.cast(value, ir.DataType.DOUBLE, f"{label}_double")

    def _bring_forward(self, value: ir.Value) -> None:
        """Let Constant nodes, and what reshapes them, stand first: the norm's may follow its layer."""
        graph, source = self.anchor.graph, value
        while graph is not None and (node := source.producer()) is not None and node.graph is graph:
            graph.remove(node)
            graph.insert_before(graph[0], node)
            if not node.inputs or node.inputs[0] is None:
                return
            source = node.inputs[0]


def tune_form(
    layer: Layer, steps: list[Step], model: Model
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """Write the arithmetic of a fused layer before it.

    Args:
        layer: the layer; it is not changed.
        steps: the norms, scales and shifts that follow it, one of them a norm.
        model: their model.

    Returns:
        The weight for the layer, its bias input, and what an Add node has to add to its output. One of
        the last two is None.

    Raises:
        Refused: the layer has no tune form.
    """
    if isinstance(layer, GatherLayer):
        raise Refused("an embedding has no tune form (mode=deploy folds it)")
    if model.opset < NEEDS_OPSET:
        raise Refused(f"the tune form needs operator set {NEEDS_OPSET}, the model has {model.opset}")
    node = layer.node
    write = Writer(model, node, node.name or layer.weight.name)
    total = LiveMap()
    for number, step in enumerate(steps):
        label = "" if len(steps) == 1 else f"{number}_"
        total = _then(total, _live_map(step, write, label), write, label)
    dtype = layer.weight.tensor.dtype
    weight = _scaled(layer, total, write)
    bias = None if layer.bias() is None else node.inputs[2]
    shift = total.shift
    if bias is not None:
        wide = write.vector(bias, "bias")
        if isinstance(layer, GemmLayer) and layer.beta != 1:
            wide = write.op("Mul", "bias_beta", write.number("beta", np.array([layer.beta])), wide)
        if total.scale is not None:
            wide = write.op("Mul", "bias_scaled", total.scale, wide)
        shift = wide if shift is None else write.op("Add", "bias_shifted", wide, shift)
    if shift is None:
        return weight, None, None
    label = "addend_fused" if node.op_type == "MatMul" else "bias_fused"
    fused = write.op("Cast", label, shift, to=int(dtype))
    fused.shape = ir.Shape([layer.outputs.channels])
    return (weight, None, fused) if node.op_type == "MatMul" else (weight, fused, None)


def _then(first: LiveMap, second: LiveMap, write: Writer, label: str) -> LiveMap:
    """As :meth:`effic.passes.fuse.affine.AffineMap.then`."""
    if second.scale is None or first.scale is None:
        scale = second.scale or first.scale
    else:
        scale = write.op("Mul", f"{label}scale", second.scale, first.scale)
    shift = first.shift
    if shift is not None and second.scale is not None:
        shift = write.op("Mul", f"{label}shift_scaled", second.scale, shift)
    if shift is None or second.shift is None:
        return LiveMap(scale, shift or second.shift)
    return LiveMap(scale, write.op("Add", f"{label}shift_sum", shift, second.shift))


def _live_map(step: Step, write: Writer, label: str) -> LiveMap:
    """What one step does, by its live parameters. :func:`read_map` has found that it can be done."""
    node = step.node
    if node.op_type == NORM:
        return _live_norm(node, write, label)
    if node.op_type == "Neg":
        return LiveMap(write.number(f"{label}minus", np.array([-1.0])))
    other = other_operand(node, step.value)
    if other is None:
        raise Refused(f"{describe(node)} lacks an operand")
    tensor = constant_tensor(other)
    if tensor is not None and tensor.size == 1:
        # A number of the formula, as beside the norm; unless the model was captured and knows better.
        other.metadata_props.setdefault(ROLE_KEY, "buffer")
    vector = write.vector(other, f"{label}constant")
    if node.op_type == "Mul":
        return LiveMap(vector)
    if node.op_type == "Div":
        return LiveMap(write.op("Div", f"{label}inverse", write.number(f"{label}one", np.ones(1)), vector))
    if node.op_type == "Add":
        return LiveMap(None, vector)
    if node.inputs[0] is step.value:
        return LiveMap(None, write.op("Neg", f"{label}negative", vector))
    return LiveMap(write.number(f"{label}minus", np.array([-1.0])), vector)


def _live_norm(node: ir.Node, write: Writer, label: str) -> LiveMap:
    """As :meth:`effic.passes.fuse.affine.AffineMap.of_norm`; the statistics are marked as no parameters."""
    values = []
    for value, name in zip(node.inputs[1:5], ("gamma", "beta", "mean", "variance"), strict=True):
        if value is None:
            raise Refused(f"{describe(node)} lacks an input")
        if name in ("mean", "variance"):
            value.metadata_props[ROLE_KEY] = "buffer"
        values.append(write.vector(value, f"{label}{name}"))
    gamma, beta, mean, variance = values
    epsilon = write.number(f"{label}epsilon", np.array([float_attr(node, "epsilon", 1e-5)]))
    deviation = write.op("Sqrt", f"{label}deviation", write.op("Add", f"{label}raised", variance, epsilon))
    scale = write.op("Div", f"{label}norm_scale", gamma, deviation)
    moved = write.op("Mul", f"{label}mean_scaled", scale, mean)
    return LiveMap(scale, write.op("Sub", f"{label}norm_shift", beta, moved))


def _scaled(layer: Layer, found: LiveMap, write: Writer) -> ir.Value:
    """As :func:`effic.passes.fuse.affine.scaled_outputs`."""
    weight = layer.node.inputs[layer.weight_index]
    if weight is None or found.scale is None:
        raise Refused("it has no weight to scale")
    dtype, shape = layer.weight.tensor.dtype, layer.weight.shape
    wide = ir.DataType.from_numpy(np.dtype(multiply_type(dtype.numpy())))
    if weight.dtype is None:
        weight.dtype = dtype
    channels, grouped = layer.outputs.channels, None
    if isinstance(layer, ConvTransposeLayer):
        # The group's channels lie along axis 1, so that the groups need an axis of their own.
        group, ones = layer.group, [1] * len(shape[2:])
        factor_shape: tuple[int, ...] = (1, channels, *ones)
        if group > 1:
            grouped = (group, shape[0] // group, *shape[1:])
            factor_shape = (group, 1, channels // group, *ones)
    else:
        factor_shape = layer.output_factor(np.empty(channels)).shape
    factor = write.shaped(write.cast(found.scale, wide, "scale_cast"), factor_shape, "weight_scale")
    weight = write.cast(weight, wide, "weight_cast")
    if grouped is not None:
        weight = write.shaped(weight, grouped, "weight_grouped")
    # The last node carries the name the deploy form's constant has.
    follow = (["shape"] if grouped is not None else []) + (["cast"] if wide != dtype else [])
    result = write.op("Mul", "weight_scaled" if follow else "weight_fused", weight, factor)
    result.shape = ir.Shape(grouped or shape)
    if grouped is not None:
        result = write.shaped(result, shape, "weight_ungrouped" if "cast" in follow else "weight_fused")
    if "cast" in follow:
        result = write.op("Cast", "weight_fused", result, to=int(dtype))
    result.shape = ir.Shape(shape)
    return result


def make_live(
    layer: Layer, weight: ir.Value, bias: ir.Value | None, addend: ir.Value | None, model: Model
) -> ir.Value:
    """Let a layer read what :func:`tune_form` wrote. The parameters stay, under their names.

    Returns:
        The layer's output, after the addend if there is one. Readers are not moved to it.
    """
    node, output = layer.node, layer.node.outputs[0]
    node.replace_input_with(layer.weight_index, weight)
    if bias is not None:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, bias)
        node.attributes.pop("beta", None)
    if addend is None:
        return output
    props = dict(node.metadata_props)
    add = ir.Node("", "Add", [output, addend], num_outputs=1, metadata_props=props)
    result = add.outputs[0]
    result.name = model.unique_name(f"{output.name}_shifted")
    result.type, result.shape = output.type, output.shape
    if node.graph is not None:
        node.graph.insert_after(node, add)
    return result


def activation_bytes(value: ir.Value) -> int | None:
    """Bytes of a value that training no longer keeps; None where its size is not fixed."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return None
    return int(math.prod(value.shape.numpy()) * value.dtype.itemsize)

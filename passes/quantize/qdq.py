"""Write a plan into the graph: QuantizeLinear and DequantizeLinear around what runs in 8 bits.

Every activation gets one pair, which all its readers share. A Relu or Clip whose work the range of the
codes does is removed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import Encoding
from effic.ir.model import Model, constant_array, constant_tensor
from effic.ir.weights import WeightSite
from effic.passes.cleanup.scopes import drop_unused_initializer, prune
from effic.passes.quantize.integer_layers import IntegerWeight, bias_codes, bias_scales
from effic.passes.quantize.placement import SUMS, Layer, Plan, Rectifier
from effic.passes.quantize.ranges import ByteGrid, Thresholds, byte_grid


def write_activations(
    model: Model, plan: Plan, ranges: Mapping[ir.Value, Thresholds]
) -> dict[ir.Value, ByteGrid]:
    """Put a pair after every activation of the plan.

    Returns:
        The grid of each of the plan's values, and of the dequantized value that stands for it now.
    """
    writer = _Pairs(model, plan)
    rectifiers = {r.output: (value, r) for value, r in plan.rectified.items()}
    grids: dict[ir.Value, ByteGrid] = {}
    for value in plan.values:
        grid = byte_grid(ranges[value])
        source, lone = value, None
        if value in rectifiers and _does_its_work(rectifiers[value][1], grid):
            source, lone = rectifiers[value][0], rectifiers[value][1].node
        grids[value] = grids[writer.put(value, source, grid, lone)] = grid
    for node in plan.others:
        if node.op_type in SUMS:
            _write_constants(model, node)
    return grids


def _does_its_work(rectifier: Rectifier, grid: ByteGrid) -> bool:
    """Whether the codes reach no further than the bounds, up to the rounding of the scale."""
    low = float(grid.scale) * (0 - int(grid.zero_point))
    high = float(grid.scale) * (255 - int(grid.zero_point))
    slack = 1e-5 * (high - low)
    return bool(rectifier.low <= low + slack and high - slack <= rectifier.high)


class _Pairs:
    """Puts QuantizeLinear and DequantizeLinear; values of equal grids share their constants."""

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model = model
        self.floats = {
            value
            for layer in plan.layers
            if layer.node.op_type in ("Gemm", "MatMul")
            for value in layer.node.outputs
        }
        self._constants: dict[tuple[float, int], tuple[ir.Value, ir.Value]] = {}

    def put(self, value: ir.Value, source: ir.Value, grid: ByteGrid, lone: ir.Node | None) -> ir.Value:
        """Let all readers of ``value`` read its dequantized form.

        Args:
            value: the activation.
            source: what is quantized: ``value``, or what a Relu makes it of that goes away.
            grid: of the codes.
            lone: that Relu.

        Returns:
            The dequantized value.
        """
        model, graph = self.model, self.model.graph
        name = value.name or "activation"
        uses = [(use.node, use.idx) for use in value.uses()]
        scale, zero = self._parameters(name, grid)
        quantize = ir.node("QuantizeLinear", [source, scale, zero])
        codes = quantize.outputs[0]
        codes.name = quantize.name = model.unique_name(f"{name}.codes")
        codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), value.shape
        dequantize = ir.node("DequantizeLinear", [codes, scale, zero])
        out = dequantize.outputs[0]
        out.name = dequantize.name = model.unique_name(f"{name}.dequantized")
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        producer = source.producer()
        if producer is not None:
            graph.insert_after(producer, [quantize, dequantize])
        elif len(graph):
            graph.insert_before(graph[0], [quantize, dequantize])
        for node, index in uses:
            node.replace_input_with(index, out)
        # What a layer gives out in floating point stays as exact as it is.
        if value.is_graph_output() and (
            lone is not None or (producer is not None and value not in self.floats)
        ):
            _move_output(model, value, out)
        if lone is not None:
            prune([lone])
        return out

    def _parameters(self, name: str, grid: ByteGrid) -> tuple[ir.Value, ir.Value]:
        key = (float(grid.scale), int(grid.zero_point))
        if key not in self._constants:
            graph = self.model.graph
            self._constants[key] = (
                self.model.add_initializer(graph, f"{name}.scale", np.asarray(grid.scale)),
                self.model.add_initializer(graph, f"{name}.zero_point", np.asarray(grid.zero_point)),
            )
        return self._constants[key]


def _move_output(model: Model, old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be the graph output that ``old`` is, under its name."""
    graph = model.graph
    for number, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[number] = new
    name, old.name = old.name, model.unique_name(f"{old.name}.float")
    new.name, new.type, new.shape = name, old.type, old.shape


def _write_constants(model: Model, node: ir.Node) -> None:
    """Let a sum or product read its constants as codes."""
    for index, value in enumerate(node.inputs):
        array = constant_array(value)
        if array is None or value is None or array.size == 0:
            continue
        grid = byte_grid(Thresholds(min(float(array.min()), 0.0), max(float(array.max()), 0.0)))
        codes = np.clip(np.rint(array / grid.scale) + grid.zero_point, 0, 255).astype(np.uint8)
        name = value.name or "constant"
        inputs = [
            model.add_initializer(model.graph, f"{name}.{role}", np.asarray(part))
            for role, part in (("codes", codes), ("scale", grid.scale), ("zero_point", grid.zero_point))
        ]
        dequantize = ir.node("DequantizeLinear", inputs)
        out = dequantize.outputs[0]
        out.name = dequantize.name = model.unique_name(f"{name}.dequantized")
        out.type, out.shape = value.type, value.shape
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(index, out)
        _drop(value)


def weight_encoding(model: Model, site: WeightSite, weight: IntegerWeight, *, per_channel: bool) -> Encoding:
    """A weight's codes as the file stores them.

    Args:
        model: whose scratch folder takes large codes.
        site: the weight.
        weight: ``[out, in]``.
        per_channel: whether the scales differ between output channels.
    """
    stored = weight.codes if site.in_axis == 1 else weight.codes.T
    tensor = model.scratch.tensor(
        site.name, np.ascontiguousarray(stored).reshape(site.shape), ir.DataType.INT8
    )
    return Encoding(
        codes=tensor,
        scales=weight.scales if per_channel else np.asarray(weight.scales[0]),
        zero_points=None,
        axis=1 - site.in_axis if per_channel else 0,
        block_size=0,
        bits=8,
        shape=site.shape,
        weight=site.name,
    )


def write_bias(model: Model, layer: Layer, bias: np.ndarray, step: float, scales: np.ndarray) -> None:
    """Let a layer read its bias as 32-bit codes.

    Args:
        model: the model.
        layer: Conv or Gemm.
        bias: float32 ``[out]``.
        step: of the layer's input.
        scales: of its weight, ``[out]``.
    """
    node = layer.node
    old = node.inputs[2] if len(node.inputs) > 2 else None
    base = layer.bias_name
    steps = bias_scales(step, scales)
    codes = model.add_initializer(model.graph, f"{base}.codes", bias_codes(bias, steps))
    factors = model.add_initializer(model.graph, f"{base}.scales", steps)
    dequantize = ir.node("DequantizeLinear", [codes, factors], attributes={"axis": 0})
    out = dequantize.outputs[0]
    out.name = dequantize.name = model.unique_name(f"{base}.dequantized")
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(bias.shape)
    model.graph.insert_before(node, dequantize)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, out)
    _drop(old)


def _drop(value: ir.Value | None) -> None:
    """Remove a constant that nothing reads any more."""
    if value is None or value.uses() or value.is_graph_output():
        return
    if (node := value.producer()) is not None:
        prune([node])
    elif constant_tensor(value) is not None:
        drop_unused_initializer(value)

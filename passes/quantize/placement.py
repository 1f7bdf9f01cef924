"""Which operators of a model run on 8-bit activations, and which activations that makes 8-bit.

Layers with weights come first. What lies between two of them (residual sums, concatenation, pooling,
operators that only move elements) follows, so that a value stays in 8 bits from one layer to the next.
What lies before the first layer or after the last stays in floating point: it is cheap, and it is
where models normalise images and compute boxes and scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effic.ir.compressed import tensor_of
from effic.ir.model import ONNX_DOMAINS, Model, constant_array, constant_tensor, describe, sole_consumer
from effic.ir.topology import read_values
from effic.ir.weights import WeightSite, WeightUse, weight_sites
from effic.passes.base import Remarks, matches
from effic.passes.quantize.weight_only import matches_site

LAYERS = ("Conv", "Gemm", "MatMul")
# With a scale of their own on each side.
SUMS = ("Add", "Mul", "Concat")
POOLS = ("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
# The same codes come out as go in, elsewhere or fewer: the scale is the same on both sides.
MOVES = (
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split",
    "DepthToSpace", "Resize",
)  # fmt: skip
KINDS = (*LAYERS, *SUMS, *POOLS, *MOVES)


@dataclass(eq=False)
class Layer:
    """A node with a weight that runs on 8-bit activations.

    Attributes:
        node: Conv, Gemm or MatMul.
        site: its weight.
        bias: its constant bias ``[out]``, None for none.
        bias_name: what the bias is called, or would be.
    """

    node: ir.Node
    site: WeightSite
    bias: np.ndarray | None
    bias_name: str

    @property
    def input(self) -> ir.Value:
        """The activation it reads."""
        value = self.node.inputs[0]
        assert value is not None  # eligible() requires it
        return value

    @property
    def channel_axis(self) -> int:
        """Axis of the output that numbers its channels."""
        return 1 if self.node.op_type == "Conv" else -1


@dataclass(eq=False)
class Plan:
    """What is to be done.

    Attributes:
        layers: nodes with weights, in order.
        others: the nodes between them, in order.
        rectified: for each output that only a Relu or Clip reads: that node, and its bounds.
        values: activations that get codes, each once, in order; a rectified output as the
            activation function leaves it.
    """

    layers: list[Layer]
    others: list[ir.Node] = field(default_factory=list)
    rectified: dict[ir.Value, Rectifier] = field(default_factory=dict)
    values: list[ir.Value] = field(default_factory=list)

    @property
    def nodes(self) -> list[ir.Node]:
        """All nodes that run on 8-bit activations."""
        return [*(layer.node for layer in self.layers), *self.others]


@dataclass(frozen=True, eq=False)
class Rectifier:
    """A Relu or Clip right after a quantized node: the range of the codes can do its work.

    Attributes:
        node: the Relu or Clip.
        low, high: its constant bounds.
    """

    node: ir.Node
    low: float
    high: float

    @property
    def output(self) -> ir.Value:
        """The rectified value."""
        return self.node.outputs[0]


def layers(
    model: Model, kinds: tuple[str, ...], skip: tuple[str, ...], remarks: Remarks, *, quiet: bool = False
) -> list[Layer]:
    """The layers that can be quantized; the others are remarked as missed, with the reason."""
    found: list[Layer] = []
    order = {node: number for number, node in enumerate(model.graph)}
    for site in weight_sites(model, set(kinds) & set(LAYERS)):
        uses = [use for use in site.uses if use.node.op_type in LAYERS]
        if _is_quantized(site):
            continue
        if reason := why_not(model, site, kinds, skip):
            remarks.missed(site.name, reason)
            continue
        found += [Layer(use.node, site, bias_of(use), _bias_name(use)) for use in uses]
    if "Conv" in kinds:
        for site in weight_sites(model, {"ConvTranspose"}):
            remarks.missed(site.name, "is a ConvTranspose's; runtimes have no 8-bit kernel for it")
    found.sort(key=lambda layer: order[layer.node])
    for layer in found:
        if norm := _norm_after(layer.node):
            remarks.missed(
                norm, "is not folded and runs in floating point on 8-bit values; run fuse-conv-bn first"
            )
    return found


def why_not(model: Model, site: WeightSite, kinds: tuple[str, ...], skip: tuple[str, ...]) -> str | None:
    """Why a weight and the layers that use it stay in floating point, as a phrase, or None."""
    if site.encoding is not None:
        return f"is already encoded, in {site.encoding.bits} bits"
    if site.why_not is not None:
        return site.why_not
    if matches_site(site, skip):
        return "is named in skip"
    if site.dtype != ir.DataType.FLOAT:
        return f"is {site.dtype.name}; 8-bit layers are made of FLOAT ones"
    if site.other_readers:
        return f"is read by {site.other_readers[0]} as well"
    if len({use.in_axis for use in site.uses}) > 1:
        return "is read both ways round"
    for use in site.uses:
        if reason := _why_not_use(model, site, use, kinds):
            return reason
    if not np.isfinite(site.read()).all():
        return "holds a weight that is infinite or not a number"
    return None


def _why_not_use(model: Model, site: WeightSite, use: WeightUse, kinds: tuple[str, ...]) -> str | None:
    node = use.node
    if node.graph is not model.graph:
        return f"is used by {describe(node)} inside a subgraph or function, whose activations cannot be seen"
    if node.op_type not in LAYERS or node.op_type not in kinds:
        return f"is read by {describe(node)} as well, which stays in floating point"
    if use.via:
        return f"lies behind {describe(use.via[0])}; run canonicalize-linear first"
    if use.index != 1:
        return f"is the left operand of {describe(node)}; integer kernels want it on the right"
    value = node.inputs[0]
    if value is None or constant_tensor(value) is not None:
        return f"is multiplied with a constant by {describe(node)}"
    if node.op_type == "Gemm" and (
        node.attributes.get_int("transA", 0) != 0
        or node.attributes.get_float("alpha", 1.0) != 1.0
        or node.attributes.get_float("beta", 1.0) != 1.0
    ):
        return f"is read by {describe(node)}, which transposes or scales; run canonicalize-linear first"
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias_of(use) is None:
        return f"is used by {describe(node)}, whose bias is not a constant per output channel"
    return None


def bias_of(use: WeightUse) -> np.ndarray | None:
    """The constant bias ``[out]`` of a Conv or Gemm, or None where it has none of that form."""
    inputs = use.node.inputs
    tensor = constant_tensor(inputs[2]) if len(inputs) > 2 else None
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    array = np.array(tensor.numpy(), np.float32)
    weight = constant_tensor(inputs[1])
    if weight is None:
        return None
    turned = use.node.op_type == "Conv" or use.node.attributes.get_int("transB", 0) == 1
    out = int(weight.shape.numpy()[0 if turned else 1])
    if array.size not in (1, out) or (array.size == out and array.ndim > 1 and array.shape[-1] != out):
        return None
    if not np.isfinite(array).all():
        return None
    return np.array(np.broadcast_to(array.reshape(-1), (out,)))


def _bias_name(use: WeightUse) -> str:
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    return (bias.name if bias is not None else None) or f"{use.node.outputs[0].name}.bias"


def _is_quantized(site: WeightSite) -> bool:
    """Whether its layers work on quantized activations already."""
    return any(is_dequantized(use.node.inputs[0]) for use in site.uses)


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value is an activation that comes out of a DequantizeLinear."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear" and tensor_of(node.inputs[0]) is None


def _norm_after(node: ir.Node) -> ir.Node | None:
    reader = sole_consumer(node.outputs[0])
    return reader if reader is not None and reader.op_type == "BatchNormalization" else None


def ends(model: Model, found: list[Layer]) -> tuple[set[ir.Node], set[ir.Node]]:
    """The layers that no other layer comes before, and those that none comes after."""
    nodes = {layer.node for layer in found}
    behind = _reached(model.graph, nodes)
    ahead = _reaching(model.graph, nodes)
    return {n for n in nodes if n not in behind}, {n for n in nodes if n not in ahead}


def _reached(graph: ir.Graph, start: set[ir.Node]) -> set[ir.Node]:
    """The nodes that some node of ``start`` feeds, directly or not."""
    found: set[ir.Node] = set()
    for node in graph:
        if any(
            (p := value.producer()) is not None and (p in start or p in found) for value in read_values(node)
        ):
            found.add(node)
    return found


def _reaching(graph: ir.Graph, end: set[ir.Node]) -> set[ir.Node]:
    """The nodes that feed some node of ``end``, directly or not."""
    found: set[ir.Node] = set()
    for node in reversed(graph):
        if node in end or node in found:
            found.update(p for value in read_values(node) if (p := value.producer()) is not None)
    return found


def between(model: Model, found: list[Layer]) -> list[ir.Node]:
    """The nodes that some layer comes before and some layer comes after."""
    nodes = {layer.node for layer in found}
    behind, ahead = _reached(model.graph, nodes), _reaching(model.graph, nodes)
    return [node for node in model.graph if node in behind and node in ahead]


def place(
    model: Model, found: list[Layer], kinds: tuple[str, ...], skip: tuple[str, ...], remarks: Remarks
) -> Plan:
    """Choose the nodes and activations to quantize around some layers."""
    plan = Plan(found)
    layer_nodes = {layer.node for layer in found}
    inner = set(between(model, found))
    codes: set[ir.Value] = set()
    for node in model.graph:
        if node in layer_nodes:
            codes.update(_outcome(plan, value) for value in node.outputs)
        elif node in inner and node.domain in ONNX_DOMAINS and node.op_type in (*SUMS, *POOLS, *MOVES):
            if reason := _why_not_between(node, codes, kinds, skip):
                remarks.missed(node, reason)
                continue
            plan.others.append(node)
            codes.update(_outcome(plan, value) for value in node.outputs)
    plan.values = _values(model, plan)
    chosen = set(plan.values)
    plan.rectified = {value: r for value, r in plan.rectified.items() if r.output in chosen}
    return plan


def _why_not_between(
    node: ir.Node, codes: set[ir.Value], kinds: tuple[str, ...], skip: tuple[str, ...]
) -> str | None:
    """Why an operator between layers stays in floating point, or None."""
    if node.op_type not in kinds:
        return "is not among the kinds to quantize"
    if matches_node(node, skip):
        return "is named in skip"
    read = [value for value in node.inputs if value is not None]
    if node.op_type in SUMS:
        constants = [value for value in read if constant_tensor(value) is not None]
        if len(constants) == len(read):
            return "reads constants only"
        if any(not _is_finite_float(value) for value in constants):
            return "reads a constant that is no finite FLOAT"
        read = [value for value in read if value not in constants]
    else:
        read = read[:1]
    if any(value not in codes for value in read):
        return "reads a value that stays in floating point"
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        return "interpolates, which runtimes do in floating point"
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return "gives indices as well"
    if node.op_type == "Pad" and pad_value(node) is None:
        return "pads with a value computed at run time"
    if node.op_type in MOVES and any(constant_tensor(v) is None for v in node.inputs[1:] if v is not None):
        # A runtime may refuse to move 8-bit values about by a shape it does not know.
        return None if node.op_type in ("Reshape", "Slice") else "takes an argument computed at run time"
    return None


def _is_finite_float(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return (
        tensor is not None and tensor.dtype == ir.DataType.FLOAT and bool(np.isfinite(tensor.numpy()).all())
    )


def matches_node(node: ir.Node, patterns: tuple[str, ...]) -> bool:
    """Whether a node's name, or ``kind:`` and its operator, matches a pattern."""
    return any(matches(name, patterns) for name in (node.name or "", f"kind:{node.op_type}"))


def pad_value(node: ir.Node) -> float | None:
    """The number a Pad writes, zero where it copies, or None when it is computed at run time."""
    mode = node.attributes.get("mode")
    if mode is not None and (mode.is_ref() or mode.as_string() != "constant"):
        return None if mode.is_ref() else 0.0
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return 0.0
    value = constant_array(node.inputs[2])
    return float(value.reshape(())) if value is not None and np.isfinite(value).all() else None


def _outcome(plan: Plan, value: ir.Value) -> ir.Value:
    """The value that gets the codes of a node's output: itself, or what a lone Relu or Clip makes of it."""
    producer, reader = value.producer(), sole_consumer(value)
    if reader is None or producer is None or producer.op_type in MOVES or reader.graph is not producer.graph:
        return value
    bounds = _bounds(reader)
    if bounds is None or reader.inputs[0] is not value:
        return value
    plan.rectified[value] = Rectifier(reader, *bounds)
    return reader.outputs[0]


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """The constant bounds of a Relu or Clip."""
    if node.domain not in ONNX_DOMAINS:
        return None
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    bounds = [float("-inf"), float("inf")]
    for at, name in enumerate(("min", "max")):
        if len(node.inputs) > at + 1 and node.inputs[at + 1] is not None:
            array = constant_array(node.inputs[at + 1])
            if array is None or array.size != 1:
                return None
            bounds[at] = float(array.reshape(()))
        elif name in node.attributes:
            return None  # the form before opset 11, or a reference; the runner raises the opset first
    low, high = bounds
    return (low, high) if low <= high else None


def _values(model: Model, plan: Plan) -> list[ir.Value]:
    """Every activation that a quantized node reads or has to write as codes, each once, in order."""
    quantized = set(plan.nodes)
    found: dict[ir.Value, None] = {}
    for node in (n for n in model.graph if n in quantized):
        for value in inputs_of(node):
            found[value] = None
    for node in (n for n in model.graph if n in quantized):
        if node.op_type in ("Gemm", "MatMul"):
            # Integer kernels for these can give floating-point results: nothing is lost for nothing.
            continue
        for value in node.outputs:
            outcome = plan.rectified[value].output if value in plan.rectified else value
            found[outcome] = None
    return list(found)


def inputs_of(node: ir.Node) -> Iterable[ir.Value]:
    """The activations a quantized node reads."""
    read = node.inputs if node.op_type in SUMS else node.inputs[:1]
    return (value for value in read if value is not None and constant_tensor(value) is None)

"""What a model's constants become when it runs: who reads them, what is decoded when, what lives at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe

if TYPE_CHECKING:
    from effic.ir.cost import ModelCost

_LINEAR = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_RANDOM = ("RandomNormal", "RandomUniform", "Multinomial", "Bernoulli")
_OWN_PRODUCTS = ("MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class Constants:
    """The nodes of a model that compute from constants alone, and who reads the constants in the end.

    Args:
        model: the model; it is not changed.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._derived: set[int] = set()
        for graph in model.graphs():
            for node in graph:
                inputs = [value for value in node.inputs if value is not None]
                if (
                    node.op_type != "Constant"
                    and inputs
                    and all(self.is_constant(value) for value in inputs)
                    and not node.op_type.startswith(_RANDOM)
                    and not any(attr.type in _GRAPHS for attr in node.attributes.values())
                ):
                    self._derived.add(id(node))

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value is a constant, or computed from constants alone."""
        return constant_tensor(value) is not None or self.is_derived(value.producer())

    def is_derived(self, node: ir.Node | None) -> bool:
        """Whether a node computes from constants alone."""
        return node is not None and id(node) in self._derived

    def readers(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes that read a constant together with activations, behind the nodes that decode it."""
        seen: set[int] = set()
        todo = [use.node for use in value.uses()]
        while todo:
            node = todo.pop(0)
            if id(node) in seen:
                continue
            seen.add(id(node))
            if self.is_derived(node):
                todo += [use.node for output in node.outputs for use in output.uses()]
            else:
                yield node

    def stored(self) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
        """Every constant and its tensor: initializers and Constant nodes."""
        for graph in self.model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value, value.const_value
        for node in self.model.nodes("Constant"):
            tensor = constant_tensor(node.outputs[0])
            if tensor is not None:
                yield node.outputs[0], tensor


def float_weights(model: Model) -> dict[str, int]:
    """Nodes that multiply by a weight stored in floating point, largest weight first, each once (1)."""
    from effic.ir.weights import weight_sites

    found: dict[str, int] = {}
    for site in weight_sites(model, _LINEAR):
        tensor = constant_tensor(site.value)
        if site.encoding is None and tensor is not None and tensor.dtype.is_floating_point():
            for use in site.uses:
                if use.node.op_type in _LINEAR:
                    found[describe(use.node)] = tensor.nbytes
    return _ones(found)


def decoded_weights(model: Model) -> dict[str, int]:
    """Weights that a DequantizeLinear decodes at every run, by the name of their codes, each once (1).

    Those of operators that the runtime fuses with their quantized activations are left out.
    """
    from effic.backends.ort.decode_at_load import runtime_dequantized

    found: dict[str, int] = {}
    for node in runtime_dequantized(model):
        codes = node.inputs[0]
        tensor = constant_tensor(codes)
        name = (codes.name if codes is not None else None) or describe(node)
        found[name] = 0 if tensor is None else tensor.nbytes
    return _ones(found)


def _ones(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict.fromkeys(sorted(sizes, key=lambda name: (-sizes[name], name)), 1)


def peak_bytes(constants: Constants, cost: ModelCost) -> tuple[int | None, dict[str, int], str]:
    """Weights and the largest set of activations that live at once in one run, in bytes.

    Nodes run in the order of the file; an activation lives from the node that makes it to the last that
    reads it, inputs and outputs of the model throughout. What is computed from constants alone is held
    like a weight, except what a DequantizeLinear decodes, which is made at every run. Dynamic dimensions
    count as 1. A runtime may share buffers or need scratch space of its own: this is a figure to hold a
    model to, not the size of a process.

    Returns:
        The figure, or None; what it is made of at the peak; why it is None.
    """
    graph, sizes = constants.model.graph, _Sizes(constants.model, cost)
    for node in graph:
        if any(attr.type in _GRAPHS for attr in node.attributes.values()):
            return None, {}, f"{describe(node)} runs a graph of its own, whose activations nobody can tell"
        if node.op_identifier() in constants.model.ir.functions:
            return None, {}, f"{describe(node)} calls a function, whose activations nobody can tell"
    live: dict[str, int] = {}
    last: dict[str, int] = {}
    order = [node for node in graph if node.op_type != "Constant"]
    for number, node in enumerate(order):
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name:
                last[value.name] = number
    for value in graph.inputs:
        if not value.is_initializer():
            if (size := sizes.of(value)) is None:
                return None, {}, f"the input '{value.name}' has an unknown shape or type; declare it"
            live[value.name or ""] = size
    kept = {*live, *(value.name for value in graph.outputs)}
    folded = {id(n) for n in order if constants.is_derived(n) and n.op_type != "DequantizeLinear"}
    for node in order:
        if id(node) in folded and any(id(made) not in folded for made in _producers(node)):
            folded.discard(id(node))
    held = cost.weight_bytes
    most, rows = sum(live.values()), dict(live)
    for number, node in enumerate(order):
        for value in node.outputs:
            if not value.name:
                continue
            if id(node) in folded and all(id(use.node) in folded for use in value.uses()):
                continue  # a step on the way, which is forgotten once the file is loaded
            if (size := sizes.of(value)) is None:
                return None, {}, f"the output '{value.name}' of {describe(node)} has an unknown shape or type"
            if id(node) in folded:
                held += size
            else:
                live[value.name] = size
        if sum(live.values()) > most:
            most, rows = sum(live.values()), dict(live)
        for name in [n for n in live if last.get(n, -1) <= number and n not in kept]:
            del live[name]
    rows["(weights)"] = held
    return held + most, dict(sorted(rows.items(), key=lambda item: -item[1])), ""


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        if value is not None and (made := value.producer()) is not None and made.op_type != "Constant":
            yield made


class _Sizes:
    """Bytes of values, dynamic dimensions counted as 1; inferred where the model does not declare them."""

    def __init__(self, model: Model, cost: ModelCost) -> None:
        self._model, self._dims = model, cost.dims
        self._shapes: Mapping[str, tuple[int, ...] | None] | None = None
        self._types: dict[str | None, ir.DataType | None] = {}

    def of(self, value: ir.Value) -> int | None:
        """Bytes of a value, or None when its shape or type is unknown."""
        shape, dtype = self._shape(value), value.dtype
        if dtype is None:
            self._infer()
            dtype = self._types.get(value.name)
        if shape is None or dtype is None or dtype == ir.DataType.STRING:
            return None
        return -(-math.prod(shape) * dtype.bitwidth // 8)

    def _shape(self, value: ir.Value) -> tuple[int, ...] | None:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else self._dims.get(str(d.value)) for d in value.shape]
            if None not in dims:
                return tuple(d for d in dims if d is not None)
        return self._infer().get(value.name or "")

    def _infer(self) -> Mapping[str, tuple[int, ...] | None]:
        if self._shapes is None:
            from onnx_ir.passes.common import ShapeInferencePass

            from effic.ir.shapes import static_shapes

            copy = self._model.clone()
            for node in list(copy.graph):
                _make_standard(copy, node)
            self._shapes = static_shapes(copy, self._dims)
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(copy.ir)
            self._types = {value.name: value.dtype for node in copy.graph for value in node.outputs}
        return self._shapes


def _make_standard(model: Model, node: ir.Node) -> None:
    """Put a standard operator of the same result in place of one of ONNX Runtime's own, for inference.

    Its weight becomes an input of the model: only its shape counts.
    """
    if node.op_type not in _OWN_PRODUCTS and node.op_type != "GatherBlockQuantized":
        return
    index = 0 if node.op_type == "GatherBlockQuantized" else 1
    codes, scales = constant_tensor(node.inputs[index]), node.inputs[2]
    kind = (None if scales is None else scales.dtype) or ir.DataType.FLOAT
    if node.op_type == "MatMulNBits":
        shape = [node.attributes["K"].as_int(), node.attributes["N"].as_int()]
    elif codes is None:
        return
    elif index == 0:
        rows, bits = int(codes.shape[0]), node.attributes.get_int("bits", 4)  # type: ignore[arg-type]
        shape = [rows, codes.size * codes.dtype.bitwidth // bits // max(1, rows)]
    else:
        shape = [int(d) for d in codes.shape]  # type: ignore[arg-type]
    weight = ir.val(model.unique_name("weight"), kind, shape)
    model.graph.inputs.append(weight)
    if node.op_type == "MatMulIntegerToFloat":
        cast = ir.node("Cast", [node.inputs[0]], {"to": int(kind)})
        cast.outputs[0].name = model.unique_name("cast")
        model.graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])
    node.replace_input_with(index, weight)
    node.resize_inputs(2)
    node.attributes.clear()
    node.domain, node.op_type = "", "Gather" if index == 0 else "MatMul"

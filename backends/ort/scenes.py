"""What the lowering passes need to know about the surroundings of an encoded weight."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from effic.ir.compressed import tensor_of
from effic.ir.encodings import ENCODING_KEY, Encoding, encoding_nodes, recognise
from effic.ir.errors import UnsupportedError
from effic.ir.model import ONNX_DOMAINS, Model, describe

MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedInput:
    """An encoded weight as a node reads it.

    Attributes:
        value: the decoded weight, before any Transpose.
        encoding: what it decodes.
        transposed: whether the node sees it with its two axes exchanged.
    """

    value: ir.Value
    encoding: Encoding
    transposed: bool

    @property
    def dequantize(self) -> ir.Node:
        """The DequantizeLinear node."""
        return encoding_nodes(self.value)[-1]

    @property
    def name(self) -> str:
        """The weight's name, as people know it."""
        return self.encoding.weight or self.dequantize.inputs[0].name or "weight"  # type: ignore[union-attr]


def encoded_input(value: ir.Value | None) -> EncodedInput | None:
    """The encoding a node's input carries, perhaps through a Transpose of a matrix, or None."""
    transposed = False
    while value is not None:
        node = value.producer()
        if node is None or node.op_type != "Transpose" or node.domain not in ONNX_DOMAINS:
            break
        perm = node.attributes.get("perm")
        if perm is not None and (perm.is_ref() or list(perm.as_ints()) != [1, 0]):
            break
        if perm is None and (
            node.inputs[0] is None or node.inputs[0].shape is None or len(node.inputs[0].shape) != 2
        ):
            break
        transposed, value = not transposed, node.inputs[0]
    encoding = recognise(value)
    return None if value is None or encoding is None else EncodedInput(value, encoding, transposed)


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph a node lies in.

    Raises:
        UnsupportedError: it lies in none (it was taken out meanwhile).
    """
    if not isinstance(node.graph, ir.Graph):
        raise UnsupportedError(f"{describe(node)} lies in no graph, so nothing can be put beside it")
    return node.graph


def statically_quantized(node: ir.Node) -> bool:
    """Whether ``node`` works on quantized activations, which the runtime fuses into integer kernels.

    There the weight's DequantizeLinear is part of a pattern (``DequantizeLinear`` on every input,
    ``QuantizeLinear`` on the output) and must stay.
    """
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if (
            producer is not None
            and producer.op_type == "DequantizeLinear"
            and tensor_of(producer.inputs[0]) is None
        ):
            return True
    readers = [use.node for output in node.outputs for use in output.uses()]
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)


def import_domain(model: Model, node: ir.Node) -> None:
    """Import the runtime's operators where ``node`` lives: the model, and its function if any."""
    model.ir.opset_imports.setdefault(MICROSOFT, 1)
    graph = node.graph
    for function in model.ir.functions.values():
        if graph is function.graph or any(graph is sub for sub in function.subgraphs()):
            function.opset_imports.setdefault(MICROSOFT, 1)


def put(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, int] | None = None,
    *,
    domain: str = "",
    like: ir.Node | None = None,
) -> ir.Node:
    """A new node before another, with one unnamed output.

    Args:
        before: where it goes.
        op_type, inputs, attributes, domain: of the new node; trailing Nones are left out.
        like: node whose name and metadata it takes over (module paths, say).
    """
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node = ir.node(
        op_type, inputs, attributes=attributes or {}, domain=domain, name=like.name if like else None
    )
    if like is not None:
        node.metadata_props.update(like.metadata_props)
    graph_of(before).insert_before(before, node)
    return node


def put_named(
    model: Model, name: str, before: ir.Node, op_type: str, inputs: list[ir.Value | None], **more: int
) -> ir.Value:
    """The output of a new standard node before another, named after ``name``."""
    node = put(before, op_type, inputs, dict(more))
    value = node.outputs[0]
    # The runtime refuses two nodes of one name, which two decodings of one weight would have.
    value.name = node.name = model.unique_name(name)
    return value


def take_over(model: Model, old: ir.Node, new: ir.Value) -> None:
    """Let ``new`` stand for the only output of ``old``, name and type included; remove ``old``."""
    value = old.outputs[0]
    name = value.name
    new.type, new.shape = new.type or value.type, new.shape or value.shape
    if not value.is_graph_output():
        value.replace_all_uses_with(new)
        value.name = None
        new.name = name
    else:
        new.name = new.name or model.unique_name(f"{name}.lowered")
        model.replace_value(value, new)
    graph_of(old).remove(old, safe=True)


def remove_unread(nodes: list[ir.Node]) -> None:
    """Remove nodes nothing reads any more, with the constants only they read."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        for value in inputs:
            producer = value.producer()
            if producer is not None:
                if _is_decoding(producer):
                    todo.append(producer)
            elif value.is_initializer() and not value.uses() and not value.is_graph_output():
                graph = value.graph
                if graph is not None and not value.is_graph_input():
                    graph.initializers.pop(str(value.name))


def copy_note(source: ir.Node, target: ir.Node) -> None:
    """Carry the encoding's own description (true bits, group size) over to what replaces it."""
    if ENCODING_KEY in source.metadata_props:
        target.metadata_props[ENCODING_KEY] = source.metadata_props[ENCODING_KEY]


def _is_decoding(node: ir.Node) -> bool:
    steps = {"Constant", "DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity", "ScatterElements"}
    # What decompresses sparse weights.
    steps |= {"BitwiseXor", "Slice", "Gather", "Expand", "Mul", "Add"}
    return node.domain in ONNX_DOMAINS and node.op_type in steps

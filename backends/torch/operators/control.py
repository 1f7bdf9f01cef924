"""If, Loop, Scan."""

from __future__ import annotations

import operator

import onnx_ir as ir
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode, Results
from effic.backends.torch.convert import convert_nodes
from effic.backends.torch.functions import control
from effic.backends.torch.types import torch_dtype
from effic.ir.model import constant_tensor


def if_(node: OperatorNode, graph: GraphBuilder) -> Results:
    then, otherwise = node.attributes["then_branch"], node.attributes["else_branch"]
    condition: object = node.inputs[0]
    value = node.value(0)
    sizes = None if value is None else graph.size_array(value)
    if sizes is not None and sizes.size == 1:
        condition = sizes.reshape(-1)[0]
        if not isinstance(condition, fx.Node):
            # Known while building: the other branch is never run.
            chosen = then if condition else otherwise
            convert_nodes(chosen, graph)
            return tuple(graph.tensor(output) for output in chosen.outputs)
    then_body, then_reads = graph.body(then)
    else_body, else_reads = graph.body(otherwise)
    made = graph.call(control.branch, condition, then_body, else_body, then_reads, else_reads)
    return _unpack(graph, made, len(node.node.outputs))


def loop(node: OperatorNode, graph: GraphBuilder) -> Results:
    body: ir.Graph = node.attributes["body"]
    trips, value = node.input(0), node.value(0)
    count: object = trips
    sizes = None if value is None else graph.size_array(value)
    if sizes is not None and sizes.size == 1:
        count = sizes.reshape(-1)[0]
    going: object = node.input(1)
    known = node.constant(1) if node.input(1) is not None else None
    if known is not None:
        going = bool(known.reshape(-1)[0])
    module, reads = graph.body(body)
    carried = node.inputs[2:]
    if any(item is None for item in carried):
        node.refuse("carries a value that is left out")
    empty = []
    for output in body.outputs[1 + len(carried) :]:
        shape = (
            [dim if isinstance(dim, int) else 0 for dim in output.shape] if output.shape is not None else []
        )
        empty.append((tuple(shape), torch_dtype(output.dtype or ir.DataType.FLOAT)))
    made = graph.call(
        control.loop, count, going, module, carried, reads, graph.anchor(), _stops_itself(body), empty
    )
    return _unpack(graph, made, len(node.node.outputs))


def _stops_itself(body: ir.Graph) -> bool:
    """Whether the body may end the loop: not when it hands on the flag it was given, or constant true."""
    flag = body.outputs[0]
    while (producer := flag.producer()) is not None and producer.op_type in ("Identity", "Cast"):
        source = producer.inputs[0]
        if source is None:
            return True
        flag = source
    if len(body.inputs) > 1 and flag is body.inputs[1]:
        return False
    tensor = constant_tensor(flag)
    return tensor is None or not bool(tensor.numpy().reshape(-1)[0])


def scan(node: OperatorNode, graph: GraphBuilder) -> Results:
    if node.opset < 9:
        node.refuse("is of opset 8, whose Scan runs over a batch; convert the model to opset 9 or newer")
    body: ir.Graph = node.attributes["body"]
    sequences = int(node.attributes["num_scan_inputs"])
    states = len(node.inputs) - sequences
    stacked = len(node.node.outputs) - states
    module, reads = graph.body(body)

    def option(name: str, length: int) -> list[int]:
        return [int(item) for item in node.attributes.get(name, [0] * length)]

    made = graph.call(
        control.scan,
        module,
        node.inputs[:states],
        node.inputs[states:],
        reads,
        option("scan_input_axes", sequences),
        option("scan_input_directions", sequences),
        option("scan_output_axes", stacked),
        option("scan_output_directions", stacked),
    )
    return _unpack(graph, made, len(node.node.outputs))


def _unpack(graph: GraphBuilder, made: fx.Node, count: int) -> tuple[fx.Node, ...]:
    return tuple(graph.call(operator.getitem, made, i) for i in range(count))

"""Rows of scales and shifts: the batch norms and constant arithmetic that follow one another."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, sole_consumer
from effic.passes.fuse.reading import NORM, follow, is_candidate, is_pass_through


@dataclass(frozen=True, eq=False)
class Step:
    """One node of a row.

    Attributes:
        node: a batch norm, Neg, or Mul, Add, Sub or Div with a constant.
        value: what it acts on.
        crossed: Identity and Dropout nodes between the node before and this one.
    """

    node: ir.Node
    value: ir.Value
    crossed: tuple[ir.Node, ...] = ()


def is_norm(node: ir.Node) -> bool:
    """Whether a node is a batch norm."""
    return node.op_type == NORM


def steps_after(value: ir.Value, model: Model, arithmetic: bool = True) -> list[Step]:
    """The row that starts at ``value``, each result read by the next alone."""
    steps: list[Step] = []
    graph = value.graph
    while True:
        value, crossed = follow(value, model)
        node = sole_consumer(value)
        if node is None or node.graph is not graph or not is_candidate(node, value, arithmetic):
            return steps
        steps.append(Step(node, value, tuple(crossed)))
        value = node.outputs[0]


def steps_before(value: ir.Value, model: Model, arithmetic: bool = True) -> list[Step]:
    """The row that ends at ``value``, nearest last; ``value`` itself may be read by many."""
    steps: list[Step] = []
    value, _ = _back(value, model)
    graph = value.graph
    while (node := value.producer()) is not None:
        data = data_input(node)
        if data is None or node.graph is not graph or not is_candidate(node, data, arithmetic):
            break
        source, crossed = _back(data, model)
        if sole_consumer(source) is None:
            steps.insert(0, Step(node, data))
            break
        steps.insert(0, Step(node, data, crossed))
        value = source
    # What precedes the first step is not part of the row: its pass-through nodes stay.
    return [Step(steps[0].node, steps[0].value), *steps[1:]] if steps else steps


def _back(value: ir.Value, model: Model) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """``value`` before the Identity and Dropout nodes that made it, and those nodes in order."""
    crossed: list[ir.Node] = []
    while (node := value.producer()) is not None and is_pass_through(node, model):
        before = node.inputs[0]
        if before is None or sole_consumer(value) is None:
            break
        crossed.insert(0, node)
        value = before
    return value, tuple(crossed)


def data_input(node: ir.Node) -> ir.Value | None:
    """The input a batch norm or constant arithmetic acts on, should the node be one."""
    if len(node.inputs) != 2:
        return node.inputs[0] if node.inputs else None
    left, right = node.inputs
    return right if constant_tensor(left) is not None else left

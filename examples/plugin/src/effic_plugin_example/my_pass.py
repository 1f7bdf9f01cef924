"""Fold a negation into the addition or subtraction that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks, matches, option


@dataclass(frozen=True)
class MyPass(Pass):
    """Subtract what was negated and then added.

    Before:  n = Neg(b);  y = Add(a, n)
    After:   y = Sub(a, b)

    Missed when the negated value is read elsewhere, or is an output of the model.
    """

    name: ClassVar[str] = "my-pass"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    skip: tuple[str, ...] = option((), help="additions to leave alone, as patterns of node names")

    def apply(self, model: Model, remarks: Remarks) -> None:
        for add in list(model.nodes("Add")):
            left, right = add.inputs
            # Reading from the right first: a + (-b); the other way round is (-a) + b = b - a.
            for kept, negated in ((left, right), (right, left)):
                negation = negated.producer() if negated is not None else None
                if kept is None or negated is None or negation is None or not is_negation(negation):
                    continue
                if matches(add.name or "", self.skip):
                    remarks.missed(add, "named by skip")
                elif reason := why_not(negated):
                    remarks.missed(add, reason)
                else:
                    subtract(add, kept, negation)
                    remarks.passed(add, f"subtracts what {negation.name or 'Neg'} negated")
                break


def is_negation(node: ir.Node) -> bool:
    """Whether a node is ONNX's own Neg."""
    return node.op_type == "Neg" and node.domain in ("", "ai.onnx")


def why_not(negated: ir.Value) -> str | None:
    """Why the negation has to stay, or None."""
    if negated.is_graph_output():
        return "the negated value is an output of the model"
    if len(negated.uses()) > 1:
        return f"the negated value is read {len(negated.uses())} times"
    return None


def subtract(add: ir.Node, kept: ir.Value, negation: ir.Node) -> None:
    """Put ``Sub(kept, x)`` in the place of ``Add(kept, Neg(x))``."""
    graph, old = add.graph, add.outputs[0]
    if graph is None or negation.graph is None:
        return
    new = ir.node("Sub", [kept, negation.inputs[0]], name=add.name)
    new.outputs[0].name, new.outputs[0].shape, new.outputs[0].type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, add, [add], [new], [old], new.outputs)
    # Its own graph: the addition may stand in a branch or a loop body.
    negation.graph.remove(negation, safe=True)

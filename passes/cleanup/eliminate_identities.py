"""Remove operators whose result is their input, and merge pairs that undo each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.cleanup.identities import RULES
from effic.passes.cleanup.layout_pairs import MERGES
from effic.passes.cleanup.scopes import Scope, is_standard, prune, scopes
from effic.passes.cleanup.shapes import Shapes


@dataclass(frozen=True)
class EliminateIdentities(Pass):
    """Remove operators that return their input unchanged, and merge layout pairs.

    Before:  y = Transpose<perm=[1,0]>(x);  z = Transpose<perm=[1,0]>(y);  w = Identity(z)
    After:   readers of w read x

    Removed: Identity; Dropout in inference; Cast to the same type; Transpose, Reshape, Flatten,
    Expand, Tile, Pad, Slice and Squeeze without effect; Concat, Sum, Max, Min, Mean and Split of
    one; adding or subtracting 0, multiplying or dividing by 1, raising to 1 (where no broadcast
    hides in it). Merged: two Transposes, two Reshapes, two Squeezes or Unsqueezes; a Squeeze and
    an Unsqueeze of the same axes vanish. Adding 0 counts as no change although it turns -0 into
    0, which compares equal.

    Missed when it keeps the name of an output apart from an input, or when shapes are not known
    well enough to rule a broadcast out.
    """

    name: ClassVar[str] = "eliminate-identities"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        shapes = Shapes(model)
        for scope in scopes(model):
            for node in list(scope.graph):
                if node.graph is not None and is_standard(node):
                    _visit(node, scope, model, shapes, remarks)


def _visit(node: ir.Node, scope: Scope, model: Model, shapes: Shapes, remarks: Remarks) -> None:
    merge = MERGES.get(node.op_type)
    if merge is not None:
        feeders = [value.producer() for value in node.inputs if value is not None]
        text = merge(node, scope, model)
        if text:
            remarks.passed(node, text)
            prune(feeders)
    rule = RULES.get(node.op_type)
    same = rule(node, scope, shapes) if rule is not None else None
    if isinstance(same, str):
        remarks.missed(node, same)
    elif same is not None:
        _bypass(node, same, model, remarks)


def _bypass(node: ir.Node, same: ir.Value, model: Model, remarks: Remarks) -> None:
    """Let readers of the node's first output read ``same``, and remove the node if it may go."""
    output = node.outputs[0]
    needs_identity = output.is_graph_output() and (
        same.producer() is None
        or same.graph is not output.graph
        or same.is_graph_output()
        or same.is_graph_input()
    )
    if needs_identity and node.op_type == "Identity":
        redirected = len(output.uses())
        for user, index in tuple(output.uses()):
            user.replace_input_with(index, same)
        if redirected:
            remarks.passed(
                node, f"its {redirected} readers read '{same.name}'; it stays for the output's name"
            )
        else:
            remarks.missed(node, f"kept: it gives the output '{output.name}' a name apart from '{same.name}'")
        return
    # What the model declares of its inputs and outputs stays as it was, even where nothing is declared.
    if not (same.is_graph_input() or same.is_graph_output() or output.is_graph_output()):
        if same.type is None:
            same.type = output.type
        if same.shape is None:
            same.shape = output.shape
    name = same.name
    model.replace_value(output, same)
    prune([node])
    remarks.passed(node, f"removed: its result is '{name}'")

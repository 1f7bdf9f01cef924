"""Remove what no output of the model depends on."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.cleanup.scopes import (
    Scope,
    detach,
    drop_unused_initializer,
    is_standard,
    is_unused,
    scopes,
)


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove nodes, weights, functions and opset imports that no output depends on.

    Before:  y = Relu(x);  z = Exp(x)       (only y is an output)
    After:   y = Relu(x)

    Works in subgraphs and function bodies. Optional outputs at the end of a node's list that
    nothing reads (the mask of Dropout, the statistics of LayerNormalization) are dropped.

    Missed when a node in training mode keeps unread outputs: their number is part of its meaning.
    """

    name: ClassVar[str] = "eliminate-dead-code"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        # Inner graphs come last in the list and are done first: what only their dead nodes
        # captured is dead outside, then.
        for scope in reversed(scopes(model)):
            for node in reversed(list(scope.graph)):
                if is_unused(node):
                    detach(node)
                    remarks.passed(node, "removed: nothing reads it")
                else:
                    _drop_outputs(node, scope, remarks)
        for scope in scopes(model):
            for value in list(scope.graph.initializers.values()):
                if drop_unused_initializer(value):
                    remarks.passed(f"initializer '{value.name}'", "removed: nothing reads it")
        _remove_functions(model, remarks)
        _remove_imports(model, remarks)


def _drop_outputs(node: ir.Node, scope: Scope, remarks: Remarks) -> None:
    """Shorten the node's output list by the unread optional ones at its end."""
    outputs = node.outputs
    if len(outputs) < 2 or not is_standard(node):
        return
    first_optional = optional_outputs(node.op_type, scope.opset)
    if first_optional is None:
        return
    keep = len(outputs)
    while keep > first_optional and not (outputs[keep - 1].uses() or outputs[keep - 1].is_graph_output()):
        keep -= 1
    if keep == len(outputs):
        return
    if node.op_type == "BatchNormalization":
        mode = node.attributes.get("training_mode")
        if scope.opset < 14 or (mode is not None and (mode.is_ref() or mode.as_int())):
            remarks.missed(node, "its unread statistics stay: their presence means training mode")
            return
    dropped = ", ".join(f"'{value.name}'" for value in outputs[keep:] if value.name)
    node.resize_outputs(keep)
    if dropped:
        remarks.passed(node, f"dropped unread optional outputs {dropped}")


@functools.cache
def optional_outputs(op_type: str, opset: int) -> int | None:
    """Index of the first output of a standard operator from which on all are optional, or None."""
    if not onnx.defs.has(op_type, opset):
        return None
    kinds = [output.option for output in onnx.defs.get_schema(op_type, opset).outputs]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    if onnx.defs.OpSchema.FormalParameterOption.Variadic in kinds:
        return None
    first = len(kinds)
    while first and kinds[first - 1] == optional:
        first -= 1
    return max(first, 1) if first < len(kinds) else None


def _remove_functions(model: Model, remarks: Remarks) -> None:
    """Remove functions that no node of the main graph reaches, through other functions or not."""
    functions = model.ir.functions
    reached: set[ir.OperatorIdentifier] = set()
    waiting = [node.op_identifier() for node in model.graph.all_nodes()] if functions else []
    while waiting:
        key = waiting.pop()
        if key in functions and key not in reached:
            reached.add(key)
            waiting.extend(node.op_identifier() for node in functions[key].all_nodes())
    for key in [key for key in functions if key not in reached]:
        del functions[key]
        remarks.passed(f"function '{key[0]}:{key[1]}'", "removed: nothing calls it")


def _remove_imports(model: Model, remarks: Remarks) -> None:
    """Remove imports of domains without a node; the standard's import stays, files must have it."""
    used: Counter[str] = Counter(node.domain for node in model.graph.all_nodes())
    for function in model.ir.functions.values():
        # A body's operators are checked against the model's imports as well as the function's.
        inside = Counter(node.domain for node in function.all_nodes())
        used.update(inside)
        used[function.domain] += 1
        for domain in [d for d in function.opset_imports if d not in inside and d not in ONNX_DOMAINS]:
            del function.opset_imports[domain]
            remarks.passed(f"opset import '{domain}' of function '{function.name}'", "removed: unused")
    for domain in [d for d in model.ir.opset_imports if d not in used and d not in ONNX_DOMAINS]:
        del model.ir.opset_imports[domain]
        remarks.passed(f"opset import '{domain}'", "removed: no node is of that domain")

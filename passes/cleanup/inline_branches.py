"""Replace an If whose condition is constant by the branch it always takes."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor
from effic.passes.base import Remarks
from effic.passes.cleanup.scopes import Scope, is_standard, prune, scopes


def inline_branches(model: Model, remarks: Remarks) -> int:
    """Inline the taken branch of every If with a constant condition, outermost first.

    Names of the branch that are used elsewhere in the model are changed: a name may be shared by
    two branches, but not by a branch and the graph around it.

    Returns:
        Number of If nodes replaced.
    """
    count = 0
    names: Counter[str] | None = None
    for scope in scopes(model):
        labels: set[str] | None = None
        for node in list(scope.graph):
            if node.op_type != "If" or not is_standard(node):
                continue
            taken = _taken_branch(node)
            if taken is None:
                continue
            if scope.in_function and taken.initializers:
                remarks.missed(node, "its branch has initializers, which a function body cannot hold")
                continue
            if names is None:
                names = _all_names(model)
            if labels is None:
                labels = {each.name for each in scope.graph if each.name}
            _inline(node, taken, scope, model, names, labels)
            remarks.passed(node, "its condition is constant: replaced by the branch it takes")
            count += 1
    return count


def _taken_branch(node: ir.Node) -> ir.Graph | None:
    condition = constant_tensor(node.inputs[0])
    if condition is None or condition.size != 1:
        return None
    attr = node.attributes.get("then_branch" if condition.numpy().reshape(-1)[0] else "else_branch")
    return None if attr is None or attr.is_ref() else attr.as_graph()


def _all_names(model: Model) -> Counter[str]:
    names: Counter[str] = Counter()
    for graph in model.graphs():
        names.update(value.name for value in graph.inputs if value.name)
        names.update(list(graph.initializers))
        names.update(value.name for node in graph for value in node.outputs if value.name)
    return names


def _inline(
    node: ir.Node, branch: ir.Graph, scope: Scope, model: Model, names: Counter[str], labels: set[str]
) -> None:
    graph = scope.graph
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        _rename(value, model, names)
        graph.register_initializer(value)
    moved = list(branch)
    branch.remove(moved)
    for inner in moved:
        for value in inner.outputs:
            _rename(value, model, names)
        if inner.name in labels:
            # ONNX Runtime refuses two nodes of one name in a graph; the graph makes up a free one.
            inner.name = None
    graph.insert_before(node, moved)
    labels.update(inner.name for inner in moved if inner.name)
    for output, result in zip(node.outputs, results, strict=True):
        if output.uses() or output.is_graph_output():
            model.replace_value(output, result)
    prune([node])


def _rename(value: ir.Value, model: Model, names: Counter[str]) -> None:
    if value.name and names[value.name] > 1:
        names[value.name] -= 1
        value.name = model.unique_name(value.name)

"""Which nodes may give another result when they run again."""

from __future__ import annotations

import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor
from effic.passes.cleanup.scopes import int_attribute, is_standard

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)

# Domains whose operators are known to keep no state between runs, except for the names below.
PURE_DOMAINS = frozenset({*ONNX_DOMAINS, "ai.onnx.ml", "com.microsoft"})
RANDOM_WORDS = ("Random", "Dropout", "Sampling", "BeamSearch")


def why_impure(node: ir.Node, opset: int, impure: frozenset[ir.OperatorIdentifier]) -> str | None:
    """Why running the node twice may give two results, or None.

    Args:
        node: any node.
        opset: version of the standard operators where it stands.
        impure: the functions of :func:`impure_functions`.
    """
    key = node.op_identifier()
    if key in impure:
        return "it is, or calls, an operator of a domain that may keep a state, or a random one"
    if is_standard(node):
        if node.op_type in RANDOM or (node.op_type == "Dropout" and _drops(node, opset)):
            return "it is random"
        return None
    if node.domain == "com.microsoft" and any(word in node.op_type for word in RANDOM_WORDS):
        return "it is random"
    return None


def _drops(node: ir.Node, opset: int) -> bool:
    if opset < 7:
        return int_attribute(node, "is_test", 0) != 1
    if opset < 12 or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    mode = constant_tensor(node.inputs[2])
    return mode is None or bool(mode.numpy().reshape(-1)[0])


def impure_functions(model: Model) -> frozenset[ir.OperatorIdentifier]:
    """The operators of unknown domains in use, and the functions that reach one or are random."""
    functions = model.ir.functions
    callers: dict[ir.OperatorIdentifier, list[ir.OperatorIdentifier]] = {}
    impure: set[ir.OperatorIdentifier] = {
        key
        for key in {node.op_identifier() for node in model.graph.all_nodes()}
        if key not in functions and key[0] not in PURE_DOMAINS
    }
    waiting: list[ir.OperatorIdentifier] = []
    for key, function in functions.items():
        opset = function.opset_imports.get("", model.opset)
        for node in function.all_nodes():
            inner = node.op_identifier()
            if inner in functions:
                callers.setdefault(inner, []).append(key)
                continue
            if inner[0] not in PURE_DOMAINS:
                impure.add(inner)
            if inner[0] not in PURE_DOMAINS or why_impure(node, opset, frozenset()) is not None:
                waiting.append(key)
    while waiting:
        key = waiting.pop()
        if key not in impure:
            impure.add(key)
            waiting.extend(callers.get(key, ()))
    return frozenset(impure)

"""Compute equal things once, and store equal weights once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.compressed import tensor_of
from effic.ir.model import Model, constant_tensor, describe
from effic.ir.tensors import borrow
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.cleanup.randomness import impure_functions, why_impure
from effic.passes.cleanup.scopes import Scope, detach, is_standard, scopes, subgraphs_of

# Operators whose operands may be swapped without changing a bit of the result.
COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal"})

# A weight is told from others of its shape by this many bytes, spread over it; only where these
# agree is the whole of it read.
SAMPLE_BYTES = 256


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge nodes that compute the same thing, and initializers that hold the same bytes.

    Before:  a = Exp(x);  b = Exp(x);  y = Add(a, b)
    After:   a = Exp(x);  y = Add(a, a)

    Nodes are the same with equal operator, inputs and attributes (operands of Add, Mul and the
    like in either order). A node in a subgraph may use an equal node that ran before it outside.
    Initializers are the same with equal type, shape and bytes, NaN included.

    Missed for random operators, nodes with subgraphs of their own, operators of unknown domains
    (they may keep a state), and DequantizeLinear of a constant, which runtimes fuse into its one
    reader.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        everything = scopes(model)
        _merge_initializers(everything, remarks)
        impure = impure_functions(model)
        by_graph = {scope.graph: scope for scope in everything}
        for scope in everything:
            if not scope.ancestors:
                _Merger(model, remarks, impure, by_graph).visit(scope.graph)


class _Merger:
    """Walks a graph in order, subgraphs at their node, with a table of what is computed so far."""

    def __init__(
        self,
        model: Model,
        remarks: Remarks,
        impure: frozenset[ir.OperatorIdentifier],
        by_graph: dict[ir.Graph, Scope],
    ) -> None:
        self.model, self.remarks, self.impure, self.by_graph = model, remarks, impure, by_graph
        self.seen: dict[Hashable, ir.Node] = {}

    def visit(self, graph: ir.Graph) -> None:
        added: list[Hashable] = []
        # Keys of nodes left alone, so that a remark is made only where a twin was found.
        twins: dict[Hashable, ir.Node] = {}
        for node in list(graph):
            graphs = subgraphs_of(node)
            for inner in graphs:
                self.visit(inner)
            key = node_key(node)
            if key is None or not node.outputs:
                continue
            reason = "it has subgraphs of its own" if graphs else self._why_not(node, graph)
            if reason is not None:
                if not graphs and twins.setdefault(key, node) is not node:
                    self.remarks.missed(node, f"not merged with {describe(twins[key])}: {reason}")
                continue
            first = self.seen.get(key)
            if first is None:
                self.seen[key] = node
                added.append(key)
            else:
                self._merge(node, first)
        for key in added:
            # What ran in a subgraph is not visible after it.
            del self.seen[key]

    def _why_not(self, node: ir.Node, graph: ir.Graph) -> str | None:
        if node.op_type == "DequantizeLinear" and is_standard(node) and tensor_of(node.inputs[0]) is not None:
            return "an encoded weight is fused by runtimes into its one reader"
        return why_impure(node, self.by_graph[graph].opset, self.impure)

    def _merge(self, node: ir.Node, first: ir.Node) -> None:
        for mine, theirs in zip(node.outputs, first.outputs, strict=True):
            used = mine.uses() or mine.is_graph_output()
            if used and not theirs.name:
                return
            if mine.is_graph_output() and node.op_type == "Identity":
                # It is there to give the value a second name.
                return
        for mine, theirs in zip(node.outputs, first.outputs, strict=True):
            if mine.uses() or mine.is_graph_output():
                self.model.replace_value(mine, theirs)
        detach(node)
        self.remarks.passed(node, f"removed: equal to {describe(first)}")


def node_key(node: ir.Node) -> Hashable | None:
    """What makes two nodes compute the same; None when it cannot be told."""
    inputs = [0 if value is None else id(value) for value in node.inputs]
    while inputs and inputs[-1] == 0:
        inputs.pop()
    if node.op_type in COMMUTATIVE and is_standard(node):
        inputs.sort()
    attributes = tuple(sorted((name, _attribute_key(attr)) for name, attr in node.attributes.items()))
    return (node.op_identifier(), len(node.outputs), tuple(inputs), attributes)


def _attribute_key(attr: ir.Attr) -> str:
    """Text that is equal for equal attributes and orders them."""
    if attr.is_ref():
        return f"ref {attr.ref_attr_name}"
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return f"tensor {tensor.dtype} {tensor.shape} {_digest(tensor).hex()}"
    if attr.type == ir.AttributeType.TENSORS:
        return " ".join(f"tensor {t.dtype} {t.shape} {_digest(t).hex()}" for t in attr.as_tensors())
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.SPARSE_TENSOR):
        return f"object {id(attr.value)}"
    # repr tells 0.0 from -0.0 and 1 from 1.0.
    return f"{attr.type} {attr.value!r}"


def _merge_initializers(everything: list[Scope], remarks: Remarks) -> None:
    """Let every initializer be the first with its bytes among those visible from its graph."""
    groups: defaultdict[Hashable, list[tuple[Scope, ir.Value]]] = defaultdict(list)
    for scope in everything:
        for value in scope.graph.initializers.values():
            tensor = constant_tensor(value)
            if tensor is not None:
                groups[(tensor.dtype, tuple(tensor.shape.numpy()))].append((scope, value))
    for refine in (_sample, _digest):
        finer: defaultdict[Hashable, list[tuple[Scope, ir.Value]]] = defaultdict(list)
        for key, members in groups.items():
            if len(members) > 1:
                for scope, value in members:
                    tensor = constant_tensor(value)
                    if tensor is not None:
                        finer[(key, refine(tensor))].append((scope, value))
        groups = finer
    for members in groups.values():
        firsts: dict[ir.Graph, ir.Value] = {}
        for scope, value in members:
            first = next((firsts[g] for g in (*scope.ancestors, scope.graph) if g in firsts), None)
            if first is None:
                firsts[scope.graph] = value
            elif not value.is_graph_output():
                value.replace_all_uses_with(first)
                scope.graph.initializers.pop(value.name or "")
                remarks.passed(
                    f"initializer '{value.name}'", f"removed: holds the same bytes as '{first.name}'"
                )


def _sample(tensor: ir.TensorProtocol) -> Hashable:
    if tensor.dtype == ir.DataType.STRING:
        return None
    with borrow(tensor) as array:
        flat = array.reshape(-1)
        step = max(1, flat.size * flat.itemsize // SAMPLE_BYTES // flat.itemsize)
        return np.ascontiguousarray(flat[::step]).tobytes()


def _digest(tensor: ir.TensorProtocol) -> bytes:
    with borrow(tensor) as array:
        flat = np.ascontiguousarray(array).reshape(-1)
        if tensor.dtype == ir.DataType.STRING:
            return repr(flat.tolist()).encode()
        return hashlib.blake2b(flat.view(np.uint8).data, digest_size=16).digest()

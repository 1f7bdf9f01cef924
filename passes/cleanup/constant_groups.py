"""Find groups of nodes fed by constants alone, and fold those that do not grow the file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor
from effic.ir.tensors import SPILL_BYTES, borrow
from effic.passes.base import Remarks
from effic.passes.cleanup.evaluate_constants import CannotEvaluateError, evaluate_in_runtime, evaluate_native
from effic.passes.cleanup.randomness import why_impure
from effic.passes.cleanup.scopes import Scope, has_reference, is_standard, prune, subgraphs_of
from effic.passes.cleanup.shape_values import ShapeValues

# A file holds beside a constant's bytes its name (twice: with its type), type and shape.
CONSTANT_OVERHEAD = 32
# ... and beside a node's names the fields that hold them.
NODE_OVERHEAD = 16
# An intermediate result larger than this is not worth computing for a small final one.
MAX_INTERMEDIATE = 64 << 20
# Constants a session of the runtime may be fed in one go.
MAX_FEED = 64 << 20
# Below this, sharing a constant does not tie two groups together.
TYING_BYTES = 1024

# Results no larger than the largest input, whatever the operands say.
NOT_EXPANDING = frozenset(
    {"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Cast", "QuantizeLinear"}
    | {
        "Sqrt",
        "Neg",
        "Abs",
        "Not",
        "Exp",
        "Log",
        "Reciprocal",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Sin",
        "Cos",
    }
    | {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "Relu", "Sigmoid", "Tanh", "Erf"}
)
# Results as large as the operands broadcast to.
BROADCASTING = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Mod", "And", "Or", "Equal"}
)
NEVER = frozenset({"Constant", "DequantizeLinear"})


@dataclass(eq=False)
class Group:
    """Connected nodes that need nothing but constants.

    Attributes:
        nodes: in order.
        roots: the values that something outside reads.
        scope: where the last of them stands.
        encodes: whether a root feeds a DequantizeLinear.
    """

    nodes: list[ir.Node]
    scope: Scope
    roots: list[ir.Value] = field(default_factory=list)
    encodes: bool = False


class GroupFolder:
    """Folds the constant groups of a model.

    Attributes:
        unknown: whether a group was left for want of a shape.
    """

    def __init__(
        self,
        model: Model,
        known: ShapeValues,
        max_growth: int,
        remarks: Remarks,
        missed: dict[ir.Node, str],
    ) -> None:
        self.model, self.known, self.max_growth = model, known, max_growth
        self.remarks, self.missed = remarks, missed
        self.unknown = False

    def fold(self, everything: list[Scope]) -> int:
        """Fold what can be folded; returns the number of results stored."""
        pending: list[Group] = []
        count = 0
        for group in constant_groups(everything):
            count += self._fold_natively(group, pending)
        batch: list[Group] = []
        for group in pending:
            if batch and (
                batch[0].scope.opset_imports != group.scope.opset_imports or _fed(batch) > MAX_FEED
            ):
                count += self._fold_in_runtime(batch)
                batch = []
            batch.append(group)
        return count + (self._fold_in_runtime(batch) if batch else 0)

    def _fold_natively(self, group: Group, pending: list[Group]) -> int:
        reason = self._why_too_large(group)
        if reason is None:
            with contextlib.ExitStack() as stack:
                arrays = {value: stack.enter_context(borrow(t)) for value, t in constants_of(group.nodes)}
                if _run(group.nodes, arrays):
                    results = [_own(arrays[root]) for root in group.roots]
                    arrays.clear()
                    return self._store(group, results)
            if _fed([group]) <= MAX_FEED:
                pending.append(group)
            else:
                self._refuse(group, "kept: its constants are too large to compute with ahead of time")
            return 0
        if len(group.roots) < 2:
            self._refuse(group, reason)
            return 0
        # Together too large; some of the results alone may not be.
        return sum(self._fold_natively(part, pending) for part in _split(group))

    def _why_too_large(self, group: Group) -> str | None:
        """Why not even to start computing, as far as shapes tell; None to go on."""
        # Results no larger than an input are bounded by it, so they need no shape.
        bytes_of: dict[ir.Value, int] = {value: t.nbytes for value, t in constants_of(group.nodes)}
        # Nothing is inferred inside functions; operands that are constants still tell.
        shape_of = {value: tuple(t.shape.numpy()) for value, t in constants_of(group.nodes)}
        for node in group.nodes:
            fed = max((bytes_of.get(value, 0) for value in node.inputs if value is not None), default=0)
            for output in node.outputs:
                dims, dtype = self.known.dims(output), self.known.shapes.dtype(output)
                size = _nbytes(dims, dtype) if dims is not None and dtype is not None else None
                if size is None and node.op_type in NOT_EXPANDING:
                    size = fed * (8 if node.op_type == "Cast" else 1)
                if size is None and node.op_type in BROADCASTING:
                    shape = _broadcast([shape_of.get(value) for value in node.inputs if value is not None])
                    if shape is not None:
                        shape_of[output] = shape
                        size = math.prod(shape) * 8
                if size is None:
                    self.unknown = True
                    return "kept: the size of its result is not known"
                if size > max(MAX_INTERMEDIATE, fed):
                    return f"kept: computing it ahead takes {size} bytes at once"
                bytes_of[output] = size
        sized = [
            (root, _nbytes(self.known.dims(root), self.known.shapes.dtype(root))) for root in group.roots
        ]
        if any(size is None for _, size in sized):
            return None
        return self._why_growth(group, sum(size for _, size in sized if size is not None))

    def _why_growth(self, group: Group, result_bytes: int) -> str | None:
        inside = set(group.nodes)
        dying = [
            (value, tensor)
            for value, tensor in constants_of(group.nodes)
            if not value.is_graph_output() and all(use.node in inside for use in value.uses())
        ]
        freed = sum(tensor.nbytes for _, tensor in dying)
        if group.encodes:
            # An encoding is compact on purpose: its parts may shrink, but not widen.
            if result_bytes > freed:
                return "kept: it is part of an encoded weight, and wider once computed"
            return None
        freed += sum(CONSTANT_OVERHEAD + 2 * len(value.name or "") for value, _ in dying)
        for node in group.nodes:
            names = [value.name or "" for value in (*node.inputs, *node.outputs) if value is not None]
            freed += NODE_OVERHEAD + len(node.op_type) + len(node.name or "") + sum(len(n) + 2 for n in names)
        cost = result_bytes + sum(CONSTANT_OVERHEAD + 2 * len(root.name or "") for root in group.roots)
        growth = cost - freed
        if growth <= self.max_growth * len(group.roots):
            return None
        return f"kept: its result would add {growth} bytes to the file (max_growth is {self.max_growth})"

    def _fold_in_runtime(self, batch: list[Group]) -> int:
        nodes = [node for group in batch for node in group.nodes]
        wanted = [root for group in batch for root in group.roots]
        with contextlib.ExitStack() as stack:
            given = {value: stack.enter_context(borrow(t)) for value, t in constants_of(nodes)}
            try:
                results = evaluate_in_runtime(nodes, given, wanted, batch[0].scope.opset_imports)
            except CannotEvaluateError as error:
                if len(batch) == 1:
                    self._refuse(batch[0], f"kept: {error}")
                    return 0
                results = []
            given.clear()
        if not results:
            return sum(self._fold_in_runtime([group]) for group in batch)
        count = 0
        for group in batch:
            count += self._store(group, [_own(array) for array in results[: len(group.roots)]])
            del results[: len(group.roots)]
        return count

    def _store(self, group: Group, results: Sequence[np.ndarray]) -> int:
        sizes = [_nbytes(array.shape, ir.DataType.from_numpy(array.dtype)) or 0 for array in results]
        reason = self._why_growth(group, sum(sizes))
        if reason is not None:
            self._refuse(group, reason)
            return 0
        for root, array in zip(group.roots, results, strict=True):
            node = root.producer()
            assert node is not None
            assert node.graph is not None
            self.model.replace_value(
                root, self.model.add_initializer(node.graph, root.name or "constant", array)
            )
            self.remarks.passed(node, "computed ahead", nodes=len(group.nodes), bytes=array.nbytes)
        prune(reversed(group.nodes))
        return len(results)

    def _refuse(self, group: Group, reason: str) -> None:
        producer = group.roots[-1].producer()
        if producer is not None:
            self.missed[producer] = reason


def constant_groups(everything: list[Scope]) -> list[Group]:
    """Every maximal connected group of nodes that need nothing but constants, in order."""
    place: dict[ir.Node, Scope] = {}
    for scope in everything:
        for node in scope.graph:
            if _is_candidate(node, place, scope):
                place[node] = scope
    parent: dict[ir.Node, ir.Node] = {node: node for node in place}

    def find(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    sharing: dict[ir.Value, ir.Node] = {}
    for node in place:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in place:
                parent[find(node)] = find(producer)
            elif value is not None:
                tensor = constant_tensor(value)
                # Slices of one large weight are worth it only together: then the weight goes.
                if tensor is not None and tensor.nbytes >= TYING_BYTES:
                    parent[find(node)] = find(sharing.setdefault(value, node))
    groups: dict[ir.Node, Group] = {}
    for node, scope in place.items():
        group = groups.setdefault(find(node), Group([], scope))
        group.nodes.append(node)
        for output in node.outputs:
            _add_root(group, output, place)
    return [group for group in groups.values() if group.roots]


def _add_root(group: Group, output: ir.Value, inside: Iterable[ir.Node]) -> None:
    outside = [use.node for use in output.uses() if use.node not in inside]
    if outside or output.is_graph_output():
        group.roots.append(output)
        group.encodes |= any(node.op_type == "DequantizeLinear" for node in outside)


def _is_candidate(node: ir.Node, candidates: dict[ir.Node, Scope], scope: Scope) -> bool:
    if not is_standard(node) or node.op_type in NEVER or has_reference(node) or not node.outputs:
        return False
    if node.op_type == "Identity" and node.outputs[0].is_graph_output():
        # It names a constant that is an output; folding it would only make it anew.
        return False
    given = [value for value in node.inputs if value is not None]
    if not given or why_impure(node, scope.opset, frozenset()) is not None or subgraphs_of(node):
        return False
    for value in given:
        producer = value.producer()
        if (producer is None or producer not in candidates) and constant_tensor(value) is None:
            return False
    return True


def _split(group: Group) -> list[Group]:
    """One group per root, in order, each with the nodes only it needs beyond the roots before it."""
    members = set(group.nodes)
    taken: set[ir.Node] = set()
    parts: list[Group] = []
    order = {node: index for index, node in enumerate(group.nodes)}
    for root in group.roots:
        producer = root.producer()
        stack = [producer]
        cone: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in cone or node not in members:
                continue
            if node in taken:
                # It needs an earlier result, folded or not: the next round sees which.
                cone.clear()
                break
            cone.add(node)
            stack.extend(value.producer() for value in node.inputs if value is not None)
        if cone:
            taken |= cone
            part = Group(sorted(cone, key=order.__getitem__), group.scope, [root])
            part.encodes = any(use.node.op_type == "DequantizeLinear" for use in root.uses())
            parts.append(part)
    return parts


def constants_of(nodes: Iterable[ir.Node]) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The constants that nodes read, each once."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in found:
                tensor = constant_tensor(value)
                if tensor is not None:
                    found[value] = tensor
    return list(found.items())


def _run(nodes: Iterable[ir.Node], arrays: dict[ir.Value, np.ndarray]) -> bool:
    """Compute the nodes by numpy into ``arrays``; False as soon as numpy cannot."""
    for node in nodes:
        if any(value is None for value in node.inputs):
            return False
        result = evaluate_native(node, [arrays[value] for value in node.inputs if value is not None])
        if result is None:
            return False
        arrays[node.outputs[0]] = result
    return True


def _broadcast(shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    try:
        return np.broadcast_shapes(*known)
    except ValueError:
        # Operands that do not fit; whoever runs the model will say so.
        return None


def _own(array: np.ndarray) -> np.ndarray:
    """The array, copied if it may be a view of a mapped file and is not spilled to disk anyway."""
    return np.array(array) if array.base is not None and array.nbytes < SPILL_BYTES else array


def _nbytes(dims: Sequence[object] | None, dtype: ir.DataType | None) -> int | None:
    if dims is None or dtype is None or dtype == ir.DataType.STRING:
        return None
    sizes = [dim for dim in dims if isinstance(dim, int)]
    if len(sizes) != len(dims):
        return None
    return math.ceil(math.prod(sizes) * dtype.itemsize)


def _fed(batch: Iterable[Group]) -> int:
    return sum(tensor.nbytes for group in batch for _, tensor in constants_of(group.nodes))

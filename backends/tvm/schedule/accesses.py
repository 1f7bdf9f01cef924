"""What a block of a legalized function reads and writes, as far as loops around it need to know.

Legalization gives one block per step: a box of iteration variables, each data-parallel (S) or reduced (R),
and one store. :func:`blocks_of` reads them; the rest answers questions about the indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx

# What TVM calls the operator differs between versions, so an expression is asked.
IF = str(tirx.if_then_else(tirx.Var("condition", "bool"), 1.0, 0.0).op.name)
"""The name of the operator that evaluates one of two branches."""


@dataclass
class Axis:
    """One loop: its variable in the body, and how far it goes (an int, or an expression when symbolic)."""

    var: Any
    extent: Any

    @property
    def size(self) -> int | None:
        """The extent where it is known."""
        return self.extent if isinstance(self.extent, int) else None


@dataclass
class Block:
    """One step of a function: ``init`` where it reduces, then ``body`` for every point of the box."""

    spatial: list[Axis]
    reduced: list[Axis]
    body: Any
    init: Any | None = None

    @property
    def axes(self) -> list[Axis]:
        """All axes, data-parallel first."""
        return self.spatial + self.reduced


def _number(extent: Any) -> Any:
    return int(extent) if isinstance(extent, (int, tirx.IntImm)) else extent


def blocks_of(body: Any) -> list[Block] | None:
    """The blocks of a function's root block in order; None where the function is not made of plain boxes."""
    from tvm import s_tir

    if not isinstance(body, s_tir.SBlockRealize) or body.block.match_buffers:
        return None
    found: list[Block] = []
    rest = [body.block.body]
    while rest:
        statement = rest.pop(0)
        if isinstance(statement, tirx.SeqStmt):
            rest = list(statement.seq) + rest
            continue
        while isinstance(statement, tirx.For):
            if statement.kind != tirx.ForKind.SERIAL:
                return None
            statement = statement.body
        if not isinstance(statement, s_tir.SBlockRealize):
            return None
        block = _block(statement)
        if block is None:
            return None
        found.append(block)
    return found


def _block(realize: Any) -> Block | None:
    from tvm import s_tir

    block = realize.block
    if not _is_true(realize.predicate) or block.alloc_buffers or block.match_buffers:
        return None
    if contains(block.body, (s_tir.SBlockRealize, tirx.For, tirx.While)):
        return None
    spatial: list[Axis] = []
    reduced: list[Axis] = []
    for iteration in block.iter_vars:
        if not _is_zero(iteration.dom.min):
            return None
        axis = Axis(iteration.var, _number(iteration.dom.extent))
        if iteration.iter_type == tirx.IterVar.DataPar:
            spatial.append(axis)
        elif iteration.iter_type == tirx.IterVar.CommReduce:
            reduced.append(axis)
        else:
            return None
    return Block(spatial, reduced, block.body, block.init)


def _is_true(predicate: Any) -> bool:
    return (isinstance(predicate, bool) and predicate) or bool(getattr(predicate, "value", 0) == 1)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, tirx.IntImm)) and int(value) == 0


def contains(node: Any, kinds: Any) -> bool:
    """Whether a node of one of these types is in there."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    hits: list[Any] = []
    tvm_ffi.structural_walk(node, (kinds, hits.append))
    return bool(hits)


def loads(node: Any) -> list[Any]:
    """Every load from a buffer."""
    hits: list[Any] = []
    tvm_ffi.structural_walk(node, (ir.TensorLoad, hits.append))
    return hits


def buffer_of(access: Any) -> Any:
    """The buffer that a load or a store goes to."""
    return access.source if isinstance(access, ir.TensorLoad) else access.buffer


def calls(node: Any, name: str) -> list[Any]:
    """Every call of an intrinsic by its name."""
    hits: list[Any] = []

    def visit(call: Any) -> None:
        if isinstance(call.op, ir.Op) and call.op.name == name:
            hits.append(call)

    tvm_ffi.structural_walk(node, (ir.Call, visit))
    return hits


def uses(node: Any, variables: Iterable[Any]) -> bool:
    """Whether one of these variables occurs."""
    wanted = list(variables)
    hits: list[Any] = []

    def visit(var: Any) -> None:
        if any(var.same_as(one) for one in wanted):
            hits.append(var)

    tvm_ffi.structural_walk(node, (tirx.Var, visit))
    return bool(hits)


def size(node: Any) -> int:
    """How many loads and calls there are: what inlining multiplies."""
    count = 0

    def visit(_: Any) -> None:
        nonlocal count
        count += 1

    tvm_ffi.structural_walk(node, ((ir.TensorLoad, ir.Call), visit))
    return count


def substitute(node: Any, values: Mapping[Any, Any]) -> Any:
    """The node with variables replaced."""
    pairs = list(values.items())

    def replaced(var: Any) -> Any:
        for old, new in pairs:
            if var.same_as(old):
                return new
        return var

    return tvm_ffi.structural_map(node, (tirx.Var, replaced))


def step(access: Any, var: Any) -> int | None:
    """By how many elements of its buffer an access moves when ``var`` grows by one.

    0 where the variable does not occur; None where the step is not a constant.
    """
    from tvm.sym import detect_linear_equation

    total = 0
    stride = 1
    for index, extent in zip(
        reversed(list(access.indices)), reversed(list(buffer_of(access).shape)), strict=True
    ):
        if uses(index, [var]):
            parts = detect_linear_equation(index, [var])
            if not parts or stride is None or not isinstance(parts[0], tirx.IntImm):
                return None
            total += int(parts[0]) * stride
        known = _number(extent)
        stride = stride * known if stride is not None and isinstance(known, int) else None  # type: ignore[assignment]
    return total


def mergeable(first: Axis, second: Axis, nodes: Iterable[Any]) -> bool:
    """Whether two axes can be walked as one: wherever they occur they are two neighbouring indices of a
    buffer whose inner dimension is exactly the second axis."""
    if second.size is None:
        return False
    both = [first.var, second.var]
    for node in nodes:
        held: list[Any] = []
        # What is left of the node when the loads that use both in order are taken out must use neither.
        hits: list[Any] = []
        tvm_ffi.structural_walk(node, (tirx.Var, hits.append))
        total = sum(any(v.same_as(b) for b in both) for v in hits)
        tvm_ffi.structural_walk(node, ((ir.TensorLoad, tirx.BufferStore), held.append))
        accounted = 0
        for access in held:
            indices = list(access.indices)
            for i in range(len(indices) - 1):
                if (
                    indices[i].same_as(first.var)
                    and indices[i + 1].same_as(second.var)
                    and _number(buffer_of(access).shape[i + 1]) == second.size
                ):
                    accounted += 2
        if total != accounted:
            return False
    return True


def breakpoints(node: Any, axis: Axis) -> list[int]:
    """Where on an axis a condition of the node changes: the ends of pieces in which all are constant."""
    points: set[int] = set()
    conditions = [call.args[0] for call in calls(node, IF)]

    def visit(compare: Any) -> None:
        # ``x < 4`` and ``x >= 4`` change at 4, ``x <= 4`` and ``x > 4`` at 5; turned round, the other way about.
        after = isinstance(compare, (tirx.LE, tirx.GT))
        for side, other, turned in ((compare.a, compare.b, False), (compare.b, compare.a, True)):
            if uses(other, [axis.var]) or not uses(side, [axis.var]):
                continue
            parts = sym.detect_linear_equation(side, [axis.var])
            if not parts or not isinstance(other, tirx.IntImm):
                continue
            scale, offset = parts[0], parts[1]
            if not isinstance(scale, tirx.IntImm) or not isinstance(offset, tirx.IntImm):
                continue
            if abs(int(scale)) == 1:
                at = (int(other) - int(offset)) * int(scale)
                both = isinstance(compare, tirx.EQ)
                points.update((at, at + 1) if both else (at + (after ^ turned ^ (int(scale) < 0)),))

    for condition in conditions:
        tvm_ffi.structural_walk(condition, ((tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ), visit))
    return sorted(point for point in points if 0 < point < (axis.size or 0))


def periods(node: Any, axis: Axis) -> list[int]:
    """Sizes below an axis's own, and dividing it, after which a condition of the node repeats along the axis."""
    found: list[int] = []

    def visit(modulo: Any) -> None:
        period, size = _number(modulo.b), axis.size or 0
        if (
            isinstance(period, int)
            and 1 < period < size
            and size % period == 0
            and uses(modulo.a, [axis.var])
        ):
            found.append(period)

    for call in calls(node, IF):
        tvm_ffi.structural_walk(call.args[0], (tirx.FloorMod, visit))
    return found

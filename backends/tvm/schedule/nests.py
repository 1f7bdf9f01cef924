"""Loops around one block: parallel outside, vectors inside, accumulators in registers, ragged ends apart.

Three forms. A *spatial* block writes every point once: the last axis becomes vectors, and where a condition
(padding, concatenation) depends on that axis it is cut where the condition changes, so that none is left
inside. A transposed read is walked in tiles of 16 by 16, so that both sides use whole cache lines. A
*reduction along the vector* (sum over the last axis) keeps lanes of partial results and adds them up at the
end. A *reduction beside the vector* (matmul, pooling, sum over an outer axis) keeps a tile of
results, 4 rows by 2 vectors, in registers while it walks the reduced axes.

Bytes per call are those of the block's inputs and outputs, once, except for products of matrices, where a
panel of 2 vectors by K of the right side is read once per 4 rows from the second-level cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.tirx import For, ForKind

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.schedule.accesses import (
    IF,
    Axis,
    Block,
    breakpoints,
    calls,
    contains,
    loads,
    mergeable,
    periods,
    step,
    substitute,
    uses,
)

PARALLEL_WORK = 16384
"""Elements below which starting the other threads (a few microseconds) costs more than it saves."""

CHUNK = 256
"""Vectors of one axis that one thread takes at a time."""

TILE = 16
"""Side of a tile of a transposed copy: 16 floats are one cache line."""

ROWS = 4
"""Rows of a tile of results: with 2 vectors each, 8 accumulators hide the latency of a fused
multiply-add (4 cycles, 2 per cycle) and leave registers for the operands."""

_numbers = itertools.count()


def lanes_of(cpu: Cpu) -> int:
    """Elements of float32 in one vector."""
    return 16 if cpu.avx512 else 8


def index_var(name: str, dtype: str = "int64") -> Any:
    """A fresh loop variable."""
    return tirx.Var(f"{name}{next(_numbers)}", dtype)


def loop(var: Any, extent: Any, body: Any, kind: Any = ForKind.SERIAL) -> Any:
    """One loop from 0; none at all around a single turn."""
    if isinstance(extent, int):
        if extent == 1:
            return substitute(body, {var: _int(0)})
        extent = _int(extent)
    return For(var, _int(0), extent, kind, body)


def _int(value: int) -> Any:
    return tirx.IntImm("int64", value)


def sequence(parts: Sequence[Any]) -> Any:
    """Statements one after the other."""
    flat = list(parts)
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def _product(extents: Sequence[Any]) -> Any:
    total: Any = 1
    for extent in extents:
        total = total * extent
    return total


def _known(extents: Sequence[Any]) -> int:
    """The product of what is known of extents."""
    return prod(extent for extent in extents if isinstance(extent, int))


def _unfold(var: Any, axes: Sequence[Axis]) -> dict[Any, Any]:
    """The values of several axes from one running number."""
    values: dict[Any, Any] = {}
    rest = var
    for i, axis in reversed(list(enumerate(axes))):
        if i == 0:
            values[axis.var] = rest
        else:
            extent = _int(axis.extent) if isinstance(axis.extent, int) else axis.extent
            values[axis.var] = tirx.floormod(rest, extent)
            rest = tirx.floordiv(rest, extent)
    return values


def _over(axes: Sequence[Axis], body: Any, parallel: bool) -> Any:
    """All points of some axes in one loop, shared between threads on request."""
    if not axes:
        return body
    var = index_var("p")
    body = substitute(body, _unfold(var, axes))
    kind = ForKind.PARALLEL if parallel else ForKind.SERIAL
    return loop(var, _product([axis.extent for axis in axes]), body, kind)


def _vectors(make: Callable[[Any], Any], low: int, high: Any, lanes: int, parallel: bool) -> Any:
    """``make(index)`` for every index from ``low`` to ``high``, by whole vectors and a narrower last one.

    An end that is not known at build leaves a plain loop over the last few elements.
    """
    parts = []
    lane = index_var("l")
    count = high - low if isinstance(high, int) else high
    full = count // lanes if isinstance(count, int) else tirx.floordiv(count, _int(lanes))
    rest = count % lanes if isinstance(count, int) else tirx.floormod(count, _int(lanes))
    if not isinstance(full, int) or full > 0:
        number = index_var("j")
        vector = For(lane, _int(0), _int(lanes), ForKind.VECTORIZED, make(number * lanes + lane + low))
        if parallel and not (isinstance(full, int) and full <= CHUNK):
            chunk, inside = index_var("c"), index_var("i")
            vector = substitute(vector, {number: chunk * CHUNK + inside})
            turns = tirx.min(_int(CHUNK), full - chunk * CHUNK)
            chunks = (
                -(-full // CHUNK) if isinstance(full, int) else tirx.floordiv(full + CHUNK - 1, _int(CHUNK))
            )
            parts.append(loop(chunk, chunks, loop(inside, turns, vector), ForKind.PARALLEL))
        else:
            parts.append(loop(number, full, vector))
    if not isinstance(rest, int) or rest > 0:
        last = index_var("l")
        start = full * lanes + low
        kind = ForKind.VECTORIZED if isinstance(rest, int) else ForKind.SERIAL
        parts.append(loop(last, rest, make(last + start), kind))
    return sequence(parts)


def _merged(axes: list[Axis], nodes: list[Any]) -> tuple[list[Axis], list[Any]]:
    """Neighbouring axes that are walked as one made one; axes of a single turn gone."""
    ones: dict[Any, Any] = {axis.var: _int(0) for axis in axes if axis.size == 1}
    if ones:
        nodes = [substitute(node, ones) for node in nodes]
    axes, nodes = [axis for axis in axes if axis.size != 1], list(nodes)
    # From the inside out, so that a run of several axes becomes one.
    i = len(axes) - 2
    while i >= 0:
        first, second = axes[i], axes[i + 1]
        if mergeable(first, second, nodes):
            var = index_var("m")
            inner = _int(second.extent)
            values = {first.var: tirx.floordiv(var, inner), second.var: tirx.floormod(var, inner)}
            merged = Axis(var, first.extent * second.extent)
            nodes = [substitute(node, values) for node in nodes]
            axes[i : i + 2] = [merged]
        i -= 1
    return axes, nodes


def nest(block: Block, cpu: Cpu) -> Any:
    """The statement that runs one block."""
    block = _from_infinity(_simplified(block))
    if not block.reduced:
        if isinstance(block.body, tirx.BufferStore):
            return _spatial(block, cpu)
        return _plain(block, cpu)
    if isinstance(block.body, tirx.BufferStore) and isinstance(block.init, tirx.BufferStore):
        return _reduction(block, cpu)
    return _plain(block, cpu)


def _from_infinity(block: Block) -> Block:
    """The block, a maximum or minimum starting from infinity: TVM's start from the outermost finite number,
    which is what a row of infinities would yield."""
    init, body = block.init, block.body
    if not isinstance(init, tirx.BufferStore) or not isinstance(body, tirx.BufferStore):
        return block
    if not isinstance(init.value, tirx.FloatImm) or not isinstance(body.value, (tirx.Max, tirx.Min)):
        return block
    start = _outermost(type(body.value), str(init.buffer.dtype))
    return replace(block, init=tirx.BufferStore(init.buffer, start, list(init.indices)))


def _outermost(kind: type, dtype: str) -> Any:
    """What a maximum or minimum of nothing is."""
    if dtype.startswith("float"):
        return tirx.const(-math.inf if kind is tirx.Max else math.inf, dtype)
    return tirx.min_value(dtype) if kind is tirx.Max else tirx.max_value(dtype)


def _simplified(block: Block) -> Block:
    """The block with indices as plain as the ranges of its axes allow: reshapes leave divisions behind."""
    if not isinstance(block.body, tirx.BufferStore):
        return block
    return replace(block, body=_bounded(block.body, block.axes))


def _shared(axes: Sequence[Axis], work: int, cpu: Cpu) -> bool:
    unknown = any(axis.size is None for axis in axes)
    return cpu.cores > 1 and (unknown or (work >= PARALLEL_WORK and _known([a.extent for a in axes]) > 1))


def _plain(block: Block, cpu: Cpu) -> Any:
    """Scalar loops, the data-parallel ones shared between threads."""
    body = block.body
    for axis in reversed(block.reduced):
        body = _axis_loop(axis, body)
    if block.init is not None:
        body = sequence([block.init, body])
    work = _known([axis.extent for axis in block.axes])
    return _over(block.spatial, body, _shared(block.spatial, work, cpu))


def _axis_loop(axis: Axis, body: Any) -> Any:
    var = index_var("r")
    return loop(var, axis.extent, substitute(body, {axis.var: var}))


def _spatial(block: Block, cpu: Cpu) -> Any:
    axes, (store,) = _merged(list(block.spatial), [block.body])
    lanes = lanes_of(cpu)
    if not axes:
        return store
    axes, store = _split_at_periods(axes, store)
    work = _known([axis.extent for axis in axes])
    if (other := _across(axes, store)) is not None:
        return _tiled(axes, other, store, cpu)
    inner = axes[-1]
    outer = axes[:-1]
    parallel = _shared(outer, work, cpu) if outer else False
    alone = not outer and cpu.cores > 1 and (inner.size is None or work >= PARALLEL_WORK)
    parts = []
    ends = [0, *breakpoints(store.value, inner), inner.size] if inner.size is not None else [0, inner.extent]
    for low, high in itertools.pairwise(ends):
        decided = _bounded(store, outer, (inner, low, high)) if calls(store.value, IF) else store
        piece = partial(_at, decided, inner.var)
        parts.append(_vectors(piece, low, high, lanes, alone))
    return _over(outer, sequence(parts), parallel)


def _split_at_periods(axes: list[Axis], store: Any) -> tuple[list[Axis], Any]:
    """The last axis as several where a condition repeats along it (heads that were concatenated and put beside each
    other), so that within the last one the condition changes at fixed places.

    What is left inside a vector would be scalars in a loop of 16; LLVM 22 has been seen to read such a loop's
    ``table[i % 8]`` as 16 neighbours.
    """
    while found := periods(store.value, axes[-1]):
        inner, period = axes[-1], max(found)
        turn, place = index_var("q"), index_var("i")
        axes = [*axes[:-1], Axis(turn, inner.extent // period), Axis(place, period)]
        store = _bounded(substitute(store, {inner.var: turn * period + place}), axes)
    return axes, store


def _bounded(store: Any, axes: Sequence[Axis], piece: tuple[Axis, int, Any] | None = None) -> Any:
    """The store with indices and conditions as plain as the ranges of axes, and of a piece of one, allow."""
    analyzer = sym.Analyzer()
    for axis, low, high in [*((axis, 0, axis.extent) for axis in axes), *([piece] if piece else [])]:
        analyzer.bind(axis.var, ir.Range(_int(low), _int(high) if isinstance(high, int) else high))

    def in_one_turn(modulo: Any) -> Any:
        """``(i + 28) % 32`` for i from 4 to 7 is ``i - 4``, which the analyzer does not see."""
        bound = analyzer.const_int_bound(modulo.a)
        size = modulo.b
        if not isinstance(size, tirx.IntImm) or bound.min_value // int(size) != bound.max_value // int(size):
            return modulo
        return modulo.a - bound.min_value // int(size) * int(size)

    def plain(node: Any) -> Any:
        return analyzer.simplify(
            tvm_ffi.structural_map(analyzer.simplify(node), (tirx.FloorMod, in_one_turn))
        )

    return tirx.BufferStore(store.buffer, plain(store.value), [plain(index) for index in store.indices])


def _at(store: Any, var: Any, index: Any) -> Any:
    return substitute(store, {var: index})


def _across(axes: list[Axis], store: Any) -> Axis | None:
    """The axis along which a transposed load is contiguous, where the last axis is not."""
    inner = axes[-1]
    if inner.size is None or inner.size < TILE // 2:
        return None
    for load in loads(store.value):
        if step(load, inner.var) in (0, 1):
            continue
        for axis in axes[:-1]:
            if step(load, axis.var) == 1 and axis.size is not None and axis.size >= TILE // 2:
                return axis
    return None


def _tiled(axes: list[Axis], other: Axis, store: Any, cpu: Cpu) -> Any:
    """A transposed copy in square tiles; ragged edges in narrower ones."""
    inner = axes[-1]
    rest = [axis for axis in axes[:-1] if axis is not other]
    parts = []
    for low, count, height in _pieces(other.size or 0, TILE):
        columns = []
        for start, number, width in _pieces(inner.size or 0, TILE):
            i, j, row, lane = (index_var(name) for name in ("i", "j", "r", "l"))
            body = substitute(store, {other.var: i * height + row + low, inner.var: j * width + lane + start})
            body = loop(lane, width, body, ForKind.VECTORIZED)
            columns.append((i, loop(j, number, loop(row, height, body))))
        i = index_var("i")
        body = sequence([substitute(column, {old: i}) for old, column in columns])
        parts.append((Axis(i, count), body))
    work = _known([axis.extent for axis in axes])
    done = [_over([*rest, axis], body, _shared([*rest, axis], work, cpu)) for axis, body in parts]
    return sequence(done)


def _pieces(extent: int, width: int) -> list[tuple[int, int, int]]:
    """An extent as (start, how many, how wide): whole pieces, then one narrower."""
    whole, rest = divmod(extent, width)
    pieces = [(0, whole, width)] if whole else []
    return pieces + ([(whole * width, 1, rest)] if rest else [])


def _vectors_of(width: int, lanes: int) -> list[tuple[int, int]]:
    """A width as (start, lanes) of vectors."""
    return [(start, min(lanes, width - start)) for start in range(0, width, lanes)]


def _term(block_body: Any) -> tuple[type, Any] | None:
    """How a reduction combines, and what with: ``out = out + term`` gives (Add, term)."""
    value = block_body.value
    for kind in (tirx.Add, tirx.Max, tirx.Min, tirx.Mul):
        if isinstance(value, kind):
            for mine, term in ((value.a, value.b), (value.b, value.a)):
                if (
                    isinstance(mine, ir.TensorLoad)
                    and mine.source.same_as(block_body.buffer)
                    and tvm_ffi.structural_equal(list(mine.indices), list(block_body.indices))
                    and not any(load.source.same_as(block_body.buffer) for load in loads(term))
                ):
                    return kind, term
    return None


def _smooth(term: Any, axis: Axis) -> bool:
    """Whether the axis is a good vector: every load is contiguous along it or does not move."""
    return all(step(load, axis.var) in (0, 1) for load in loads(term))


def _reduction(block: Block, cpu: Cpu) -> Any:
    known = _term(block.body)
    if known is None:
        return _plain(block, cpu)
    kind, term = known
    init: Any = block.init  # a store: else the block is not of this form
    out, indices, start = block.body.buffer, list(block.body.indices), init.value
    shell = tirx.BufferStore(out, term, indices)  # one node, so that all indices are renamed together
    spatial, (shell,) = _merged(block.spatial, [shell])
    reduced, (shell,) = _merged(block.reduced, [shell])
    term, indices = shell.value, list(shell.indices)
    conditional = bool(calls(term, IF))
    start_moves = uses(start, [axis.var for axis in block.spatial])
    if conditional or start_moves or contains(term, tirx.Let):
        return _plain(block, cpu)
    lanes = lanes_of(cpu)
    along = reduced[-1] if reduced else None
    beside = spatial[-1] if spatial else None
    task = _Reduction(kind, term, out, indices, start, spatial, reduced, cpu)
    beside_fits = beside is not None and (beside.size is None or beside.size >= lanes // 2)
    if beside is not None and beside_fits and _smooth(term, beside):
        return task.beside_vector()
    if along is not None and (along.size is None or along.size >= lanes // 2) and _smooth(term, along):
        return task.along_vector()
    if beside is not None and (beside.size is None or beside.size > 1):
        return task.beside_vector()
    return _plain(block, cpu)


class _Reduction:
    """One reduction and the loops it is run by."""

    def __init__(
        self,
        kind: type,
        term: Any,
        out: Any,
        indices: list[Any],
        start: Any,
        spatial: list[Axis],
        reduced: list[Axis],
        cpu: Cpu,
    ) -> None:
        self.kind, self.term, self.out, self.indices, self.start = kind, term, out, indices, start
        self.spatial, self.reduced, self.cpu = spatial, reduced, cpu
        self.lanes = lanes_of(cpu)
        self.dtype = str(out.dtype)
        self.work = _known([axis.extent for axis in [*spatial, *reduced]])

    # -- accumulators that are lanes of one result -------------------------------------------------

    def along_vector(self) -> Any:
        """Partial results in lanes along the last reduced axis, combined at the end."""
        *others, along = self.reduced
        vectors = 4 if along.size is None or along.size >= 8 * self.lanes else 1
        width = min(self.lanes, along.size or self.lanes)
        sums = tirx.decl_buffer((vectors * width,), self.dtype, "partial", scope="local")
        total = tirx.decl_buffer((1,), self.dtype, "total", scope="local")
        parts: list[Any] = [tirx.AllocBuffer(sums), tirx.AllocBuffer(total), self._fill(sums, vectors, width)]
        parts.append(tirx.BufferStore(total, self.start, [_int(0)]))
        extent: Any = along.extent
        block = vectors * width
        full = extent // block if isinstance(extent, int) else tirx.floordiv(extent, _int(block))
        number = index_var("j")
        steps = [self._lane_step(sums, u, width, number * block + u * width, along) for u in range(vectors)]
        body = loop(number, full, sequence(steps)) if full != 0 else None
        rest = []
        done = full * block
        if isinstance(extent, int):
            while isinstance(done, int) and extent - done > 0:
                piece = min(width, extent - done)
                rest.append(self._lane_step(sums, 0, piece, _int(done), along))
                done += piece
        else:
            var = index_var("r")
            value = substitute(self.term, {along.var: var + done})
            rest.append(loop(var, extent - done, self._into(total, [_int(0)], value)))
        walk = sequence([*([body] if body is not None else []), *rest])
        for axis in reversed(others):
            walk = _axis_loop(axis, walk)
        parts.append(walk)
        parts.extend(self._fold(sums, vectors, width))
        lane = index_var("l")
        load = tirx.BufferLoad(sums, [lane])
        final_width = self._folded_width(width)
        parts.append(
            tirx.For(lane, _int(0), _int(final_width), ForKind.UNROLLED, self._into(total, [_int(0)], load))
        )
        parts.append(tirx.BufferStore(self.out, tirx.BufferLoad(total, [_int(0)]), self.indices))
        return _over(self.spatial, sequence(parts), _shared(self.spatial, self.work, self.cpu))

    @staticmethod
    def _folded_width(width: int) -> int:
        while width % 2 == 0 and width > 2:
            width //= 2
        return width

    def _fold(self, sums: Any, vectors: int, width: int) -> list[Any]:
        """Vectors added to the first one, then its halves to each other while they are even."""
        steps = []
        for u in range(1, vectors):
            lane = index_var("l")
            other = tirx.BufferLoad(sums, [lane + u * width])
            steps.append(For(lane, _int(0), _int(width), ForKind.VECTORIZED, self._into(sums, [lane], other)))
        while width % 2 == 0 and width > 2:
            width //= 2
            lane = index_var("l")
            other = tirx.BufferLoad(sums, [lane + width])
            steps.append(For(lane, _int(0), _int(width), ForKind.VECTORIZED, self._into(sums, [lane], other)))
        return steps

    def _fill(self, sums: Any, vectors: int, width: int) -> Any:
        identity = {
            tirx.Add: lambda: tirx.const(0, self.dtype),
            tirx.Mul: lambda: tirx.const(1, self.dtype),
            tirx.Max: lambda: _outermost(tirx.Max, self.dtype),
            tirx.Min: lambda: _outermost(tirx.Min, self.dtype),
        }[self.kind]()
        steps = []
        for u in range(vectors):
            lane = index_var("l")
            steps.append(
                For(
                    lane,
                    _int(0),
                    _int(width),
                    ForKind.VECTORIZED,
                    tirx.BufferStore(sums, identity, [lane + u * width]),
                )
            )
        return sequence(steps)

    def _lane_step(self, sums: Any, u: int, width: int, at: Any, along: Axis) -> Any:
        lane = index_var("l")
        value = substitute(self.term, {along.var: at + lane})
        body = self._into(sums, [lane + u * min(self.lanes, along.size or self.lanes)], value)
        return loop(lane, width, body, ForKind.VECTORIZED)

    def _into(self, buffer: Any, indices: list[Any], value: Any) -> Any:
        return tirx.BufferStore(buffer, self.kind(tirx.BufferLoad(buffer, indices), value), indices)

    # -- accumulators that are results beside each other ----------------------------------------------

    def beside_vector(self) -> Any:
        """A tile of results in registers: rows by vectors of the last data-parallel axis."""
        *others, vector = self.spatial
        row = self._row_axis(others, vector)
        outer = [axis for axis in others if axis is not row]
        tile = ROWS if row is not None else 1
        parts = []
        for start, number, width in self._columns(
            vector, 2 * self.lanes if row is not None else 4 * self.lanes
        ):
            v = index_var("v")
            rows = _pieces(row.size or 0, tile) if row is not None else [(0, 1, 1)]
            inside = []
            for low, count, height in rows:
                i = index_var("i")
                body = self._tile(row, i * height + low, height, vector, v * width + start, width)
                inside.append(loop(i, count, body))
            axes = [*outer, Axis(v, number)]
            parts.append(_over(axes, sequence(inside), _shared(axes, self.work, self.cpu)))
        return sequence(parts)

    def _columns(self, axis: Axis, wide: int) -> list[tuple[Any, Any, int]]:
        """The vector axis as (start, how many, how wide): wide pieces, single vectors, the ragged rest."""
        if axis.size is None:
            whole = tirx.floordiv(axis.extent, _int(self.lanes))
            return [(_int(0), whole, self.lanes), (whole * self.lanes, axis.extent - whole * self.lanes, 1)]
        pieces: list[tuple[Any, Any, int]] = []
        start = 0
        for width in (wide, self.lanes):
            count = (axis.size - start) // width
            if count:
                pieces.append((start, count, width))
                start += count * width
        if axis.size > start:
            pieces.append((start, 1, axis.size - start))
        return pieces

    def _row_axis(self, others: list[Axis], vector: Axis) -> Axis | None:
        """The axis whose neighbours share the vector loads: those that move with the vector, not with it."""
        moving = [load for load in loads(self.term) if step(load, vector.var) != 0]
        for axis in reversed(others):
            if axis.size is None or axis.size == 1:
                continue
            if any(not uses(list(load.indices), [axis.var]) for load in moving):
                return axis
        return None

    def _tile(self, row: Axis | None, first: Any, height: int, vector: Axis, column: Any, width: int) -> Any:
        sums = tirx.decl_buffer((height * width,), self.dtype, "tile", scope="local")
        begin: list[Any] = []
        walk: list[Any] = []
        finish: list[Any] = []
        for h in range(height):
            for at, wide in _vectors_of(width, self.lanes):
                lane = index_var("l")
                slot = [lane + (h * width + at)]
                place = {vector.var: column + at + lane}
                if row is not None:
                    place[row.var] = first + h
                for statements, body in (
                    (begin, tirx.BufferStore(sums, self.start, slot)),
                    (walk, self._into(sums, slot, substitute(self.term, place))),
                    (
                        finish,
                        tirx.BufferStore(
                            self.out,
                            tirx.BufferLoad(sums, slot),
                            [substitute(index, place) for index in self.indices],
                        ),
                    ),
                ):
                    fresh = index_var("l")
                    body = substitute(body, {lane: fresh})
                    statements.append(loop(fresh, wide, body, ForKind.VECTORIZED))
        body = sequence(walk)
        for axis in reversed(self.reduced):
            body = _axis_loop(axis, body)
        return sequence([tirx.AllocBuffer(sums), *begin, body, *finish])

"""LSTM, GRU and RNN: all steps of a sequence in one function.

What the inputs add to the gates does not depend on the state: it is one product for all steps, made before.
Here, step after step, the state is multiplied by the recurrent weight, ``z[b, g] = x[t, b, g] + h[b] @ r[g]``,
and then the gates are applied. The weight lies as ``[gates · ceil(H / 16), H, 16]``: 16 units of a gate are a
vector, a tile of 4 rows by 4 vectors of sums stays in registers, and each k costs one broadcast of the
state per row. Units that pad the state to whole vectors are computed and read by nobody.

Roofline: ``2 · gates · H²`` flops per row and step against ``4 · gates · H²`` bytes of weight, read once
per step: for a few rows the cache that holds the weight limits, and latency, as steps follow each other.
Formulas: ONNX, operators LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels import vector_math
from effic.backends.tvm.kernels.lanes import (
    LANES,
    MIN_PARALLEL_FLOPS,
    accumulators,
    argument,
    function,
    lanes,
    loop,
    spec_name,
    splat,
)
from effic.backends.tvm.kernels.rows import indices, keep

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Gates of each kind of cell, in the order of ONNX: i, o, f, c; z, r, h."""

ACTIVATIONS = ("sigmoid", "tanh", "relu")

_ROWS, _VECTORS = 4, 4


def padded(hidden: int) -> int:
    """Units in whole vectors."""
    return -(-hidden // LANES) * LANES


@dataclass(frozen=True)
class Recurrent:
    """One direction of a recurrent layer in fp32.

    Attributes:
        cell: ``LSTM``, ``GRU`` or ``RNN``.
        steps, batch, hidden: sizes of the sequence, of a batch, of the state.
        activations: of the gates, in ONNX's order: three for LSTM, two for GRU, one for RNN.
        reverse: whether the sequence is read from its end.
        lengths: whether the rows have lengths of their own; what lies past a row's length yields zeros.
        peepholes: LSTM: whether gates see the cell's state.
        after: GRU: whether the reset gate is applied after the product (``linear_before_reset``).
        clip: bound of what goes into activations, 0 for none.
    """

    cell: str
    steps: int
    batch: int
    hidden: int
    activations: tuple[str, ...]
    reverse: bool = False
    lengths: bool = False
    peepholes: bool = False
    after: bool = False
    clip: float = 0.0

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("recurrent", self)

    @property
    def gates(self) -> int:
        """How many gates the cell has."""
        return GATES[self.cell]

    @property
    def width(self) -> int:
        """Units in whole vectors."""
        return padded(self.hidden)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if self.cell not in GATES:
            return f"the cell '{self.cell}' is none of {', '.join(GATES)}"
        if min(self.steps, self.batch, self.hidden) < 1:
            return "a sequence of no elements"
        if unknown := [name for name in self.activations if name not in ACTIVATIONS]:
            return f"the activation '{unknown[0]}' is none of {', '.join(ACTIVATIONS)}"
        wanted = {"LSTM": 3, "GRU": 2, "RNN": 1}[self.cell]
        if len(self.activations) != wanted:
            return f"{self.cell} has {wanted} activations in each direction, not {len(self.activations)}"
        return None

    def pack(self, recurrence: np.ndarray) -> list[np.ndarray]:
        """``[gates · width, hidden]``, units padded with zeros, as ``[gates · width / 16, hidden, 16]``."""
        blocks = recurrence.astype(np.float32).reshape(-1, LANES, self.hidden)
        return [np.ascontiguousarray(blocks.transpose(0, 2, 1))]

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x, r, h, [c], [p], [rb], [lengths], y)``.

        x ``[steps, batch, gates · width]``: what the inputs and biases add; r as packed; h and c ``[batch,
        width]``: first states (c with LSTM); p ``[3 · width]``: peepholes i, o, f; rb ``[width]``: the bias
        inside of the reset gate (``after``); lengths int32 ``[batch]``; y ``[steps + 2, batch, hidden]``:
        the states of all steps, then the last one, then the cell's last (zeros without).
        """
        result: list[Any] = []
        with function(self.name, result) as T:
            _Code(self, T, cpu).emit()
        return result[0]


class _Code:
    """Emits the function of one spec."""

    def __init__(self, spec: Recurrent, T: Any, cpu: Cpu) -> None:
        self.spec, self.T = spec, T
        batch, width = spec.batch, spec.width
        self.x = argument(T, "x", (spec.steps, batch, spec.gates * width))
        self.r = argument(T, "r", (spec.gates * width // LANES, spec.hidden, LANES))
        self.h0 = argument(T, "h", (batch, width))
        lstm = spec.cell == "LSTM"
        self.c0 = argument(T, "c", (batch, width)) if lstm else None
        self.p = argument(T, "p", (3 * width,)) if spec.peepholes else None
        self.rb = argument(T, "rb", (width,)) if spec.after else None
        self.lengths = T.arg("lengths", T.Buffer((batch,), "int32")) if spec.lengths else None
        self.y = argument(T, "y", (spec.steps + 2, batch, spec.hidden))
        self.h = T.alloc_buffer((batch, width), "float32")
        self.c = T.alloc_buffer((batch, width), "float32") if lstm else None
        self.z = T.alloc_buffer((batch, spec.gates * width), "float32")
        self.reset = (
            T.alloc_buffer((batch, width), "float32") if spec.cell == "GRU" and not spec.after else None
        )
        flops = 2 * batch * spec.gates * width * spec.hidden
        self.parallel = cpu.cores > 1 and flops >= MIN_PARALLEL_FLOPS

    def emit(self) -> None:
        T, spec = self.T, self.spec
        with self._vectors() as (b, at):
            T.buffer_store(self.h, self.h0[b, at(0)], [b, at(0)])
            if self.c is not None and self.c0 is not None:
                T.buffer_store(self.c, self.c0[b, at(0)], [b, at(0)])
        with T.serial(spec.steps) as t:
            if self.reset is None:
                self._product(self.h, 0, spec.gates, t)
            else:
                self._product(self.h, 0, 2, t)
                with self._vectors() as (b, at):
                    gate = self._active(0, self.z[b, at(1)])
                    T.buffer_store(self.reset, gate * self.h[b, at(0)], [b, at(0)])
                self._product(self.reset, 2, 1, t)
            self._step(t)
        with T.serial(spec.batch) as b:
            self._copy(self.h, b, spec.steps)
            self._copy(self.c, b, spec.steps + 1)

    @contextmanager
    def _vectors(self) -> Iterator[tuple[Any, Any]]:
        """Every vector of a state: its row, and where it lies in gate g."""
        T, width = self.T, self.spec.width
        with T.serial(self.spec.batch) as b, T.serial(width // LANES) as j:
            yield b, lambda gate: lanes(T, j * LANES + gate * width)

    def _time(self, t: Any, b: Any) -> Any:
        """Which step of the sequence a row is at."""
        spec = self.spec
        if not spec.reverse:
            return t
        if self.lengths is None:
            return spec.steps - 1 - t
        length = self.lengths[b]
        return self.T.Select(t < length, length - 1 - t, t)

    def _product(self, state: Any, first: int, count: int, t: Any) -> None:
        """``z = x + state @ r`` for some gates."""
        spec, T = self.spec, self.T
        blocks = spec.width // LANES
        for start, number, vectors in _pieces(count * blocks, _VECTORS):
            with loop(T, number, self.parallel) as i:
                block = first * blocks + start + i * vectors
                for low, turns, rows in _pieces(spec.batch, _ROWS):
                    with T.serial(turns) as turn:
                        self._tile(state, block, vectors, low + turn * rows, rows, t)

    def _tile(self, state: Any, block: Any, vectors: int, first: Any, rows: int, t: Any) -> None:
        spec, T = self.spec, self.T
        sums = accumulators(T, rows * vectors)
        slots = [
            (row, v, [lanes(T, (row * vectors + v) * LANES)]) for row in range(rows) for v in range(vectors)
        ]
        for _, _, slot in slots:
            T.buffer_store(sums, splat(T, 0.0), slot)
        with T.serial(spec.hidden) as k:
            for row, v, slot in slots:
                weight = self.r[block + v, k, lanes(T, 0)]
                T.buffer_store(sums, sums[slot[0]] + splat(T, state[first + row, k]) * weight, slot)
        candidate = 2 * spec.width // LANES
        for row, v, slot in slots:
            b, at = first + row, lanes(T, (block + v) * LANES)
            given = self.x[self._time(t, b), b, at]
            if spec.after:  # the reset gate comes between the product and what the inputs add
                inside = T.broadcast(block + v >= candidate, LANES)
                given = T.Select(inside, splat(T, 0.0), given)
            T.buffer_store(self.z, sums[slot[0]] + given, [b, at])

    def _step(self, t: Any) -> None:
        """The new states from the gates, and the output."""
        T, spec = self.T, self.spec
        with T.serial(spec.batch) as b:
            if self.lengths is None:
                self._row(b, t)
                return
            with T.If(t < self.lengths[b]):
                with T.Then():
                    self._row(b, t)
                with T.Else():
                    self._copy(None, b, t)

    def _row(self, b: Any, t: Any) -> None:
        T, spec = self.T, self.spec
        with T.serial(spec.width // LANES) as j:
            here = [b, lanes(T, j * LANES)]
            T.buffer_store(self.h, self._unit(b, j, t), here)
        self._copy(self.h, b, self._time(t, b))

    def _unit(self, b: Any, j: Any, t: Any) -> Any:
        """The new state of 16 units."""
        T, spec = self.T, self.spec
        here = lanes(T, j * LANES)
        z = [self.z[b, lanes(T, j * LANES + gate * spec.width)] for gate in range(spec.gates)]
        if spec.cell == "RNN":
            return self._active(0, z[0])
        if spec.cell == "GRU":
            update = keep(T, self._active(0, z[0]), LANES)
            inner = z[2]
            if self.rb is not None:
                given = self.x[self._time(t, b), b, lanes(T, j * LANES + 2 * spec.width)]
                inner = given + self._active(0, z[1]) * (inner + self.rb[here])
            new = keep(T, self._active(1, inner), LANES)
            return new + update * (self.h[b, here] - new)
        assert self.c is not None
        old = self.c[b, here]
        p = None if self.p is None else [self.p[lanes(T, j * LANES + n * spec.width)] for n in range(3)]
        entry = keep(T, self._active(0, z[0] if p is None else z[0] + p[0] * old), LANES)
        forget = keep(T, self._active(0, z[2] if p is None else z[2] + p[2] * old), LANES)
        new = keep(T, forget * old + entry * self._active(1, z[3]), LANES)
        leave = keep(T, self._active(0, z[1] if p is None else z[1] + p[1] * new), LANES)
        T.buffer_store(self.c, new, [b, here])
        return leave * self._active(2, new, bounded=False)

    def _active(self, number: int, x: Any, bounded: bool = True) -> Any:
        """An activation of 16 lanes."""
        T, spec = self.T, self.spec
        if spec.clip and bounded:
            low, high = splat(T, -spec.clip), splat(T, spec.clip)
            x = keep(T, x, LANES)
            x = T.Select(x < low, low, T.Select(x > high, high, x))
        x = keep(T, x, LANES)
        kind = spec.activations[number]
        if kind == "sigmoid":
            return vector_math.sigmoid(x)
        return vector_math.tanh(x) if kind == "tanh" else T.Select(x < splat(T, 0.0), splat(T, 0.0), x)

    def _copy(self, state: Any | None, b: Any, t: Any) -> None:
        """A row of a state, or zeros, to the output."""
        T, hidden = self.T, self.spec.hidden
        whole, rest = divmod(hidden, LANES)

        def put(start: Any, width: int) -> None:
            at = indices(T, start, width)
            zero = T.float32(0) if width == 1 else T.broadcast(T.float32(0), width)
            T.buffer_store(self.y, zero if state is None else state[b, at], [t, b, at])

        if whole:
            with T.serial(whole) as j:
                put(j * LANES, LANES)
        if rest:
            put(whole * LANES, rest)


def _pieces(extent: int, wide: int) -> list[tuple[int, int, int]]:
    """An extent as (start, how many, how wide): whole pieces, then one narrower."""
    whole, rest = divmod(extent, wide)
    found = [(0, whole, wide)] if whole else []
    return found + ([(whole * wide, 1, rest)] if rest else [])

"""Softmax and its logarithm along one axis.

Three passes over a row that stays in the first-level cache: its largest value; ``exp(x - largest)``, stored,
and their sum; the division. Along an axis that is not the last one the same three passes run over 16
neighbouring columns at once.

Roofline: 8 bytes per element from and to memory, some 25 operations per element (the polynomial of
:func:`~effic.backends.tvm.kernels.vector_math.exp`): arithmetic limits while the input is in a cache. A row
with a NaN or +Inf, and one that is -Inf throughout, is NaN, as the definition says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels import vector_math
from effic.backends.tvm.kernels.lanes import LANES, argument, function, loop, spec_name
from effic.backends.tvm.kernels.rows import MIN_PARALLEL_ELEMENTS, fold, indices, keep, partials, walk, wide

_LOWEST = float("-inf")


@dataclass(frozen=True)
class Softmax:
    """``y[r, c, i] = exp(x[r, c, i]) / sum_c exp(x[r, c, i])`` in fp32.

    Attributes:
        rows: what lies before the axis, flattened; None: known at run time only.
        columns: the length of the axis.
        inner: what lies behind the axis, flattened. With 1 the buffers are ``[rows, columns]``, else
            ``[rows, columns, inner]``.
        log: the logarithm of it.
    """

    rows: int | None
    columns: int
    inner: int = 1
    log: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("softmax", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if self.columns < 1 or self.inner < 1 or (self.rows is not None and self.rows < 1):
            return "a softmax of no elements"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x, y)``."""
        result: list[Any] = []
        with function(self.name, result) as T:
            rows = T.int64() if self.rows is None else self.rows
            shape = (rows, self.columns) if self.inner == 1 else (rows, self.columns, self.inner)
            x, y = argument(T, "x", shape), argument(T, "y", shape)
            elements = (self.rows or 1) * self.columns * self.inner
            parallel = cpu.cores > 1 and (self.rows is None or elements >= MIN_PARALLEL_ELEMENTS)
            if self.inner == 1:
                with loop(T, rows, parallel) as row:
                    self._row(T, x, y, row)
            else:
                vectors = -(-self.inner // LANES)
                with loop(T, rows * vectors, parallel) as piece:
                    self._columns(T, x, y, piece // vectors, piece % vectors)
        return result[0]

    def _row(self, T: Any, x: Any, y: Any, row: Any) -> None:
        largest = partials(T, 4, _LOWEST)

        def look(slot: int, start: Any, width: int) -> None:
            at = [indices(T, slot * LANES, width)]
            T.buffer_store(largest, T.max(largest[at[0]], x[row, indices(T, start, width)]), at)

        walk(T, self.columns, 4, look)
        top = fold(T, largest, 4, T.max)
        sums = partials(T, 2, 0.0)

        def power(slot: int, start: Any, width: int) -> None:
            at, here = indices(T, slot * LANES, width), indices(T, start, width)
            value = keep(T, vector_math.exp_below_one(x[row, here] - wide(T, top, width)), width)
            if not self.log:
                T.buffer_store(y, value, [row, here])
            T.buffer_store(sums, sums[at] + value, [at])

        walk(T, self.columns, 2, power)
        total = fold(T, sums, 2, lambda a, b: a + b)
        factor = keep(T, vector_math.log(total) if self.log else T.float32(1) / total, 1)

        def finish(_: int, start: Any, width: int) -> None:
            here = indices(T, start, width)
            if self.log:
                value = x[row, here] - wide(T, top, width) - wide(T, factor, width)
            else:
                value = y[row, here] * wide(T, factor, width)
            T.buffer_store(y, value, [row, here])

        walk(T, self.columns, 4, finish)

    def _columns(self, T: Any, x: Any, y: Any, row: Any, piece: Any) -> None:
        """16 columns beside each other; the last few by a narrower vector."""
        whole, rest = divmod(self.inner, LANES)
        if rest == 0:
            self._strip(T, x, y, row, piece * LANES, LANES)
        elif whole == 0:
            self._strip(T, x, y, row, 0, rest)
        else:
            with T.If(piece < whole):
                with T.Then():
                    self._strip(T, x, y, row, piece * LANES, LANES)
                with T.Else():
                    self._strip(T, x, y, row, whole * LANES, rest)

    def _strip(self, T: Any, x: Any, y: Any, row: Any, start: Any, width: int) -> None:
        here, own = indices(T, start, width), indices(T, 0, width)
        top, total = partials(T, 1, _LOWEST), partials(T, 1, 0.0)
        with T.serial(self.columns) as c:
            T.buffer_store(top, T.max(top[own], x[row, c, here]), [own])
        with T.serial(self.columns) as c:
            value = keep(T, vector_math.exp_below_one(x[row, c, here] - top[own]), width)
            if not self.log:
                T.buffer_store(y, value, [row, c, here])
            T.buffer_store(total, total[own] + value, [own])
        factor = vector_math.log(total[own]) if self.log else wide(T, 1.0, width) / total[own]
        T.buffer_store(total, factor, [own])
        with T.serial(self.columns) as c:
            if self.log:
                value = x[row, c, here] - top[own] - total[own]
            else:
                value = y[row, c, here] * total[own]
            T.buffer_store(y, value, [row, c, here])


def softmax_of(shape: list[Any], axis: int, log: bool) -> Softmax | None:
    """The kernel for a tensor of this shape; None where only the axes behind or of the softmax are unknown
    at build, or one is empty."""
    axis %= len(shape)
    known = [int(size) if isinstance(size, (int, tirx.IntImm)) else None for size in shape]
    columns, rows, inner = known[axis], 1, 1
    unknown = False
    for size in known[:axis]:
        unknown |= size is None
        rows *= size or 1
    for size in known[axis + 1 :]:
        if size is None:
            return None
        inner *= size
    if columns is None:
        return None
    spec = Softmax(None if unknown else rows, columns, inner, log)
    return None if spec.why_not() or 0 in known else spec

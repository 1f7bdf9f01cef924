"""Products of activations with packed weights on a GPU, whatever the packing: few rows, and tiles.

``y[M, N] = x[M, K] @ W[K, N] (+ bias)``, x and y of fp32 or fp16, sums always in fp32. What a packing has to
know how to do is a :class:`Weight`; positions along k are those of the packed weight (padding included),
which :meth:`Weight.real` leads back to x.

Few rows (``M <= ROWS``). A warp has :data:`Weight.per_warp` output channels, its threads have one *chunk* of
consecutive k of each, loaded as one vector, and keep a sum per row and channel; at the end the sums are
added over the warp by shuffles. x lies in shared memory as fp32, a chunk in ``codes + 1`` words, so that
the 32 threads read 32 banks. Bound by memory: the packed weight is read once, x (a few kB) by every block
from the L2 cache.

Tiles. A block has ``rows x 64`` of y; 32 k of x and W are laid into shared memory, W decoded there once per
block, and multiplied: in fp16 by the tensor cores (``mma.m16n8k16``, a warp has 16 columns), in fp32 by
multiply-adds (a thread has every eighth row and every sixteenth column). Bound by decoding up to some 64
rows, beyond that by the products; each further 64 rows decode the weight again.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from effic.backends.tvm.kernels.lanes import function
from effic.backends.tvm.kernels.launch_cuda import MMA_K, MMA_M, MMA_N, WARP, Launch, SerialLaunch

ROWS = 4
"""Most rows of x for which every warp reads the weight by itself."""

WARPS = 4
THREADS = WARPS * WARP
BLOCK_N, BLOCK_K = 64, 32
# A line of shared memory more than the data: rows must not all begin in the same bank.
_HALF_PITCH, _FLOAT_PITCH = BLOCK_K + 8, BLOCK_K + 1
_ACROSS, _DOWN = 16, 8
"""Threads of a block along N and M, in fp32 tiles."""


class Weight(abc.ABC):
    """A packed weight as kernels read it, inside a function under construction.

    Attributes:
        codes: weights of one output channel that a thread takes at once: a multiple of 4, at most 32.
        chunks: how many of them lie along k.
        per_warp: output channels of a warp, in the form for few rows.
        unit: consecutive k that :meth:`decode` decodes at once; divides 32.
        n_group: output channels that share what :meth:`factor` returns; else N.
        n_groups: how many such groups there are.
        offsets: whether :meth:`factor` has a second part.
    """

    codes: int
    chunks: int
    per_warp: int
    unit: int
    n_group: int
    n_groups: int
    offsets: bool = False

    @abc.abstractmethod
    def arguments(self, T: Any) -> None:
        """Declare the function's arguments between x and the bias."""

    @abc.abstractmethod
    def real(self, T: Any, k: Any) -> tuple[Any, Any]:
        """The input channel of a packed position, and whether it has one."""

    def factor(self, T: Any, group: Any, channel: Any) -> tuple[Any, Any]:
        """What x is multiplied by for a group of output channels, and again for its offset; None is 1."""
        return None, None

    @abc.abstractmethod
    def load(self, T: Any, slot: int, row: Any, chunk: Any) -> None:
        """Load a chunk of an output channel into the thread's registers number ``slot``."""

    @abc.abstractmethod
    def add(
        self, T: Any, slots: int, rows: int, x: Callable[[int, Any], Any], sums: Callable[[int, int], Any]
    ) -> None:
        """Add loaded chunks times x.

        Args:
            slots: how many output channels are loaded.
            rows: of x.
            x: its value of a row at a position in the chunk.
            sums: (buffer, index) of the sum of a slot and row.
        """

    def finish(self, T: Any, row: Any, chunk: Any, total: Any, x_sum: Any) -> Any:
        """A chunk's product from its :meth:`add` and the sum of x (or of x times the offset) over it."""
        return total

    @property
    def sums_x(self) -> bool:
        """Whether :meth:`finish` needs ``x_sum``."""
        return False

    @abc.abstractmethod
    def decode(self, T: Any, row: Any, k: Any, store: Callable[[Any, Any], None]) -> None:
        """Decode ``unit`` weights of an output channel from packed position k on.

        Args:
            store: takes a position within the unit and the weight in fp32.
        """


def product_function(
    name: str, m: int, k: int, n: int, dtype: str, bias: bool, weight: Weight, serial: bool
) -> Any:
    """The function ``(x[M, K], *weight, [bias[N]], y[M, N])``.

    Args:
        name: of the function.
        m, k, n: sizes.
        dtype: of x and y: ``float32`` or ``float16``; the bias is fp32.
        bias: whether there is one.
        weight: the packed weight.
        serial: for a CPU, threads one after the other, to try it there.
    """
    result: list[Any] = []
    with function(name, result) as T:
        code = _Product(T, m, k, n, dtype, bias, weight, serial)
        if m <= ROWS:
            code.few_rows()
        else:
            code.tiles()
    made = result[0]
    return made if serial else made.with_attr("tirx.is_global_func", True)


class _Product:
    def __init__(
        self, T: Any, m: int, k: int, n: int, dtype: str, bias: bool, weight: Weight, serial: bool
    ) -> None:
        self.T, self.m, self.k, self.n, self.dtype, self.weight = T, m, k, n, dtype, weight
        self.launch = (SerialLaunch if serial else Launch)(T, THREADS)
        self.x = T.arg("x", T.Buffer((m, k), dtype))
        weight.arguments(T)
        self.bias = T.arg("bias", T.Buffer((n,), "float32")) if bias else None
        self.y = T.arg("y", T.Buffer((m, n), dtype))

    def guarded(self, condition: Any, value: Any) -> Any:
        """``value`` where the condition holds, which alone makes its loads lie inside; 0 elsewhere."""
        return self.T.if_then_else(condition, value, self.T.float32(0))

    def result(self, row: Any, column: Any, total: Any) -> None:
        if self.bias is not None:
            total = total + self.bias[column]
        self.T.buffer_store(self.y, self.T.cast(total, self.dtype), [row, column])

    # -- few rows ---------------------------------------------------------------------------------

    def few_rows(self) -> None:
        T, launch, weight, m = self.T, self.launch, self.weight, self.m
        codes, slots = weight.codes, weight.per_warp
        pitch, area = codes + 1, WARP * (codes + 1)
        step = WARP * codes
        per_block = WARPS * slots
        parts = -(-weight.n_group // per_block)
        with launch.grid(weight.n_groups * parts) as (block, _):
            group, first = block // parts, block % parts * per_block
            xs = launch.shared(m * area, "float32")
            offset_xs = launch.shared(m * area, "float32") if weight.offsets else xs
            totals = launch.registers(slots * m)

            def clear(thread: Any) -> None:
                for index in range(slots * m):
                    totals.set(thread, index, T.float32(0))

            def stage(thread: Any, number: Any) -> None:
                with T.serial(-(-step // THREADS)) as i:
                    place = i * THREADS + thread
                    with T.If(place < step), T.Then():
                        channel, there = weight.real(T, number * step + place)
                        factor, offset = weight.factor(T, group, channel)
                        at = place // codes * pitch + place % codes
                        for row in range(m):
                            value = T.cast(self.x[row, channel], "float32")
                            scaled = value if factor is None else value * factor
                            T.buffer_store(xs, self.guarded(there, scaled), [row * area + at])
                            if weight.offsets:
                                T.buffer_store(
                                    offset_xs, self.guarded(there, scaled * offset), [row * area + at]
                                )

            def multiply(thread: Any, number: Any) -> None:
                lane = thread % WARP
                chunk = number * WARP + lane
                with T.If(chunk < weight.chunks), T.Then():
                    for slot in range(slots):
                        weight.load(T, slot, self.row(group, first, thread, slot, inside=True), chunk)
                    sums = T.alloc_buffer((slots * m,), "float32", scope="local")
                    for index in range(slots * m):
                        T.buffer_store(sums, T.float32(0), [index])
                    weight.add(
                        T,
                        slots,
                        m,
                        lambda row, j: xs[row * area + lane * pitch + j],
                        lambda slot, row: (sums, slot * m + row),
                    )
                    x_sum = T.alloc_buffer((m,), "float32", scope="local")
                    if weight.sums_x:
                        for row in range(m):
                            T.buffer_store(x_sum, T.float32(0), [row])
                            with T.unroll(codes) as j:
                                value = offset_xs[row * area + lane * pitch + j]
                                T.buffer_store(x_sum, x_sum[row] + value, [row])
                    for slot in range(slots):
                        where = self.row(group, first, thread, slot, inside=True)
                        for row in range(m):
                            index = slot * m + row
                            part = weight.finish(T, where, chunk, sums[index], x_sum[row])
                            totals.set(thread, index, totals.get(thread, index) + part)

            def write(thread: Any) -> None:
                with T.If(thread % WARP == 0), T.Then():
                    for slot in range(slots):
                        place = first + thread // WARP * slots + slot
                        column = group * weight.n_group + place
                        with T.If(T.And(place < weight.n_group, column < self.n)), T.Then():
                            for row in range(m):
                                self.result(row, column, totals.get(thread, slot * m + row))

            launch.each(clear)
            with T.serial(-(-weight.chunks // WARP)) as number:
                launch.barrier()  # nobody reads the piece before any more
                launch.each(lambda thread: stage(thread, number))
                launch.barrier()
                launch.each(lambda thread: multiply(thread, number))
            launch.warp_sums(totals, slots * m)
            launch.each(write)

    def row(self, group: Any, first: Any, thread: Any, slot: int, *, inside: bool) -> Any:
        """The output channel of a thread's slot; the last one where there is none."""
        column = group * self.weight.n_group + first + thread // WARP * self.weight.per_warp + slot
        return self.T.min(column, self.T.int32(self.n - 1)) if inside else column

    # -- tiles ------------------------------------------------------------------------------------

    def tiles(self) -> None:
        T, launch, weight = self.T, self.launch, self.weight
        half = self.dtype == "float16"
        rows = next(size for size in (16, 32, 64) if self.m <= size or size == 64)
        pitch = _HALF_PITCH if half else _FLOAT_PITCH
        packed_k = weight.chunks * weight.codes
        with launch.grid(-(-self.n // BLOCK_N), -(-self.m // rows)) as (across, down):
            xs = launch.shared(rows * pitch, self.dtype)
            ws = launch.shared(BLOCK_N * pitch, self.dtype)
            inner = _Tensor(launch, rows) if half else _Scalar(launch, rows)

            def stage(thread: Any, number: Any) -> None:
                with T.serial(rows * BLOCK_K // THREADS) as i:
                    place = i * THREADS + thread
                    row, position = place // BLOCK_K, place % BLOCK_K
                    channel, there = weight.real(T, number * BLOCK_K + position)
                    there = T.And(there, down * rows + row < self.m)
                    value = T.if_then_else(
                        there,
                        self.x[T.min(down * rows + row, T.int32(self.m - 1)), channel],
                        T.cast(T.float32(0), self.dtype),
                    )
                    T.buffer_store(xs, value, [row * pitch + position])
                units = BLOCK_K // weight.unit
                with T.serial(-(-BLOCK_N * units // THREADS)) as i:
                    place = i * THREADS + thread
                    with T.If(place < BLOCK_N * units), T.Then():
                        row, begin = place // units, place % units * weight.unit
                        at = row * pitch + begin
                        position = number * BLOCK_K + begin
                        column = T.min(across * BLOCK_N + row, T.int32(self.n - 1))
                        with T.If(position < packed_k):
                            with T.Then():
                                weight.decode(
                                    T,
                                    column,
                                    position,
                                    lambda j, value: T.buffer_store(ws, T.cast(value, self.dtype), [at + j]),
                                )
                            with T.Else():
                                for j in range(weight.unit):
                                    T.buffer_store(ws, T.cast(T.float32(0), self.dtype), [at + j])

            launch.each(inner.clear)
            with T.serial(-(-packed_k // BLOCK_K)) as number:
                launch.barrier()
                launch.each(lambda thread: stage(thread, number))
                launch.barrier()
                inner.multiply(xs, ws, pitch)

            def write(row: Any, column: Any, total: Any) -> None:
                row, column = down * rows + row, across * BLOCK_N + column
                with T.If(T.And(row < self.m, column < self.n)), T.Then():
                    self.result(row, column, total)

            launch.each(lambda thread: inner.write(thread, write))


class _Scalar:
    """Multiply-adds of fp32: a thread has every eighth row and every sixteenth column of the tile."""

    def __init__(self, launch: Launch, rows: int) -> None:
        self.launch, self.down, self.across = launch, rows // _DOWN, BLOCK_N // _ACROSS
        self.totals = launch.registers(self.down * self.across)

    def clear(self, thread: Any) -> None:
        for index in range(self.down * self.across):
            self.totals.set(thread, index, self.launch.T.float32(0))

    def multiply(self, xs: Any, ws: Any, pitch: int) -> None:
        T = self.launch.T

        def phase(thread: Any) -> None:
            left = T.alloc_buffer((self.down,), "float32", scope="local")
            right = T.alloc_buffer((self.across,), "float32", scope="local")
            with T.serial(BLOCK_K) as k:
                for i in range(self.down):
                    T.buffer_store(left, xs[(thread // _ACROSS + _DOWN * i) * pitch + k], [i])
                for j in range(self.across):
                    T.buffer_store(right, ws[(thread % _ACROSS + _ACROSS * j) * pitch + k], [j])
                for i in range(self.down):
                    for j in range(self.across):
                        index = i * self.across + j
                        self.totals.set(thread, index, self.totals.get(thread, index) + left[i] * right[j])

        self.launch.each(phase)

    def write(self, thread: Any, store: Callable[[Any, Any, Any], None]) -> None:
        for i in range(self.down):
            for j in range(self.across):
                row, column = thread // _ACROSS + _DOWN * i, thread % _ACROSS + _ACROSS * j
                store(row, column, self.totals.get(thread, i * self.across + j))


class _Tensor:
    """Tensor cores: a warp has all rows of the tile and 16 of its columns."""

    def __init__(self, launch: Launch, rows: int) -> None:
        self.launch, self.down = launch, rows // MMA_M
        self.columns = BLOCK_N // WARPS
        self.across = self.columns // MMA_N
        self.a = launch.registers(8 * self.down, "float16")
        self.b = launch.registers(4 * self.across, "float16")
        self.totals = launch.registers(4 * self.down * self.across)

    def clear(self, thread: Any) -> None:
        for index in range(4 * self.down * self.across):
            self.totals.set(thread, index, self.launch.T.float32(0))

    def multiply(self, xs: Any, ws: Any, pitch: int) -> None:
        launch = self.launch
        for begin in range(0, BLOCK_K, MMA_K):

            def load(thread: Any, begin: int = begin) -> None:
                lane, warp = thread % WARP, thread // WARP
                # Of a fragment, a thread has pairs of k: 2 (lane % 4) and the next, and the same 8 further on.
                position = begin + lane % 4 * 2
                for i in range(self.down):
                    for r in range(8):
                        row = i * MMA_M + lane // 4 + r // 2 % 2 * 8
                        self.a.set(thread, 8 * i + r, xs[row * pitch + position + r // 4 * 8 + r % 2])
                for j in range(self.across):
                    for r in range(4):
                        row = warp * self.columns + j * MMA_N + lane // 4
                        self.b.set(thread, 4 * j + r, ws[row * pitch + position + r // 2 * 8 + r % 2])

            launch.each(load)
            for i in range(self.down):
                for j in range(self.across):
                    launch.mma(self.a, 8 * i, self.b, 4 * j, self.totals, 4 * (i * self.across + j))

    def write(self, thread: Any, store: Callable[[Any, Any, Any], None]) -> None:
        lane, warp = thread % WARP, thread // WARP
        for i in range(self.down):
            for j in range(self.across):
                for r in range(4):
                    row = i * MMA_M + lane // 4 + r // 2 * 8
                    column = warp * self.columns + j * MMA_N + lane % 4 * 2 + r % 2
                    store(row, column, self.totals.get(thread, 4 * (i * self.across + j) + r))

"""Dense fp32 matrix products: against a weight packed at build, and of two activations.

``DenseMatMul``: ``y[m, n] = act(sum_k x[m, k] · w[k, n] + bias[n])``. The weight is stored as panels
``[ceil(N / P), K, P]`` of P = 16 to 64 columns, by the rows, the last one padded with zeros. A register
tile holds ``rows × P`` sums; each k costs P/16 loads of the panel (one contiguous stream, fetched ahead),
``rows`` broadcasts of x and ``rows · P/16`` multiply-adds. x of more than a few rows is laid out first, as
the tiles read it; y stays plain.

Roofline: ``2·M·K·N`` flops against ``4·K·N`` bytes of weight, read once. Up to M of about 16 the weight's
bytes limit (memory bandwidth): all rows are one register tile or two, so that bytes arrive while sums are
made. For more rows the multiply-adds do; the panel is read again per tile, from the L2 cache: K is cut so
that a piece of the panel fits there.

``BatchMatMul``: ``y[b] = x[b] @ w[b]`` (or ``w[b]ᵀ``) of two activations: attention. Nothing is known at
build, so a panel ``[K, 32]`` of w is copied into a thread's own buffer first (transposed on the way when
``transpose_b``) and the same register tile runs over it: ``K·N`` elements copied for ``M·K·N``
multiply-adds, which is why M = 1 takes w as it lies instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import (
    CHUNKS_PER_CORE,
    LANES,
    MIN_PARALLEL_FLOPS,
    accumulator,
    argument,
    clamp,
    function,
    keeps_floats,
    lanes,
    loop,
    registers,
    spec_name,
    splat,
    tiles,
    why_no_activation,
)

GEMV_ROWS = 4
"""Up to so many rows the bytes of the weight limit: wide panels keep more loads in flight."""

TALL_ROWS = 28
"""Up to so many rows one or two register tiles hold them all: the weight is read as evenly as can be."""

_AHEAD = 32
"""Rows of a panel that are fetched ahead: some 6 KiB, what arrives while memory answers."""

_K_TILE = 1024
"""Rows of a panel of 48 columns that stay in a quarter of a megabyte, half of a small L2 cache."""


OPEN_PANEL = 2 * LANES
"""Columns of a panel that kernels of one row and of many share."""


def pack_panels(weight: np.ndarray, panel: int) -> np.ndarray:
    """``[K, N]`` as ``[ceil(N / panel), K, panel]``, zeros past N."""
    k, n = weight.shape
    count = -(-n // panel)
    packed = np.zeros((count, k, panel), np.float32)
    full = n // panel
    packed[:full] = weight[:, : full * panel].reshape(k, full, panel).transpose(1, 0, 2)
    if full < count:
        packed[full, :, : n - full * panel] = weight[:, full * panel :]
    return packed


@dataclass(frozen=True)
class DenseMatMul:
    """``y[M, N] = act(x[M, K] @ w[K, N] + bias[N])`` in fp32.

    Attributes:
        m, k, n: sizes.
        bias: whether a bias of N follows the weight.
        activation: None, ``relu``, or ``clip`` to ``low`` … ``high``.
        panel: columns of a panel of the packed weight, a multiple of 16; None chooses by ``m``.
        rows: rows of the register tile; None chooses by ``m`` and the CPU.
        k_tile: most rows of a panel per round; None chooses.
        portable: use the form for CPUs without AVX512.
    """

    m: int
    k: int
    n: int
    bias: bool = False
    activation: str | None = None
    low: float = -math.inf
    high: float = math.inf
    panel: int | None = None
    rows: int | None = None
    k_tile: int | None = None
    portable: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("dense", self)

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        if self.panel is not None:
            return self.panel
        if self.m <= GEMV_ROWS:
            return 4 * LANES
        if self.m <= TALL_ROWS:
            # One tile of them all as long as the registers hold it, then two.
            return LANES if 14 < self.m <= 16 else 2 * LANES
        # Three vectors, except where the last panel would be mostly padding.
        return 3 * LANES if -(-self.n // (3 * LANES)) * 3 * LANES <= self.n * 1.08 else 2 * LANES

    @property
    def packs(self) -> bool:
        """Whether x is laid out as the tiles read it."""
        return self.m > GEMV_ROWS and self.n > 8 * LANES

    def _most_rows(self, registers: int) -> int:
        """Most rows of a register tile."""
        if self.rows is not None:
            return self.rows
        vectors = self.columns // LANES
        # A row of the panel and one broadcast need registers as well.
        fit = min(registers // vectors, (registers + 3 - vectors) // vectors)
        return max(1, min(fit, 16 if self.m <= TALL_ROWS else 8))

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(self.m, self.k, self.n) < 1:
            return f"a product of [{self.m}, {self.k}] and [{self.k}, {self.n}] has no elements"
        if self.panel is not None and (self.panel < LANES or self.panel % LANES):
            return f"panels of {self.panel} columns are not multiples of {LANES}"
        return why_no_activation(self.activation, self.low, self.high)

    def pack(self, weight: np.ndarray, bias: np.ndarray | None = None) -> list[np.ndarray]:
        """The weight ``[K, N]`` as panels, and the bias ``[N]`` padded to whole panels."""
        packed = [pack_panels(weight, self.columns)]
        if self.bias:
            padded = np.zeros(packed[0].shape[0] * self.columns, np.float32)
            if bias is not None:
                padded[: self.n] = np.broadcast_to(bias, (self.n,))
            packed.append(padded)
        return packed

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x[M, K], w[panels, K, P], [bias[panels · P]], y[M, N])``."""
        width, panels = self.columns, -(-self.n // self.columns)
        fit = registers(cpu, self.portable)
        most = self._most_rows(fit)
        k_tile = self.k_tile or (_K_TILE if self.m > 2 * most else self.k)
        length, whole, left = tiles(self.k, k_tile)
        pieces = whole + (left > 0)
        result: list[Any] = []
        with function(self.name, result) as T:
            x, w = argument(T, "x", (self.m, self.k)), argument(T, "w", (panels, self.k, width))
            bias = argument(T, "bias", (panels * width,)) if self.bias else None
            y = argument(T, "y", (self.m, self.n))
            rows, full, rest = tiles(self.m, most)
            parallel = cpu.cores > 1 and 2 * self.m * self.k * self.n >= MIN_PARALLEL_FLOPS
            parts = _parts(panels, full, CHUNKS_PER_CORE * cpu.cores)
            tile = _Tile(T, fit, self, lambda panel, k, v: w[panel, k, lanes(T, v * LANES)], bias, y, ahead=w)
            held = self._laid(T, x, length, rows, full, rest, parallel) if self.packs else None
            with loop(T, panels * parts, parallel) as work:
                panel, part = (work, 0) if parts == 1 else (work // parts, work % parts)
                # Sums of the pieces of K so far, all rows of the panel.
                sums = T.alloc_buffer((self.m, width), "float32", scope="global") if pieces > 1 else None

                def piece(index: Any, is_first: bool, is_last: bool) -> None:
                    start = index * length
                    span = _Span(start, left or length if is_last else length, is_first, is_last)

                    def run(number: Any, row: Any, rows: int) -> None:
                        def read(r: int, k: Any) -> Any:
                            if held is None:
                                return x[row + r, start + k]
                            return held[index, number, k * rows + r]

                        tile.run(panel, row, rows, read, sums, span)

                    first = full * part // parts
                    with T.serial(full * (part + 1) // parts - first) as number:
                        run(first + number, (first + number) * rows, rows)
                    if rest and parts == 1:
                        run(full, full * rows, rest)
                    elif rest:
                        with T.If(part == parts - 1), T.Then():
                            run(full, full * rows, rest)

                piece(0, True, pieces == 1)
                # A loop, not one code after the other: LLVM keeps only so many accesses in registers.
                if pieces > 2:
                    with T.serial(pieces - 2) as index:
                        piece(index + 1, False, False)
                if pieces > 1:
                    piece(pieces - 1, False, True)
        return result[0]

    def _laid(self, T: Any, x: Any, length: int, rows: int, full: int, rest: int, parallel: bool) -> Any:
        """x as the tiles read it: per piece of K and tile of rows, ``rows`` floats for each k.

        In place, the rows of a tile are as many streams, and rows a power of two apart share a set of the
        first cache.
        """
        whole, left = divmod(self.k, length)
        shape = (whole + (left > 0), full + (rest > 0), length * rows + LANES)
        held = T.alloc_buffer(shape, "float32", scope="global")

        def lay(index: Any, number: Any, count: int, length: int, start: Any) -> None:
            row, odd = number * rows, length % LANES
            # A vector of 16 rows may write past ``count``: into the next k, which is written later.
            for base in reversed(range(0, count, LANES)):
                with T.serial(length // LANES) as block:
                    first = start + block * LANES
                    lines = [x[row + min(base + r, count - 1), lanes(T, first)] for r in range(LANES)]
                    for j, vector in enumerate(transpose(T, lines)):
                        at = (block * LANES + j) * count + base
                        T.buffer_store(held, vector, [index, number, lanes(T, at)])
            with T.serial(odd) as k, T.serial(count) as r:
                at = length - odd + k
                T.buffer_store(held, x[row + r, start + at], [index, number, at * count + r])

        def pieces(number: Any, count: int) -> None:
            with T.serial(whole) as index:
                lay(index, number, count, length, index * length)
            if left:
                lay(whole, number, count, left, whole * length)

        with loop(T, full, parallel and full > 1) as number:
            pieces(number, rows)
        if rest:
            pieces(full, rest)
        return held


@dataclass(frozen=True)
class _Span:
    """A piece of K: ``length`` from ``start`` on, and whether sums begin and end with it."""

    start: Any
    length: int
    is_first: bool = True
    is_last: bool = True


def _parts(panels: int, tiles_of_rows: int, wanted: int) -> int:
    """Into how many parts the rows are cut so that panels × parts gives every core work."""
    return max(1, min(tiles_of_rows, -(-wanted // panels))) if panels < wanted else 1


class _Tile:
    """The register tile: ``rows × columns`` sums over a range of k.

    ``held`` is how many vectors of sums the registers hold, ``load(panel, k, v)`` vector ``v`` of a row of the
    panel, ``ahead`` the packed panels where they are to be fetched ahead; ``batch`` are the leading indices of y.
    """

    def __init__(
        self,
        T: Any,
        held: int,
        spec: DenseMatMul | BatchMatMul,
        load: Callable[[Any, Any, int], Any],
        bias: Any,
        y: Any,
        batch: tuple[Any, ...] = (),
        ahead: Any = None,
    ) -> None:
        self.T, self.held, self.spec, self.load, self.bias, self.y = T, held, spec, load, bias, y
        self.batch, self.ahead = batch, ahead
        self.vectors = spec.columns // LANES

    def run(
        self,
        panel: Any,
        row: Any,
        rows: int,
        read: Callable[[int, Any], Any],
        sums: Any,
        span: _Span,
    ) -> None:
        """Rows [row, row + rows) of one panel; ``read(r, k)`` is a float of x, from ``row`` and ``span`` on.

        The sums pass through ``sums`` when k is cut.
        """
        T, spec, vectors = self.T, self.spec, self.vectors
        width, start, length = spec.columns, span.start, span.length
        # Fewer than 8 sums would wait for each other: a multiply-add takes 4 cycles, two start per cycle.
        ways = 1
        while rows * vectors * ways < 8 and rows * vectors * ways * 2 <= self.held and length >= 16 * ways:
            ways *= 2
        order = [(r, v) for r in range(rows) for v in range(vectors)]
        if keeps_floats(rows, vectors, self.held):
            order.sort(key=lambda cell: cell[1])
        acc = [[[accumulator(T) for _ in range(vectors)] for _ in range(rows)] for _ in range(ways)]
        zero, at = splat(T, 0.0), lanes(T, 0)
        for r in range(rows):
            for v in range(vectors):
                if not span.is_first:
                    value = sums[row + r, lanes(T, v * LANES)]
                elif self.bias is not None:
                    value = self.bias[lanes(T, panel * width + v * LANES)]
                else:
                    value = zero
                T.buffer_store(acc[0][r][v], value, [at])
                for way in range(1, ways):
                    T.buffer_store(acc[way][r][v], zero, [at])

        def step(k: Any, way: int) -> None:
            if self.ahead is not None:
                for v in range(vectors):
                    prefetch(T, self.ahead[panel, start + k + _AHEAD, v * LANES])
            for r, v in order:
                product = splat(T, read(r, k)) * self.load(panel, start + k, v)
                T.buffer_store(acc[way][r][v], acc[way][r][v][at] + product, [at])

        with T.serial(length // ways) as group:
            for way in range(ways):
                step(group * ways + way, way)
        for way in range(length % ways):
            step(length - length % ways + way, way)

        def total(r: int, v: int) -> Any:
            values = [of_way[r][v][at] for of_way in acc]
            while len(values) > 1:
                values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
            return values[0]

        if not span.is_last:
            for r in range(rows):
                for v in range(vectors):
                    T.buffer_store(sums, total(r, v), [row + r, lanes(T, v * LANES)])
            return
        if spec.n % width == 0:
            self._store(panel, row, rows, total)
        elif spec.n < width:
            self._store_ragged(panel, row, rows, total)
        else:
            with T.If(panel < spec.n // width):
                with T.Then():
                    self._store(panel, row, rows, total)
                with T.Else():
                    self._store_ragged(panel, row, rows, total)

    def _final(self, value: Any) -> Any:
        if isinstance(self.spec, BatchMatMul):
            return value if self.spec.scale == 1.0 else value * splat(self.T, self.spec.scale)
        return clamp(self.T, value, self.spec.activation, self.spec.low, self.spec.high)

    def _store(self, panel: Any, row: Any, rows: int, total: Any) -> None:
        T, spec = self.T, self.spec
        for r in range(rows):
            for v in range(self.vectors):
                value = self._final(total(r, v))
                T.buffer_store(
                    self.y, value, [*self.batch, row + r, lanes(T, panel * spec.columns + v * LANES)]
                )

    def _store_ragged(self, panel: Any, row: Any, rows: int, total: Any) -> None:
        # Whole vectors as ever; the last, partial one goes through memory, because indices that are
        # not constant would keep the accumulators out of registers.
        T, spec = self.T, self.spec
        left = spec.n % spec.columns
        base = (spec.n // spec.columns) * spec.columns
        partial = left % LANES
        for r in range(rows):
            for v in range(left // LANES):
                value = self._final(total(r, v))
                T.buffer_store(self.y, value, [*self.batch, row + r, lanes(T, base + v * LANES)])
        if partial:
            spill = T.alloc_buffer((rows * LANES,), "float32", scope="local")
            for r in range(rows):
                value = self._final(total(r, left // LANES))
                T.buffer_store(spill, value, [lanes(T, r * LANES)])
            with T.serial(rows) as r, T.serial(partial) as lane:
                at = [*self.batch, row + r, base + left - partial + lane]
                T.buffer_store(self.y, spill[r * LANES + lane], at)


@dataclass(frozen=True)
class BatchMatMul:
    """``y[batch, M, N] = scale · x[batch, M, K] @ w`` of two fp32 activations.

    Attributes:
        batch, m, k, n: sizes.
        transpose_b: w is ``[batch / repeat, N, K]``, otherwise ``[batch / repeat, K, N]``.
        repeat: batches in a row that share one w (heads of a group that share their keys).
        scale: factor of the result.
        rows: rows of the register tile; None chooses by ``m`` and the CPU.
        portable: use the form for CPUs without AVX512.
    """

    batch: int
    m: int
    k: int
    n: int
    transpose_b: bool = False
    repeat: int = 1
    scale: float = 1.0
    rows: int | None = None
    portable: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("batch_matmul", self)

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return 2 * LANES

    @property
    def packs(self) -> bool:
        """Whether a panel of w is copied before use."""
        return self.transpose_b or self.n % LANES != 0 or self.m > GEMV_ROWS

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(self.batch, self.m, self.k, self.n) < 1:
            return f"a product of [{self.batch}, {self.m}, {self.k}] and {self.k} × {self.n} has no elements"
        if self.repeat < 1 or self.batch % self.repeat:
            return f"a batch of {self.batch} cannot share each right side {self.repeat} times"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x[batch, M, K], w[batch / repeat, K, N] or [batch / repeat, N, K], y[batch, M, N])``."""
        width, panels = self.columns, -(-self.n // self.columns)
        held = registers(cpu, self.portable)
        most = self.rows or max(1, min(held // (width // LANES), 8))
        rows, full, rest = tiles(self.m, most)
        flops = 2 * self.batch * self.m * self.k * self.n
        right = self.batch // self.repeat
        result: list[Any] = []
        with function(self.name, result) as T:
            x = argument(T, "x", (self.batch, self.m, self.k))
            w = argument(T, "w", (right, *((self.n, self.k) if self.transpose_b else (self.k, self.n))))
            y = argument(T, "y", (self.batch, self.m, self.n))
            with loop(T, right * panels, cpu.cores > 1 and flops >= MIN_PARALLEL_FLOPS) as piece:
                group, panel = piece // panels, piece % panels
                load = self._packed(T, w, group, panel) if self.packs else self._direct(T, w, group)
                with T.serial(self.repeat) as copy:
                    batch = group * self.repeat + copy
                    tile = _Tile(T, held, self, load, None, y, (batch,))
                    with T.serial(full) as number:
                        row = number * rows
                        tile.run(panel, row, rows, lambda r, k: x[batch, row + r, k], None, _Span(0, self.k))
                    if rest:
                        row = full * rows
                        tile.run(panel, row, rest, lambda r, k: x[batch, row + r, k], None, _Span(0, self.k))
        return result[0]

    def _direct(self, T: Any, w: Any, group: Any) -> Callable[[Any, Any, int], Any]:
        # The second vector of a last panel that has only one is read as the first: never past the end.
        last = self.n // LANES - 1

        def load(panel: Any, k: Any, v: int) -> Any:
            vector = panel * (self.columns // LANES) + v
            if self.n % self.columns:
                vector = T.min(vector, last)
            return w[group, k, lanes(T, vector * LANES)]

        return load

    def _packed(self, T: Any, w: Any, group: Any, panel: Any) -> Callable[[Any, Any, int], Any]:
        """Copy the panel into a buffer ``[K, columns]``; columns past N repeat the last one."""
        width = self.columns
        held = T.alloc_buffer((self.k, width), "float32", scope="global")

        def column(c: Any) -> Any:
            return T.min(panel * width + c, self.n - 1) if self.n % width else panel * width + c

        def copy() -> None:
            for v in range(width // LANES):
                if self.transpose_b:
                    with T.serial(self.k // LANES) as block:
                        rows = [
                            w[group, column(v * LANES + c), lanes(T, block * LANES)] for c in range(LANES)
                        ]
                        for i, vector in enumerate(transpose(T, rows)):
                            T.buffer_store(held, vector, [block * LANES + i, lanes(T, v * LANES)])
                    with T.serial(self.k % LANES) as k:
                        at = self.k // LANES * LANES + k
                        with T.serial(LANES) as c:
                            T.buffer_store(held, w[group, column(v * LANES + c), at], [at, v * LANES + c])
                elif self.n % LANES == 0:
                    with T.serial(self.k) as k:
                        at = T.min(panel * width + v * LANES, self.n - LANES)
                        T.buffer_store(held, w[group, k, lanes(T, at)], [k, lanes(T, v * LANES)])
                else:
                    with T.serial(self.k) as k, T.serial(LANES) as c:
                        T.buffer_store(held, w[group, k, column(v * LANES + c)], [k, v * LANES + c])

        copy()
        return lambda _, k, v: held[k, lanes(T, v * LANES)]


def prefetch(T: Any, element: Any) -> None:
    """Ask for the line of an element; one past the end of its buffer is no error."""
    arguments = [T.address_of(element), T.int32(0), T.int32(3), T.int32(1)]  # to read, keep near, data
    T.evaluate(T.call_llvm_intrin("llvm.prefetch", *arguments, dtype="void"))


def transpose(T: Any, rows: list[Any]) -> list[Any]:
    """Columns of 16 vectors of 16: four rounds of interleaving row i with row i + 8.

    One round moves the top bit of the row number to the bottom of the lane number; after four the two
    numbers have changed places.
    """
    from tvm.tirx import Shuffle, const

    low = [const(i // 2 + (i % 2) * LANES, "int32") for i in range(LANES)]
    high = [const(LANES // 2 + i // 2 + (i % 2) * LANES, "int32") for i in range(LANES)]
    held = T.alloc_buffer((2 * LANES * LANES,), "float32", scope="local")
    for i, row in enumerate(rows):
        T.buffer_store(held, row, [lanes(T, i * LANES)])
    for turn in range(4):
        source, sink = (turn % 2) * LANES, (1 - turn % 2) * LANES
        for i in range(LANES // 2):
            pair = [
                held[lanes(T, (source + i) * LANES)],
                held[lanes(T, (source + i + LANES // 2) * LANES)],
            ]
            T.buffer_store(held, Shuffle(pair, low), [lanes(T, (sink + 2 * i) * LANES)])
            T.buffer_store(held, Shuffle(pair, high), [lanes(T, (sink + 2 * i + 1) * LANES)])
    return [held[lanes(T, i * LANES)] for i in range(LANES)]

"""The TIR of :class:`~effic.backends.tvm.kernels.quantized.QuantizedMatMul`; layout and algebra are told there.

Activations are laid out first (:mod:`~effic.backends.tvm.kernels.quantized_activations`). Where a group of
columns covers many blocks that is done once per group and call, else by each block for its own groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.dense import prefetch, transpose
from effic.backends.tvm.kernels.lanes import (
    LANES,
    accumulators,
    function,
    loop,
    splat,
    tiles,
)
from effic.backends.tvm.kernels.quantized import CHUNKS, COLUMNS, QuantizedMatMul
from effic.backends.tvm.kernels.quantized_activations import VPDPBUSD, Activations, Laid

TURNED_ROWS = 4
"""From so many rows in a tile on, outliers meet the activations of all of them at once."""

DECODED_K = 256
"""Most k of 32 columns that are decoded at a time: 32 KiB; twice as many were 4 % slower."""

SHARED_GROUPS = 4
"""Up to so many groups of columns the activations of all of them are laid out before the blocks begin."""

PANEL = 2
"""Chunks of a decoded panel."""

VPERMPS = "llvm.x86.avx512.permvar.sf.512"


def quantized_function(spec: QuantizedMatMul, cpu: Cpu) -> Any:
    """The function of a spec that can be held."""
    result: list[Any] = []
    with function(spec.name, result) as T:
        QuantizedCode(spec, cpu, T).write()
    return result[0]


class QuantizedCode(Activations):
    """Writes the function of one spec; other codes of weights change how a vector of them is read."""

    # -- vectors ----------------------------------------------------------------------------------

    def decoded(self, word: Any, k: int) -> Any:
        """Code ``k`` of 16 words, less the middle of the range, as floats."""
        T, spec = self.T, self.spec
        shift = 8 * (k % 4) + spec.width * (k // 4)
        if spec.width == 8:
            # The top bit of each byte flipped makes unsigned less 128 of signed numbers.
            signed = T.bitwise_xor(word, self.integer(-0x7F7F7F80))
            if shift < 24:
                signed = T.shift_left(signed, self.integer(24 - shift))
            return T.cast(T.shift_right(signed, self.integer(24)), "float32x16")
        moved = T.shift_right(word, self.integer(shift)) if shift else word
        code = T.int32((1 << spec.width) - 1)
        if self.avx512:
            # The table repeats itself where codes are narrower than its four bits of index.
            index = T.bitwise_and(T.ramp(0, 1, LANES), T.broadcast(code, LANES))
            table = T.cast(index - self.integer(spec.middle), "float32x16")
            return T.call_llvm_pure_intrin(VPERMPS, table, moved, dtype="float32x16")
        moved = T.bitwise_and(moved, T.broadcast(code, LANES))
        return T.cast(moved - self.integer(spec.middle), "float32x16")

    def dotted(self, total: Any, word: Any, field: int, four: Any) -> Any:
        """``total`` plus four codes of each word times four bytes of an activation."""
        T, spec = self.T, self.spec
        mask = (1 << spec.width) - 1
        moved = T.shift_right(word, self.integer(spec.width * field)) if field else word
        if self.vnni:
            if spec.width < 8:
                moved = T.bitwise_and(moved, self.integer(mask * 0x01010101))
            left = T.reinterpret("int8x64", moved)
            right = T.reinterpret("int8x64", T.broadcast(T.reinterpret("int32", four), LANES))
            return T.call_llvm_pure_intrin(VPDPBUSD, total, left, right, dtype="int32x16")
        word = T.reinterpret("int32", four)
        for byte in range(4):
            part = T.shift_right(moved, self.integer(8 * byte)) if byte else moved
            part = T.bitwise_and(part, self.integer(mask))
            signed = T.shift_right(T.shift_left(word, T.int32(24 - 8 * byte)), T.int32(24))
            total = total + part * self.integer(signed)
        return total

    # -- the function -----------------------------------------------------------------------------

    def write(self) -> None:
        spec, T = self.spec, self.T
        self.x = T.arg("x", T.Buffer((spec.m, spec.k), "float32"))
        words = spec.padded_k // spec.per_word
        self.w = T.arg("w", T.Buffer((spec.blocks, words, CHUNKS, LANES), "int32"))
        groups = (spec.n_groups, spec.padded_k) if self.inputs else (spec.blocks, spec.k_groups, COLUMNS)
        self.scales = T.arg("scales", T.Buffer(groups, "float32"))
        self.zeros = None if spec.symmetric else T.arg("zeros", T.Buffer(groups, "int8"))
        if spec.outliers:
            self.begins = T.arg("begins", T.Buffer((spec.blocks * spec.segments + 1,), "int32"))
            # Weights of one shape have as many outliers as it happens, and share one function.
            count = T.int64()
            self.places = T.arg("places", T.Buffer((count,), "int32"))
            self.shares = T.arg("shares", T.Buffer((count,), "float32"))
        self.bias = T.arg("bias", T.Buffer((spec.blocks, COLUMNS), "float32")) if spec.bias else None
        self.y = T.arg("y", T.Buffer((spec.m, spec.n), "float32"))
        self.plain = self.plain_activations()
        if self.direct:
            self.write_direct()
        else:
            self.write_panels()

    # -- words as they come -----------------------------------------------------------------------

    def write_direct(self) -> None:
        spec, T = self.spec, self.T
        most, lines = max(1, self.registers - 4), self.digits if self.integers else 1
        # 12 x 2 sums at a time, but 16 x 1 where that takes all rows at once.
        self.step = max(1, min(LANES if spec.m * lines <= LANES else 12, most) // lines)
        rows, full, rest = tiles(spec.m, LANES // self.step * self.step)
        self.step = min(self.step, rows)
        chunks = CHUNKS
        while chunks > 1 and self.step * lines * chunks > most:
            chunks //= 2
        laid = None
        if not self.inputs or spec.n_groups <= SHARED_GROUPS:
            groups = spec.n_groups if self.inputs else 1
            laid = self.lay_out(groups, 0, 0, spec.m, self.parallel and spec.m >= LANES)
        turned = self.turned_activations(rows) if spec.outliers and rows >= TURNED_ROWS else None
        with loop(T, spec.blocks, self.parallel) as block:
            sums = T.alloc_buffer((rows, COLUMNS), "float32")

            def tile(number: Any, count: int) -> None:
                first = number * rows
                if laid is None:
                    group = T.floordiv(block * COLUMNS, spec.n_stride)
                    here = self.lay_out(max(1, COLUMNS // spec.n_stride), group, first, count, False)
                else:
                    here = replace(laid, begin=first)
                self.direct_tile(here, sums, block, count, chunks)
                if turned is not None:
                    self.add_turned_outliers(turned, number, sums, block, count)
                elif spec.outliers:
                    self.add_outliers(sums, block, first, count)
                for row in range(count):
                    self.store_row(sums, row, block, first + row, 0, CHUNKS)

            if full > 1:
                with T.serial(full) as number:
                    tile(number, rows)
            else:
                tile(0, rows)
            if rest:
                tile(full, rest)

    def direct_tile(self, laid: Laid, sums: Any, block: Any, rows: int, chunks: int) -> None:
        """Sums of ``rows`` rows and the columns of a block."""
        T = self.T
        with T.serial(rows * CHUNKS) as i:
            self.write_lanes(sums, splat(T, 0.0), T.floordiv(i, CHUNKS), T.floormod(i, CHUNKS) * LANES)
        step, full, rest = tiles(rows, self.step)
        # Rows and chunks within pieces of k: the words are taken in nearly the order they lie in, and stay
        # in the L1 cache.
        with T.serial(self.pieces(chunks)) as piece:
            with T.serial(full * (CHUNKS // chunks)) as i:
                row, part = T.floordiv(i, CHUNKS // chunks) * step, T.floormod(i, CHUNKS // chunks)
                self.direct_chunks(laid, sums, block, row, step, piece, part * chunks, chunks)
            if rest:
                with T.serial(CHUNKS // chunks) as part:
                    self.direct_chunks(laid, sums, block, full * step, rest, piece, part * chunks, chunks)

    def pieces(self, chunks: int) -> int:
        """Into how many pieces of k a tile is cut: segments (integers) or groups (fp32)."""
        return self.spec.segments if self.integers else self.spec.k_groups

    def group_of(self, laid: Laid, block: Any, chunk: Any) -> Any:
        """Which group of columns a chunk is in, counted from the first that is laid out."""
        if not self.inputs:
            return 0
        return self.T.floordiv((block * CHUNKS + chunk) * LANES, self.spec.n_stride) - laid.first

    def direct_chunks(
        self, laid: Laid, sums: Any, block: Any, first: Any, rows: int, part: Any, start: Any, chunks: int
    ) -> None:
        """What segment (integers) or group (fp32) ``part`` along k adds to ``chunks`` chunks of ``sums``."""
        spec, T = self.spec, self.T
        words = (spec.segment if self.integers else spec.pieces * spec.segment) // spec.per_word
        dtype = "int32" if self.integers else "float32"
        digits = self.digits if self.integers else 1
        lines = rows * digits
        # A small buffer each, of no scope: TVM takes one of a kilobyte, or of scope "local", from the heap, and in
        # a function that threads share LLVM keeps what is there in memory beside a prefetch.
        totals = [[T.alloc_buffer((LANES,), dtype) for _ in range(chunks)] for _ in range(lines)]
        cells = [(line, chunk) for line in range(lines) for chunk in range(chunks)]
        groups = [self.group_of(laid, block, start + chunk) for chunk in range(chunks)]
        begun = (laid.begin + first) * digits
        for line, chunk in cells:
            value = splat(T, 0.0)
            if self.integers:
                begin = laid.sums[groups[chunk], begun + line, part]
                if self.zeros is None or not self.inputs:
                    begin = begin * T.int32(spec.middle)
                value = self.integer(T.int32(0) - begin)
            self.write_lanes(totals[line][chunk], value, 0)
        with T.serial(words) as i:
            index = part * words + i
            if chunks < CHUNKS:
                # Chunks that take turns read 64 or 128 bytes here and there, which the CPU does not fetch by itself:
                # ask for what they read of the next piece. Out of cache 16 rows took 1.1 to 1.6 times as long without.
                for chunk in range(chunks):
                    prefetch(T, self.w[block, index + words, start + chunk, 0])
            taken = [self.read(self.w, block, index, start + chunk, 0) for chunk in range(chunks)]
            # What there is more of comes innermost: each of the others is used up at once, and needs no
            # register for long. With 24 sums there are none to hold all activations, or all words, of a step.
            ks = range(0, spec.per_word, 4 if self.integers else 1)
            steps = [(k, *cell) for k in ks for cell in cells]
            if lines <= chunks:
                steps.sort(key=lambda step: (step[2], step[0], step[1]))
            for k, line, chunk in steps:
                here, at = (groups[chunk], begun + line), index * spec.per_word + k
                value = self.read(totals[line][chunk], 0)
                if self.integers:
                    four = laid.values[(*here, T.ramp(at, 1, 4))]
                    value = self.dotted(value, taken[chunk], k // 4, four)
                else:
                    value = value + splat(T, laid.values[(*here, at)]) * self.decoded(taken[chunk], k)
                self.write_lanes(totals[line][chunk], value, 0)
        for line, chunk in cells:
            if line % digits:
                continue
            column = (start + chunk) * LANES
            values = [self.read(totals[line + digit][chunk], 0) for digit in range(digits)]
            value = self.joined(values) if self.integers else values[0]
            row = line // digits
            value = self.finished(laid, value, groups[chunk], block, first + row, part, column)
            self.write_lanes(sums, self.read(sums, first + row, column) + value, first + row, column)

    def finished(
        self, laid: Laid, total: Any, group: Any, block: Any, row: Any, part: Any, column: Any
    ) -> Any:
        """What the sum over a segment (integers) or group (fp32) adds to y."""
        spec, T = self.spec, self.T
        k_group = T.floordiv(part, spec.pieces) if self.integers else part
        if self.zeros is not None and not (self.inputs and self.integers):
            off = self.taken_off(laid, group, laid.begin + row, part)
            if not self.inputs:
                off = off * T.cast(self.read(self.zeros, block, k_group, column), "float32x16")
            total = total - off
        if self.integers:
            total = total * splat(T, laid.scales[group, laid.begin + row, part])
        if not self.inputs:
            total = total * self.read(self.scales, block, k_group, column)
        return total

    def outliers_of(self, block: Any) -> Iterator[tuple[Any, Any, Any]]:
        """A loop over a block's outliers: each one's k, column and share."""
        spec, T = self.spec, self.T
        begin, end = self.begins[block * spec.segments], self.begins[(block + 1) * spec.segments]
        with T.serial(end - begin) as i:
            place = self.places[begin + i]
            k, column = T.shift_right(place, T.int32(7)), T.bitwise_and(place, T.int32(COLUMNS - 1))
            yield k, column, self.shares[begin + i]

    def add_outliers(self, sums: Any, block: Any, first: Any, rows: int) -> None:
        """The shares of a block's outliers, one row after the other."""
        for k, column, share in self.outliers_of(block):
            for row in range(rows):
                value = sums[row, column] + share * self.plain[first + row, k]
                self.T.buffer_store(sums, value, [row, column])

    def add_turned_outliers(self, turned: Any, tile: Any, sums: Any, block: Any, rows: int) -> None:
        """The shares of a block's outliers, all rows of a tile at once."""
        T = self.T
        added = T.alloc_buffer((COLUMNS, LANES), "float32")
        with T.serial(COLUMNS) as column:
            self.write_lanes(added, splat(T, 0.0), column, 0)
        for k, column, share in self.outliers_of(block):
            value = self.read(added, column, 0) + splat(T, share) * self.read(turned, tile, k, 0)
            self.write_lanes(added, value, column, 0)
        with T.serial(CHUNKS) as chunk:
            columns = [self.read(added, chunk * LANES + i, 0) for i in range(LANES)]
            for row, value in enumerate(transpose(T, columns)[:rows]):
                whole = self.read(sums, row, chunk * LANES) + value
                self.write_lanes(sums, whole, row, chunk * LANES)

    def store_row(self, sums: Any, row: Any, block: Any, target: Any, start: Any, chunks: int) -> None:
        """A row of ``chunks`` chunks of ``sums`` to y; columns that are padding are left out."""
        spec, T = self.spec, self.T
        exact = spec.n_group == spec.n_stride or spec.n_groups == 1
        with T.serial(chunks) as chunk:
            column = (start + chunk) * LANES
            if self.bias is not None:
                biased = self.read(sums, row, chunk * LANES) + self.read(self.bias, block, column)
                self.write_lanes(sums, biased, row, chunk * LANES)
            place = block * COLUMNS + column
            if exact:
                begin, limit = place, T.int32(spec.n)
            else:
                group = T.floordiv(place, spec.n_stride)
                begin = group * spec.n_group + T.floormod(place, spec.n_stride)
                limit = T.min(T.int32(spec.n), (group + 1) * spec.n_group)
            if exact and spec.n % COLUMNS == 0:
                self.write_lanes(self.y, self.read(sums, row, chunk * LANES), target, begin)
                return
            with T.If(begin + LANES <= limit):
                with T.Then():
                    self.write_lanes(self.y, self.read(sums, row, chunk * LANES), target, begin)
                with T.Else(), T.serial(T.max(limit - begin, T.int32(0))) as i:
                    T.buffer_store(self.y, sums[row, chunk * LANES + i], [target, begin + i])

    # -- decoded panels ---------------------------------------------------------------------------

    def write_panels(self) -> None:
        spec, T = self.spec, self.T
        per_block = CHUNKS // PANEL
        rows, full, rest = tiles(spec.m, max(1, self.registers // PANEL - 2))
        together = max(1, DECODED_K // spec.segment)
        pieces, left = divmod(spec.segments, together)
        with loop(T, spec.blocks * per_block, self.parallel) as panel:
            block, start = T.floordiv(panel, per_block), T.floormod(panel, per_block) * PANEL
            decoded = T.alloc_buffer((together * spec.segment, PANEL * LANES), "float32")
            sums = T.alloc_buffer((spec.m, PANEL * LANES), "float32")
            with T.serial(spec.m * PANEL) as i:
                self.write_lanes(sums, splat(T, 0.0), T.floordiv(i, PANEL), T.floormod(i, PANEL) * LANES)

            def piece(first: Any, segments: int) -> None:
                with T.serial(segments) as segment:
                    self.decode_segment(decoded, block, start, first + segment, segment)
                k = first * spec.segment
                if full > 1:
                    with T.serial(full) as tile:
                        self.dense_tile(decoded, sums, tile * rows, rows, k, segments * spec.segment)
                else:
                    self.dense_tile(decoded, sums, 0, rows, k, segments * spec.segment)
                if rest:
                    self.dense_tile(decoded, sums, full * rows, rest, k, segments * spec.segment)

            if pieces:
                with T.serial(pieces) as number:
                    piece(number * together, together)
            if left:
                piece(pieces * together, left)
            with T.serial(spec.m) as row:
                self.store_row(sums, row, block, row, start, PANEL)

    def decode_segment(self, decoded: Any, block: Any, start: Any, segment: Any, at: Any) -> None:
        """A segment of the panel's columns as floats, at segment ``at`` of the buffer."""
        spec, T = self.spec, self.T
        words = spec.segment // spec.per_word
        for chunk in range(PANEL):
            column = (start + chunk) * LANES
            group = T.floordiv(block * COLUMNS + column, spec.n_stride)
            with T.serial(words) as i:
                word = self.read(self.w, block, segment * words + i, start + chunk, 0)
                for j in range(spec.per_word):
                    k = i * spec.per_word + j
                    value = self.decoded(word, j)
                    index: tuple[Any, ...] = (group, segment * spec.segment + k)
                    if self.inputs:
                        scale = splat(T, self.scales[index])
                        zero = None if self.zeros is None else splat(T, T.cast(self.zeros[index], "float32"))
                    else:
                        index = (block, T.floordiv(segment, spec.pieces), column)
                        scale = self.read(self.scales, *index)
                        zero = (
                            None
                            if self.zeros is None
                            else T.cast(self.read(self.zeros, *index), "float32x16")
                        )
                    value = (value if zero is None else value - zero) * scale
                    self.write_lanes(decoded, value, at * spec.segment + k, chunk * LANES)
        if not spec.outliers:
            return
        part = block * spec.segments + segment
        with T.serial(self.begins[part + 1] - self.begins[part]) as i:
            place = self.places[self.begins[part] + i]
            column = T.bitwise_and(place, T.int32(COLUMNS - 1)) - start * LANES
            with T.If(T.And(column >= 0, column < PANEL * LANES)), T.Then():
                k = T.shift_right(place, T.int32(7)) - segment * spec.segment + at * spec.segment
                value = decoded[k, column] + self.shares[self.begins[part] + i]
                T.buffer_store(decoded, value, [k, column])

    def dense_tile(self, decoded: Any, sums: Any, first: Any, rows: int, k: Any, length: int) -> None:
        """``rows`` rows of x times the decoded panel, added to ``sums``."""
        T = self.T
        total = accumulators(T, rows * PANEL)
        cells = [(row, part, (row * PANEL + part) * LANES) for row in range(rows) for part in range(PANEL)]
        for row, part, cell in cells:
            self.write_lanes(total, self.read(sums, first + row, part * LANES), cell)
        with T.serial(length) as i:
            panel = [self.read(decoded, i, part * LANES) for part in range(PANEL)]
            for row, part, cell in cells:
                x = splat(T, self.plain[first + row, k + i])
                self.write_lanes(total, self.read(total, cell) + x * panel[part], cell)
        for row, part, cell in cells:
            self.write_lanes(sums, self.read(total, cell), first + row, part * LANES)

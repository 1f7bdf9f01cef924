"""The TIR of :class:`~effic.backends.tvm.kernels.quantized.QuantizedMatMul`; layout and algebra are told there.

Activations are laid out first: padded as the weight is, for ``ic`` multiplied by the scales of a group of
columns, for ``int8`` rounded. Where a group of columns covers many blocks that is done once per group and
call, else by each block for its own groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import (
    LANES,
    MIN_PARALLEL_FLOPS,
    accumulators,
    function,
    lanes,
    loop,
    registers,
    splat,
    tiles,
)
from effic.backends.tvm.kernels.quantized import CHUNKS, COLUMNS, QuantizedMatMul

DIRECT_ROWS = 4
"""Up to so many rows fp32 arithmetic decodes words as it goes; beyond, a block is decoded once for all."""

DECODED_K = 256
"""Most k of 32 columns that are decoded at a time: 32 KiB; twice as many were 4 % slower."""

SHARED_GROUPS = 4
"""Up to so many groups of columns the activations of all of them are laid out before the blocks begin."""

PANEL = 2
"""Chunks of a decoded panel."""

DIGITS = 3
"""Bytes that an fp32 activation is cut into for integer arithmetic: 24 bits, as many as its fraction has."""

VPERMPS = "llvm.x86.avx512.permvar.sf.512"
_VCVTPS2DQ = "llvm.x86.avx512.mask.cvtps2dq.512"
_CURRENT_ROUNDING = 4
VPDPBUSD = "llvm.x86.avx512.vpdpbusd.512"


def quantized_function(spec: QuantizedMatMul, cpu: Cpu) -> Any:
    """The function of a spec that can be held."""
    result: list[Any] = []
    with function(spec.name, result) as T:
        QuantizedCode(spec, cpu, T).write()
    return result[0]


@dataclass(frozen=True)
class Laid:
    """Activations as the tiles read them: a row per group of columns and row of x.

    Attributes:
        values: fp32 ``[groups, rows, padded_k + a line]``, or int8 with a row per digit, the highest first.
        sums: what the zero points take off: fp32 per group along k, or int32 per digit and segment.
        scales: fp32 of the lowest digit per segment, integers only.
        first: the group that index 0 stands for.
        row: the row of x that index 0 stands for.
    """

    values: Any
    sums: Any
    scales: Any
    first: Any
    row: Any


class QuantizedCode:
    """Writes the function of one spec; other codes of weights change how a vector of them is read."""

    def __init__(self, spec: QuantizedMatMul, cpu: Cpu, T: Any) -> None:
        self.spec, self.T = spec, T
        self.avx512 = cpu.avx512 and not spec.portable
        self.vnni = cpu.vnni and not spec.portable
        self.registers = registers(cpu, spec.portable) - (0 if self.avx512 else 2)
        self.inputs = spec.grouping == "ic"
        self.integers = spec.activations == "int8" or self.vnni
        self.direct = self.integers or spec.m <= DIRECT_ROWS
        self.digits = 1 if spec.activations == "int8" else DIGITS
        flops = 2 * spec.m * spec.k * spec.n
        self.parallel = cpu.cores > 1 and flops >= MIN_PARALLEL_FLOPS

    # -- vectors ----------------------------------------------------------------------------------

    def read(self, buffer: Any, *index: Any) -> Any:
        """Sixteen neighbours."""
        return buffer[(*index[:-1], lanes(self.T, index[-1]))]

    def write_lanes(self, buffer: Any, value: Any, *index: Any) -> None:
        self.T.buffer_store(buffer, value, [*index[:-1], lanes(self.T, index[-1])])

    def integer(self, value: Any) -> Any:
        return self.T.broadcast(self.T.int32(value) if isinstance(value, int) else value, LANES)

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
            self.places = T.arg("places", T.Buffer((spec.outliers,), "int32"))
            self.shares = T.arg("shares", T.Buffer((spec.outliers,), "float32"))
        self.bias = T.arg("bias", T.Buffer((spec.blocks, COLUMNS), "float32")) if spec.bias else None
        self.y = T.arg("y", T.Buffer((spec.m, spec.n), "float32"))
        self.plain = self.plain_activations()
        if self.direct:
            self.write_direct()
        else:
            self.write_panels()

    # -- activations ------------------------------------------------------------------------------

    def plain_activations(self) -> Any:
        """x as it is where the weight is not padded along k, else a copy with zeros in the same places.

        A dense tile reads many rows at once, and takes a copy in any case.
        """
        spec, T = self.spec, self.T
        if spec.padded_k == spec.k and self.direct:
            return self.x
        # A line more per row: rows a power of two apart would fall into one set of the L1 cache. It is written
        # to (as in lay_out), because TVM cuts off what no statement touches.
        plain = T.alloc_buffer((spec.m, spec.padded_k + LANES), "float32")
        stride = spec.pieces * spec.segment
        full = spec.k // spec.k_group

        def copy(row: Any, group: Any, count: int) -> None:
            whole = count // LANES * LANES
            if whole:
                with T.serial(whole // LANES) as i:
                    value = self.read(self.x, row, group * spec.k_group + i * LANES)
                    self.write_lanes(plain, value, row, group * stride + i * LANES)
            if count > whole:
                with T.serial(count - whole) as i:
                    value = self.x[row, group * spec.k_group + whole + i]
                    T.buffer_store(plain, value, [row, group * stride + whole + i])
            if stride > count:
                with T.serial(stride - count) as i:
                    T.buffer_store(plain, T.float32(0), [row, group * stride + count + i])

        with T.serial(spec.m) as row:
            self.write_lanes(plain, splat(T, 0.0), row, spec.padded_k)
            with T.serial(full) as group:
                copy(row, group, spec.k_group)
            if spec.k % spec.k_group:
                copy(row, full, spec.k % spec.k_group)
        return plain

    def lay_out(self, groups: int, first: Any, row: Any, rows: int, parallel: bool) -> Laid:
        """Activations of ``groups`` groups of columns from ``first`` on and ``rows`` rows from ``row`` on."""
        spec, T = self.spec, self.T
        if self.integers:
            lines = rows * self.digits
            values = T.alloc_buffer((groups, lines, spec.padded_k + 64), "int8")
            sums = T.alloc_buffer((groups, lines, spec.segments), "int32")
            scales = T.alloc_buffer((groups, rows, spec.segments), "float32")
        else:
            values = T.alloc_buffer((groups, rows, spec.padded_k + LANES), "float32")
            sums = T.alloc_buffer((groups, rows, spec.k_groups), "float32")
            scales = None
        laid = Laid(values, sums, scales, first, row)
        with loop(T, groups * rows, parallel) as i:
            group, line = T.floordiv(i, rows), T.floormod(i, rows)
            if self.integers:
                for digit in range(self.digits):
                    at = [group, line * self.digits + digit, T.ramp(spec.padded_k, 1, 64)]
                    T.buffer_store(values, T.broadcast(T.int8(0), 64), at)
                with T.serial(spec.segments) as segment:
                    self.round_segment(laid, group, line, segment)
            else:
                self.write_lanes(values, splat(T, 0.0), group, line, spec.padded_k)
                with T.serial(spec.k_groups) as k_group:
                    self.scale_group(laid, group, line, k_group)
        return laid

    def activation(self, laid: Laid, group: Any, row: Any, k: Any) -> Any:
        value = self.read(self.plain, laid.row + row, k)
        if self.inputs:
            value = value * self.read(self.scales, laid.first + group, k)
        return value

    def scale_group(self, laid: Laid, group: Any, row: Any, k_group: Any) -> None:
        """fp32: activations of one group along k, and what its zero points take off."""
        spec, T = self.spec, self.T
        length = spec.pieces * spec.segment
        total = accumulators(T, 1)
        self.write_lanes(total, splat(T, 0.0), 0)
        with T.serial(length // LANES) as i:
            k = k_group * length + i * LANES
            value = self.activation(laid, group, row, k)
            self.write_lanes(laid.values, value, group, row, k)
            if self.zeros is not None:
                if self.inputs:
                    value = value * T.cast(self.read(self.zeros, laid.first + group, k), "float32x16")
                self.write_lanes(total, self.read(total, 0) + value, 0)
        T.buffer_store(laid.sums, self.reduced(self.read(total, 0), "add"), [group, row, k_group])

    def round_segment(self, laid: Laid, group: Any, row: Any, segment: Any) -> None:
        """Integers: activations of a segment, their scale, and the sums that the codes' zero takes off."""
        spec, T = self.spec, self.T
        count = spec.segment // LANES
        kept = T.alloc_buffer((spec.segment,), "float32", scope="local")
        # Sizes compare as their bits do; several maxima, for one would wait for itself at every step.
        largest = T.alloc_buffer((min(4, count) * LANES,), "int32", scope="local")
        for i in range(count):
            value = self.activation(laid, group, row, segment * spec.segment + i * LANES)
            self.write_lanes(kept, value, i * LANES)
            size = T.reinterpret("int32x16", self.read(kept, i * LANES))
            size = T.bitwise_and(size, self.integer(0x7FFFFFFF))
            if i >= 4:
                size = T.max(self.read(largest, i % 4 * LANES), size)
            self.write_lanes(largest, size, i % 4 * LANES)
        size = self.read(largest, 0)
        for i in range(1, min(4, count)):
            size = T.max(size, self.read(largest, i * LANES))
        peak = T.alloc_buffer((2,), "float32", scope="local")
        T.buffer_store(peak, T.reinterpret("float32", self.reduced(size, "smax", "int32")), [0])
        # The highest digit is at most 127, and leaves no carry for those below it.
        steps = T.float32(127 << 8 * (self.digits - 1))
        T.buffer_store(laid.scales, peak[0] / steps, [group, row, segment])
        # Below, the quotient would be no number; such activations count as zero.
        least = T.float32(1e-36 if self.digits == 1 else 1e-31)
        quotient = T.Select(peak[0] < least, T.float32(0), steps / T.max(peak[0], least))
        T.buffer_store(peak, quotient, [1])
        total = T.alloc_buffer((self.digits * LANES,), "int32", scope="local")
        for digit in range(self.digits):
            self.write_lanes(total, self.integer(0), digit * LANES)
        for i in range(count):
            k = segment * spec.segment + i * LANES
            scaled = self.read(kept, i * LANES) * T.broadcast(peak[1], LANES)
            number = self.rounded(scaled)
            zero = None
            if self.inputs and self.zeros is not None:
                zero = T.cast(self.read(self.zeros, laid.first + group, k), "int32x16")
                zero = zero + self.integer(spec.middle)
            for digit, code in enumerate(self.digits_of(number)):
                self.write_lanes(laid.values, T.cast(code, "int8x16"), group, row * self.digits + digit, k)
                code = code if zero is None else code * zero
                self.write_lanes(total, self.read(total, digit * LANES) + code, digit * LANES)
        for digit in range(self.digits):
            whole = self.reduced(self.read(total, digit * LANES), "add", "int32")
            T.buffer_store(laid.sums, whole, [group, row * self.digits + digit, segment])

    def digits_of(self, number: Any) -> list[Any]:
        """Signed bytes that 16 integers consist of, as integers, the highest first."""
        T = self.T
        if self.digits == 1:
            return [number]
        # Half its range on top of each digit and turned back after: a negative digit borrows from the next.
        half = self.integer(0x00808080)
        turned = T.bitwise_xor(number + half, half)
        return [
            T.shift_right(T.shift_left(turned, self.integer(24 - 8 * digit)), self.integer(24))
            for digit in reversed(range(self.digits))
        ]

    def rounded(self, value: Any) -> Any:
        """The nearest integers, of two the even one."""
        T = self.T
        if self.avx512:
            mask, mode = T.Cast("int16", T.int32(-1)), T.int32(_CURRENT_ROUNDING)
            return T.call_llvm_pure_intrin(_VCVTPS2DQ, value, self.integer(0), mask, mode, dtype="int32x16")
        return T.cast(T.nearbyint(value), "int32x16")

    def reduced(self, vector: Any, how: str, dtype: str = "float32") -> Any:
        """One number of 16 lanes."""
        T = self.T
        kind = "v16f32" if dtype == "float32" else "v16i32"
        if how == "add" and dtype == "float32":
            return T.call_llvm_pure_intrin(
                "llvm.vector.reduce.fadd.v16f32", T.float32(0), vector, dtype=dtype
            )
        return T.call_llvm_pure_intrin(f"llvm.vector.reduce.{how}.{kind}", vector, dtype=dtype)

    # -- words as they come -----------------------------------------------------------------------

    def write_direct(self) -> None:
        spec, T = self.spec, self.T
        most = max(1, self.registers - 4)
        lines = self.digits if self.integers else 1
        rows, full, rest = tiles(spec.m, max(1, min(12, most) // lines))
        chunks = CHUNKS
        while chunks > 1 and rows * lines * chunks > most:
            chunks //= 2
        laid = None
        if not self.inputs or spec.n_groups <= SHARED_GROUPS:
            groups = spec.n_groups if self.inputs else 1
            laid = self.lay_out(groups, 0, 0, spec.m, self.parallel and spec.m >= LANES)
        with loop(T, spec.blocks, self.parallel) as block:
            sums = T.alloc_buffer((rows, COLUMNS), "float32")

            def tile(first: Any, count: int) -> None:
                here = laid
                if here is None:
                    group = T.floordiv(block * COLUMNS, spec.n_stride)
                    here = self.lay_out(max(1, COLUMNS // spec.n_stride), group, first, count, False)
                self.direct_tile(here, sums, block, first, count, chunks)

            if full > 1:
                with T.serial(full) as number:
                    tile(number * rows, rows)
            else:
                tile(0, rows)
            if rest:
                tile(full * rows, rest)

    def direct_tile(self, laid: Laid, sums: Any, block: Any, first: Any, rows: int, chunks: int) -> None:
        spec, T = self.spec, self.T
        with T.serial(rows * CHUNKS) as i:
            self.write_lanes(sums, splat(T, 0.0), T.floordiv(i, CHUNKS), T.floormod(i, CHUNKS) * LANES)
        # Chunks within pieces of k: the words are taken in nearly the order they lie in.
        with T.serial(spec.segments if self.integers else spec.k_groups) as piece:
            if chunks < CHUNKS:
                with T.serial(CHUNKS // chunks) as part:
                    self.direct_chunks(laid, sums, block, first, rows, piece, part * chunks, chunks)
            else:
                self.direct_chunks(laid, sums, block, first, rows, piece, 0, chunks)
        if self.spec.outliers:
            self.add_outliers(sums, block, first, rows)
        for row in range(rows):
            self.store_row(sums, row, block, first + row, 0, CHUNKS)

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
        total = T.alloc_buffer((lines * chunks * LANES,), dtype, scope="local")
        cells = [
            (line, chunk, (line * chunks + chunk) * LANES) for line in range(lines) for chunk in range(chunks)
        ]
        groups = [self.group_of(laid, block, start + chunk) for chunk in range(chunks)]
        line0 = (first - laid.row) * digits
        for line, chunk, cell in cells:
            value = splat(T, 0.0)
            if self.integers:
                begin = laid.sums[groups[chunk], line0 + line, part]
                if self.zeros is None or not self.inputs:
                    begin = begin * T.int32(spec.middle)
                value = self.integer(T.int32(0) - begin)
            self.write_lanes(total, value, cell)
        with T.serial(words) as i:
            index = part * words + i
            taken = [self.read(self.w, block, index, start + chunk, 0) for chunk in range(chunks)]
            # Chunks innermost: an activation is used up at once, and needs no register for long.
            for k in range(0, spec.per_word, 4 if self.integers else 1):
                for line, chunk, cell in cells:
                    here, at = (groups[chunk], line0 + line), index * spec.per_word + k
                    value = self.read(total, cell)
                    if self.integers:
                        four = laid.values[(*here, T.ramp(at, 1, 4))]
                        value = self.dotted(value, taken[chunk], k // 4, four)
                    else:
                        value = value + splat(T, laid.values[(*here, at)]) * self.decoded(taken[chunk], k)
                    self.write_lanes(total, value, cell)
        for line, chunk, cell in cells:
            if line % digits:
                continue
            column = (start + chunk) * LANES
            value = self.read(total, cell)
            if self.integers:
                value = self.joined([self.read(total, cell + d * chunks * LANES) for d in range(digits)])
            row = line // digits
            value = self.finished(laid, value, groups[chunk], block, first + row, part, column)
            self.write_lanes(sums, self.read(sums, row, column) + value, row, column)

    def joined(self, digits: list[Any]) -> Any:
        """Sums of each digit, all below 2^24, as one float."""
        value = self.T.cast(digits[0], "float32x16")
        for digit in digits[1:]:
            value = value * splat(self.T, 256.0) + self.T.cast(digit, "float32x16")
        return value

    def finished(
        self, laid: Laid, total: Any, group: Any, block: Any, row: Any, part: Any, column: Any
    ) -> Any:
        """What the sum over a segment (integers) or group (fp32) adds to y."""
        spec, T = self.spec, self.T
        k_group = T.floordiv(part, spec.pieces) if self.integers else part
        if self.zeros is not None and not (self.inputs and self.integers):
            off = self.taken_off(laid, group, row - laid.row, part)
            if not self.inputs:
                off = off * T.cast(self.read(self.zeros, block, k_group, column), "float32x16")
            total = total - off
        if self.integers:
            total = total * splat(T, laid.scales[group, row - laid.row, part])
        if not self.inputs:
            total = total * self.read(self.scales, block, k_group, column)
        return total

    def taken_off(self, laid: Laid, group: Any, row: Any, part: Any) -> Any:
        """The sum of activations that a zero point takes off."""
        if not self.integers:
            return splat(self.T, laid.sums[group, row, part])
        return self.joined(
            [self.integer(laid.sums[group, row * self.digits + digit, part]) for digit in range(self.digits)]
        )

    def add_outliers(self, sums: Any, block: Any, first: Any, rows: int) -> None:
        """The shares of a block's outliers."""
        spec, T = self.spec, self.T
        begin, end = self.begins[block * spec.segments], self.begins[(block + 1) * spec.segments]
        with T.serial(end - begin) as i:
            place = self.places[begin + i]
            k, column = T.shift_right(place, T.int32(7)), T.bitwise_and(place, T.int32(COLUMNS - 1))
            share = self.shares[begin + i]
            for row in range(rows):
                value = sums[row, column] + share * self.plain[first + row, k]
                T.buffer_store(sums, value, [row, column])

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

"""The TIR of :class:`~effic.backends.tvm.kernels.sparse.SparseMatMul`; layout and algebra are told there.

What differs from the quantized products is how activations meet a vector of codes: gathered by its places.
Without gathering instructions more than a few rows run over a decoded panel, as the quantized ones do.
"""

from __future__ import annotations

from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.dense import prefetch
from effic.backends.tvm.kernels.lanes import LANES, function, splat
from effic.backends.tvm.kernels.quantized import CHUNKS, COLUMNS
from effic.backends.tvm.kernels.quantized_activations import DIRECT_ROWS, VPDPBUSD, Laid
from effic.backends.tvm.kernels.quantized_code import PANEL, VPERMPS, QuantizedCode
from effic.backends.tvm.kernels.sparse import FLOAT, WINDOW, SparseMatMul

GATHERED_ROWS = 32
"""Up to so many rows activations are gathered where more than 3 of 8 weights are kept: a permute takes as long
as two multiply-adds, so that for more rows a decoded panel is the faster one."""

_AHEAD = 16
"""Lines of a chunk's values that are fetched ahead: 8 KiB of a block, what arrives while memory answers."""

_VPSHUFB = "llvm.x86.avx512.pshuf.b.512"


def sparse_function(spec: SparseMatMul, cpu: Cpu) -> Any:
    """The function of a spec that can be held."""
    result: list[Any] = []
    with function(spec.name, result) as T:
        _SparseCode(spec, cpu, T).write()
    return result[0]


class _SparseCode(QuantizedCode):
    spec: SparseMatMul

    def __init__(self, spec: SparseMatMul, cpu: Cpu, T: Any) -> None:
        super().__init__(spec, cpu, T)
        self.integers = spec.rounds or (spec.whole and self.vnni)
        self.unsigned = self.vnni  # they are the left side of vpdpbusd; :attr:`begun` takes the 128 off again
        most = DIRECT_ROWS
        if self.avx512:
            most = GATHERED_ROWS if spec.kept * 8 > spec.of * 3 else spec.m
        self.direct = self.integers or spec.m <= most

    # -- the function -----------------------------------------------------------------------------

    def write(self) -> None:
        spec, T = self.spec, self.T
        floats = spec.bits == FLOAT
        self.x = T.arg("x", T.Buffer((spec.m, spec.k), "float32"))
        words = spec.slots // spec.per_word
        kind = "float32" if floats else "int32"
        self.w = T.arg("w", T.Buffer((spec.blocks, words, CHUNKS, LANES), kind))
        words = spec.slots // spec.per_place_word
        self.places = T.arg("places", T.Buffer((spec.blocks, words, CHUNKS, LANES), "int32"))
        groups = (spec.n_groups, spec.padded_k) if self.inputs else (spec.blocks, spec.k_groups, COLUMNS)
        if not floats:
            self.scales = T.arg("scales", T.Buffer(groups, "float32"))
        if spec.whole:
            self.begun = T.arg("begun", T.Buffer((spec.blocks, spec.segments, COLUMNS), "int32"))
        self.zeros = None
        self.bias = T.arg("bias", T.Buffer((spec.blocks, COLUMNS), "float32")) if spec.bias else None
        self.y = T.arg("y", T.Buffer((spec.m, spec.n), "float32"))
        self.plain = self.plain_activations()
        if self.direct:
            self.write_direct()
        else:
            self.write_panels()

    # -- slots ------------------------------------------------------------------------------------

    def value(self, block: Any, number: Any, slot: int, chunk: Any) -> Any:
        """The values of a slot of period ``number``, as floats."""
        spec, T = self.spec, self.T
        index = number * (spec.period_slots // spec.per_word) + slot // spec.per_word
        word = self.read(self.w, block, index, chunk, 0)
        if spec.bits == FLOAT:
            return word
        if spec.bits == 4:
            return self.decoded(word, slot % 8)
        if slot % 4 < 3:
            word = T.shift_left(word, self.integer(24 - 8 * (slot % 4)))
        return T.cast(T.shift_right(word, self.integer(24)), "float32x16")

    def place_word(self, block: Any, number: Any, slot: int, chunk: Any) -> Any:
        spec = self.spec
        index = number * (spec.period_slots // spec.per_place_word) + slot // spec.per_place_word
        return self.read(self.places, block, index, chunk, 0)

    def place(self, block: Any, number: Any, slot: int, chunk: Any) -> Any:
        """The places of a slot in their group or window; what lies above their bits is not cleared."""
        spec = self.spec
        within = slot % spec.per_place_word
        shift = 8 * (within % 4) + spec.place_bits * (within // 4)
        word = self.place_word(block, number, slot, chunk)
        return self.T.shift_right(word, self.integer(shift)) if shift else word

    def cleared(self, place: Any) -> Any:
        return self.T.bitwise_and(place, self.integer((1 << self.spec.place_bits) - 1))

    def base(self, slot: int) -> int:
        """k, within a period, of the group or window that the place of a slot is counted from."""
        spec = self.spec
        together = 1 if spec.place_bits == 2 else spec.window_groups
        return slot // spec.kept // together * together * spec.of

    def gathered(self, laid: Laid, group: Any, row: Any, k: Any, place: Any) -> Any:
        """Activations at places counted from k."""
        spec, T = self.spec, self.T
        if not self.avx512:
            return self.gathered_singly(laid, group, row, k, place)
        if spec.place_bits == 2:
            four = laid.values[group, row, T.ramp(k, 1, 4)]
            table = self.repeated(four, 4)
        else:
            table = self.read(laid.values, group, row, k)
        return T.call_llvm_pure_intrin(VPERMPS, table, place, dtype="float32x16")

    def gathered_singly(self, laid: Laid, group: Any, row: Any, k: Any, place: Any) -> Any:
        T = self.T
        self.write_lanes(self.indices, self.cleared(place), 0)
        with T.serial(LANES) as lane:
            T.buffer_store(self.found, laid.values[group, row, k + self.indices[lane]], [lane])
        return self.read(self.found, 0)

    def repeated(self, vector: Any, width: int) -> Any:
        """A short vector four times over."""
        from tvm.tirx import Shuffle, const

        return Shuffle([vector] * 4, [const(i, "int32") for i in range(4 * width)])

    # -- the tile ---------------------------------------------------------------------------------

    def pieces(self, chunks: int) -> int:
        # Segments: the chunks take turns in what the first cache holds.
        return self.spec.segments * self.cuts(chunks)

    def cuts(self, chunks: int) -> int:
        """Into how many parts a segment is cut: a period each, in fp32, where chunks take turns.

        Longer ones are read 128 bytes here and there, and were 5 % slower.
        """
        return 1 if self.integers or chunks == CHUNKS else self.spec.segment // self.spec.period

    def direct_chunks(
        self, laid: Laid, sums: Any, block: Any, first: Any, rows: int, part: Any, start: Any, chunks: int
    ) -> None:
        spec, T = self.spec, self.T
        cuts = self.cuts(chunks)
        periods = spec.segment // spec.period // cuts
        dtype = "int32" if self.integers else "float32"
        digits = self.digits if self.integers else 1
        lines = range(rows * digits)
        if self.integers or self.parallel:
            totals = [[(T.alloc_buffer((LANES,), dtype), 0) for _ in range(chunks)] for _ in lines]
        else:
            # LLVM holds more of these sums in registers where they are one buffer, on the heap.
            whole = T.alloc_buffer((len(lines) * chunks * LANES,), dtype, scope="local")
            totals = [[(whole, (line * chunks + chunk) * LANES) for chunk in range(chunks)] for line in lines]
        cells = [(line, chunk) for line in lines for chunk in range(chunks)]
        groups = [self.group_of(laid, block, start + chunk) for chunk in range(chunks)]
        if not self.avx512 or (self.integers and not self.vnni):
            self.indices = T.alloc_buffer((LANES,), "int32", scope="local")
            self.found = T.alloc_buffer((LANES,), "int8" if self.integers else "float32", scope="local")
        for line, chunk in cells:
            total, cell = totals[line][chunk]
            value = splat(T, 0.0)
            if self.integers:
                value = self.read(self.begun, block, part, (start + chunk) * LANES)
                value = value if self.vnni else self.integer(0)
            self.write_lanes(total, value, cell)
        # As with quantized weights, what there is more of comes innermost: a vector of activations, or of places
        # and values, is used up at once.
        if rows * digits <= chunks:
            cells.sort(key=lambda cell: (cell[1], cell[0]))
        step = self.four_slots if self.integers else self.one_slot
        with T.serial(periods) as i:
            number = part * periods + i
            if chunks < CHUNKS:
                self.fetch_ahead(block, number, start, chunks, periods)
            for slot in range(0, spec.period_slots, 4 if self.integers else 1):
                for line, chunk in cells:
                    here = groups[chunk], (laid.begin + first) * digits + line
                    step(laid, *totals[line][chunk], here, block, number, slot, start + chunk)
        for line, chunk in cells:
            if line % digits:
                continue
            column, row = (start + chunk) * LANES, line // digits
            values = [self.read(*totals[line + digit][chunk]) for digit in range(digits)]
            value = self.joined(values) if self.integers else values[0]
            segment = T.floordiv(part, cuts)
            value = self.finished(laid, value, groups[chunk], block, first + row, segment, column)
            self.write_lanes(sums, self.read(sums, first + row, column) + value, first + row, column)

    def fetch_ahead(self, block: Any, number: Any, start: Any, chunks: int, periods: int) -> None:
        """Ask for the values and places that the chunks of a later piece are read from.

        Chunks that take turns read 128 bytes here and there: out of cache 16 rows of 2:4 took 1.33 (fp32) and 1.13
        (codes) times as long without. All eight read everything in order, which the CPU fetches by itself.
        """
        spec = self.spec
        lines = spec.period_slots // spec.per_word, spec.period_slots // spec.per_place_word
        ahead = max(periods, -(-_AHEAD // lines[0]))
        for buffer, count in zip((self.w, self.places), lines, strict=True):
            for line in range(count):
                for chunk in range(chunks):
                    prefetch(self.T, buffer[block, (number + ahead) * count + line, start + chunk, 0])

    def one_slot(
        self,
        laid: Laid,
        total: Any,
        cell: int,
        here: tuple[Any, Any],
        block: Any,
        number: Any,
        slot: int,
        chunk: Any,
    ) -> None:
        """fp32: a slot of 16 columns times the activations of a row."""
        k = number * self.spec.period + self.base(slot)
        value = self.value(block, number, slot, chunk)
        product = self.gathered(laid, *here, k, self.place(block, number, slot, chunk)) * value
        self.write_lanes(total, self.read(total, cell) + product, cell)

    def four_slots(
        self,
        laid: Laid,
        total: Any,
        cell: int,
        here: tuple[Any, Any],
        block: Any,
        number: Any,
        slot: int,
        chunk: Any,
    ) -> None:
        """Integers: four slots of 16 columns times a digit of the activations of a row."""
        spec, T = self.spec, self.T
        k = number * spec.period
        if not self.vnni:
            for one in range(slot, slot + 4):
                place = self.place(block, number, one, chunk)
                value = T.cast(self.value(block, number, one, chunk), "int32x16")
                x = T.cast(self.gathered_singly(laid, *here, k + self.base(one), place), "int32x16")
                self.write_lanes(total, self.read(total, cell) + x * value, cell)
            return
        field = slot % spec.per_place_word // 4
        word = self.place_word(block, number, slot, chunk)
        word = T.shift_right(word, self.integer(spec.place_bits * field)) if field else word
        word = T.bitwise_and(word, self.integer(((1 << spec.place_bits) - 1) * 0x01010101))
        offset = sum((self.base(slot + i) - self.base(slot)) << 8 * i for i in range(4))
        if offset:
            word = (
                T.bitwise_or(word, self.integer(offset))
                if self.disjoint(slot)
                else word + self.integer(offset)
            )
        place = T.reinterpret("int8x64", word)
        table = self.repeated(laid.values[(*here, T.ramp(k + self.base(slot), 1, WINDOW))], WINDOW)
        x = T.call_llvm_pure_intrin(_VPSHUFB, table, place, dtype="int8x64")
        value = self.value_bytes(block, number, slot, chunk)
        dot = T.call_llvm_pure_intrin(VPDPBUSD, self.read(total, cell), x, value, dtype="int32x16")
        self.write_lanes(total, dot, cell)

    def disjoint(self, slot: int) -> bool:
        """Whether offsets of groups share no bit with places in them."""
        return all((self.base(slot + i) - self.base(slot)) % 4 == 0 for i in range(4))

    def value_bytes(self, block: Any, number: Any, slot: int, chunk: Any) -> Any:
        """Four slots' values of 16 columns as signed bytes."""
        spec, T = self.spec, self.T
        index = number * (spec.period_slots // spec.per_word) + slot // spec.per_word
        word = self.read(self.w, block, index, chunk, 0)
        if spec.bits == 8:
            return T.reinterpret("int8x64", word)
        if slot % 8 >= 4:
            word = T.shift_right(word, self.integer(4))
        word = T.bitwise_and(word, self.integer(0x0F0F0F0F))
        return T.reinterpret("int8x64", word) - T.broadcast(T.int8(spec.middle), 64)

    def finished(
        self, laid: Laid, total: Any, group: Any, block: Any, row: Any, part: Any, column: Any
    ) -> Any:
        """What the sum over a segment adds to y."""
        spec = self.spec
        if self.integers:
            return super().finished(laid, total, group, block, row, part, column)
        if self.inputs or spec.bits == FLOAT:
            return total
        return total * self.read(self.scales, block, self.T.floordiv(part, spec.pieces), column)

    # -- decoded panels ---------------------------------------------------------------------------

    def decode_segment(self, decoded: Any, block: Any, start: Any, segment: Any, at: Any) -> None:
        spec, T = self.spec, self.T
        periods = spec.segment // spec.period
        for chunk in range(PANEL):
            column = (start + chunk) * LANES
            group = T.floordiv(block * COLUMNS + column, spec.n_stride)
            with T.serial(periods) as i:
                for k in range(spec.period):
                    first = k // spec.of * spec.kept
                    value = splat(T, 0.0)
                    for slot in range(first, first + spec.kept):
                        place = self.cleared(self.place(block, segment * periods + i, slot, start + chunk))
                        here = T.cast(place == self.integer(k - self.base(slot)), "float32x16")
                        value = value + here * self.value(block, segment * periods + i, slot, start + chunk)
                    line = i * spec.period + k
                    if self.inputs:
                        value = value * splat(T, self.scales[group, segment * spec.segment + line])
                    elif spec.bits != FLOAT:
                        k_group = T.floordiv(segment, spec.pieces)
                        value = value * self.read(self.scales, block, k_group, column)
                    self.write_lanes(decoded, value, at * spec.segment + line, chunk * LANES)

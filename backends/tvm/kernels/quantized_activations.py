"""How activations are laid out for :class:`~effic.backends.tvm.kernels.quantized.QuantizedMatMul`'s tiles.

They are padded as the weight is, for ``ic`` multiplied by the scales of a group of columns, and for integer
arithmetic rounded: to a byte (``int8``), or to three of them (``fp32``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.dense import transpose
from effic.backends.tvm.kernels.lanes import (
    LANES,
    MIN_PARALLEL_FLOPS,
    accumulators,
    lanes,
    loop,
    registers,
    splat,
)
from effic.backends.tvm.kernels.quantized import QuantizedMatMul

DIRECT_ROWS = 4
"""Up to so many rows fp32 arithmetic decodes words as it goes; beyond, a block is decoded once for all."""

DIGITS = 3
"""Bytes that an fp32 activation is cut into for integer arithmetic: 24 bits, as many as its fraction has."""

_VCVTPS2DQ = "llvm.x86.avx512.mask.cvtps2dq.512"
_CURRENT_ROUNDING = 4
_VPACKSSDW = "llvm.x86.avx512.packssdw.512"
_VPACKSSWB = "llvm.x86.avx512.packsswb.512"
VPDPBUSD = "llvm.x86.avx512.vpdpbusd.512"


@dataclass(frozen=True)
class Laid:
    """Activations as the tiles read them: a row per group of columns and row of x.

    Attributes:
        values: fp32 ``[groups, rows, padded_k + a line]``, or int8 with a row per digit, the highest first.
        sums: what the zero points take off: fp32 per group along k, or int32 per digit and segment.
        scales: fp32 of the lowest digit per segment, integers only.
        first: the group that index 0 stands for.
        row: the row of x that index 0 stands for.
        begin: the row that a tile begins at, counted from :attr:`row`.
    """

    values: Any
    sums: Any
    scales: Any
    first: Any
    row: Any
    begin: Any = 0


class Activations:
    """What a function knows of its spec and CPU, and the statements that lay out its activations."""

    x: Any
    plain: Any
    scales: Any
    zeros: Any

    def __init__(self, spec: QuantizedMatMul, cpu: Cpu, T: Any) -> None:
        self.spec, self.T = spec, T
        self.avx512 = cpu.avx512 and not spec.portable
        self.vnni = cpu.vnni and not spec.portable
        self.registers = registers(cpu, spec.portable) - (0 if self.avx512 else 2)
        self.inputs = spec.grouping == "ic"
        self.integers = spec.activations == "int8" or self.vnni
        self.direct = self.integers or spec.m <= DIRECT_ROWS
        self.digits = 1 if spec.activations == "int8" else DIGITS
        # Whether 128 is added to the bytes; their sums then have no use.
        self.unsigned = False
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

    # -- laying out ------------------------------------------------------------------------------

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
                self.round_line(laid, group, line)
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

    def round_line(self, laid: Laid, group: Any, row: Any) -> None:
        """Integers: activations of a row, their scales, and the sums that the codes' zero takes off.

        The largest of all segments come first: rounding waits for a maximum and a division, and would wait at each.
        """
        spec, T = self.spec, self.T
        steps = T.alloc_buffer((spec.segments,), "float32")
        kept = T.alloc_buffer((spec.padded_k,), "float32") if self.inputs else None
        with T.serial(spec.segments) as segment:
            self.measure_segment(laid, group, row, segment, steps, kept)
        with T.serial(spec.segments) as segment:
            self.round_segment(laid, group, row, segment, steps, kept)

    def measure_segment(self, laid: Laid, group: Any, row: Any, segment: Any, steps: Any, kept: Any) -> None:
        """The scale of a segment's activations, and how many of its steps one is."""
        spec, T = self.spec, self.T
        count = spec.segment // LANES
        # Sizes compare as their bits do; several maxima, for one would wait for itself at every step.
        largest = [T.alloc_buffer((LANES,), "int32") for _ in range(min(4, count))]
        for i in range(count):
            k = segment * spec.segment + i * LANES
            value = self.activation(laid, group, row, k)
            if kept is not None:
                self.write_lanes(kept, value, k)
                value = self.read(kept, k)
            size = T.bitwise_and(T.reinterpret("int32x16", value), self.integer(0x7FFFFFFF))
            place = largest[i % 4]
            self.write_lanes(place, size if i < 4 else T.max(self.read(place, 0), size), 0)
        size = self.read(largest[0], 0)
        for other in largest[1:]:
            size = T.max(size, self.read(other, 0))
        peak = T.alloc_buffer((1,), "float32")
        T.buffer_store(peak, T.reinterpret("float32", self.reduced(size, "smax", "int32")), [0])
        # The highest digit is at most 127, and leaves no carry for those below it.
        most = T.float32(127 << 8 * (self.digits - 1))
        T.buffer_store(laid.scales, peak[0] / most, [group, row, segment])
        # Below, the quotient would be no number; such activations count as zero.
        least = T.float32(1e-36 if self.digits == 1 else 1e-31)
        quotient = T.Select(peak[0] < least, T.float32(0), most / T.max(peak[0], least))
        T.buffer_store(steps, quotient, [segment])

    def round_segment(self, laid: Laid, group: Any, row: Any, segment: Any, steps: Any, kept: Any) -> None:
        """A segment's activations in bytes, and their sums."""
        spec, T = self.spec, self.T
        begin, count = segment * spec.segment, spec.segment // LANES
        totals = [T.alloc_buffer((LANES,), "int32") for _ in range(self.digits)]
        for total in totals:
            self.write_lanes(total, self.integer(0), 0)

        def number(i: int) -> Any:
            k = begin + i * LANES
            value = self.activation(laid, group, row, k) if kept is None else self.read(kept, k)
            return self.rounded(value * splat(T, steps[segment]))

        wide = count // 4 * 4 if self.vnni else 0
        for i in range(0, wide, 4):
            digits = [self.digits_of(number(i + j)) for j in range(4)]
            for digit, total in enumerate(totals):
                place = [group, row * self.digits + digit, T.ramp(begin + i * LANES, 1, 4 * LANES)]
                codes = self.joined_bytes([one[digit] for one in digits])
                T.buffer_store(laid.values, self.stored(codes, 4 * LANES), place)
                codes = laid.values[tuple(place)]
                value = self.with_zeros(self.read(total, 0), laid.first + group, place[2], codes)
                self.write_lanes(total, value, 0)
        for i in range(wide, count):
            k = begin + i * LANES
            zero = None
            if self.inputs and self.zeros is not None:
                zero = T.cast(self.read(self.zeros, laid.first + group, k), "int32x16")
                zero = zero + self.integer(spec.middle)
            for digit, code in enumerate(self.digits_of(number(i))):
                stored = self.stored(T.cast(code, "int8x16"), LANES)
                self.write_lanes(laid.values, stored, group, row * self.digits + digit, k)
                code = code if zero is None else code * zero
                self.write_lanes(totals[digit], self.read(totals[digit], 0) + code, 0)
        for digit, total in enumerate(totals):
            whole = self.reduced(self.read(total, 0), "add", "int32")
            T.buffer_store(laid.sums, whole, [group, row * self.digits + digit, segment])

    def stored(self, codes: Any, count: int) -> Any:
        """Bytes as they are laid out."""
        return (
            self.T.bitwise_xor(codes, self.T.broadcast(self.T.int8(-128), count)) if self.unsigned else codes
        )

    def with_zeros(self, total: Any, group: Any, ks: Any, codes: Any) -> Any:
        """``total`` and what the zero points of 64 k take off, sums of four in a lane."""
        T = self.T

        def dot(total: Any, left: Any) -> Any:
            return T.call_llvm_pure_intrin(VPDPBUSD, total, left, codes, dtype="int32x16")

        def all_of(value: int) -> Any:
            return T.broadcast(T.int8(value), 4 * LANES)

        if not self.inputs or self.zeros is None:
            return dot(total, all_of(1))
        # The left side is unsigned: 128 more than the zero point, where the middle more is meant.
        more = dot(self.integer(0), all_of(128 - self.spec.middle))
        return dot(total, T.bitwise_xor(self.zeros[group, ks], all_of(-128))) - more

    def joined_bytes(self, vectors: list[Any]) -> Any:
        """Four vectors of 16 integers, of a byte each, as one of bytes."""
        from tvm.tirx import Shuffle, const

        T = self.T
        words = [T.call_llvm_pure_intrin(_VPACKSSDW, *vectors[i : i + 2], dtype="int16x32") for i in (0, 2)]
        packed = T.reinterpret("int32x16", T.call_llvm_pure_intrin(_VPACKSSWB, *words, dtype="int8x64"))
        # Each quarter of the result holds the same quarter of each vector.
        order = [const(4 * (i % 4) + i // 4, "int32") for i in range(LANES)]
        return T.reinterpret("int8x64", Shuffle([packed], order))

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

    def turned_activations(self, rows: int) -> Any:
        """x with the rows of a tile side by side: ``[tiles, padded_k, 16]``, past the last row any other."""
        spec, T = self.spec, self.T
        count = -(-spec.m // rows)
        turned = T.alloc_buffer((count, spec.padded_k, LANES), "float32")
        with loop(T, count * (spec.padded_k // LANES), self.parallel) as i:
            tile, k = T.floordiv(i, spec.padded_k // LANES), T.floormod(i, spec.padded_k // LANES) * LANES
            lines = [T.min(tile * rows + row, spec.m - 1) for row in range(LANES)]
            for j, column in enumerate(transpose(T, [self.read(self.plain, line, k) for line in lines])):
                self.write_lanes(turned, column, tile, k + j, 0)
        return turned

    # -- reading them ------------------------------------------------------------------------------

    def joined(self, digits: list[Any]) -> Any:
        """Sums of each digit, all below 2^24, as one float."""
        value = self.T.cast(digits[0], "float32x16")
        for digit in digits[1:]:
            value = value * splat(self.T, 256.0) + self.T.cast(digit, "float32x16")
        return value

    def taken_off(self, laid: Laid, group: Any, row: Any, part: Any) -> Any:
        """The sum of activations that a zero point takes off."""
        if not self.integers:
            return splat(self.T, laid.sums[group, row, part])
        return self.joined(
            [self.integer(laid.sums[group, row * self.digits + digit, part]) for digit in range(self.digits)]
        )

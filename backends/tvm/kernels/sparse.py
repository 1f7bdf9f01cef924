"""Products with N:M sparse weights: ``y[M, N] = x[M, K] @ W[K, N] (+ bias)``, only what is kept is read.

At most ``kept`` of every ``of`` neighbours along K are not zero. Values are fp32, or codes of 8 or 4 bits
with the scales of :mod:`effic.backends.tvm.kernels.quantized`, whose blocks, segments, rounding of
activations and tiles these products share.

Layout. The weights that are kept of a column are numbered in order, ``kept`` per group: slots, zero where a
group has fewer. Blocks of 128 columns; a word of 32 bits holds neighbouring slots of one column, slot ``s``
in byte ``s % 4``::

    values: fp32 [N/128, slots, 8, 16], or int32 words of 4 (signed bytes) or 8 slots (4 bits, 8 added)
    places: int32 words [N/128, slots / P, 8, 16]

``places`` says where in its group a slot is, in 2 bits (groups of at most 4; P = 16), or where in a window
of as many groups as 16 weights hold, in 4 bits (P = 8).

Algebra. fp32: one ``vpermps(x of a group or window, places >> shift)`` gathers the activations of 16
columns; with 2 bits the group's four activations repeat through the table, so that what lies above
the two bits does not matter. Codes: activations are integers, of 8 bits or for fp32 of 24, three bytes
("digits") as for the quantized products. One ``vpshufb`` gathers 64 bytes (4 slots of 16 columns) of a digit
from 16 neighbouring activations, one ``vpdpbusd`` adds their products. It takes unsigned times signed, so
128 is added to the digits and ``128 · sum(w)`` of a segment, known when packed, taken off. Patterns whose
four slots lie in two windows, and CPUs without VNNI, take fp32 arithmetic unless activations have 8 bits.

Roofline, per 16 columns and slot, besides the decoding once for all rows of a tile: each row a permute on
port 5 and a multiply-add, as many port uses as the two multiply-adds of a dense kernel that they replace with
2:4 (half of those with 1:4), and all on port 5 or behind it. Codes: a quarter of that with 8-bit activations,
three quarters with fp32 ones: as much as quantized products with 2:4, half with 1:4. Taking a vector of rows
per weight instead is no way out: a weight, its place and the rows at that place are three loads, two per
cycle, where a dense kernel multiplies twice. Bytes per slot: 4, 1 or 1/2 for its value, 1/4 (1/2 for groups
above 4) for its place: a product of few rows reads 1.9 (fp32), 6.4 (int8) or 10.7 (4 bits) times fewer for
2:4 than dense fp32, and memory limits it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import LANES, spec_name
from effic.backends.tvm.kernels.quantized import CHUNKS, COLUMNS, SEGMENT, Outliers, QuantizedMatMul
from effic.ir.errors import UsageError

WINDOW = 16
"""Activations that one instruction gathers from."""

FLOAT = 32
"""``bits`` of values that are fp32."""


@dataclass(frozen=True)
class SparseMatMul(QuantizedMatMul):
    """``y[M, N] = x[M, K] @ W[K, N] + bias[N]`` with at most ``kept`` of every ``of`` weights along K.

    What :meth:`pack` returns depends on neither ``m``, ``activations`` nor ``portable``.

    Attributes:
        kept, of: the pattern, ``0 < kept < of <= 16``.
        bits: of a value: 4, 8, or 32 for fp32, which has no scales and one whole group (``oc``).
        symmetric: true: zero points are taken off when the weight is packed.
        activations: ``"int8"`` rounds them to 8 bits where :attr:`rounds` says so, ``"fp32"`` to 24, if any.
        outliers: 0.
    """

    kept: int = 2
    of: int = 4

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("sparse", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if not 0 < self.kept < self.of <= WINDOW:
            return f"{self.kept} of {self.of} weights are no pattern of at most {WINDOW} weights"
        if self.bits not in (4, 8, FLOAT):
            return f"values of {self.bits} bits are none of 4, 8 and {FLOAT}"
        if self.bits == FLOAT and (self.grouping != "oc" or self.group_size != -1):
            return "values in fp32 have no scales"
        if not self.symmetric:
            return "zero points are taken off when the weight is packed"
        if self.outliers:
            return "outliers beside sparse values are not held"
        reason = super().why_not() if self.bits != FLOAT else self._why_no_size()
        if reason is not None:
            return reason
        if self.k_groups > 1 and self.k_group % self.unit:
            return f"groups of {self.k_group} codes are not whole units of {self.unit} weights"
        return None

    def _why_no_size(self) -> str | None:
        if min(self.m, self.k, self.n) < 1:
            return f"a product of [{self.m}, {self.k}] and [{self.k}, {self.n}] has no elements"
        return None

    # -- the shape of the layout ------------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """Whether activations can be integers: codes, four neighbouring slots of which lie in one window."""
        together = self.place_bits == 2 or self.window_groups * self.kept % 4 == 0
        return self.bits != FLOAT and together

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded to 8 bits."""
        return self.activations == "int8" and self.whole

    @property
    def width(self) -> int:
        """Bits that a value is stored in."""
        return self.bits

    @property
    def middle(self) -> int:
        """Half the range of a code."""
        return 1 << (self.bits - 1)

    @property
    def per_word(self) -> int:
        """Slots in a word, or number, of the values."""
        return FLOAT // self.bits

    @property
    def place_bits(self) -> int:
        """Bits that a place is stored in."""
        if self.of > 4:
            return 4
        if self.k_groups > 1 and self.k_group % self._unit(2):
            return 4
        return 2

    @property
    def per_place_word(self) -> int:
        """Slots in a word of places."""
        return 32 // self.place_bits

    @property
    def window_groups(self) -> int:
        """Groups that places of 4 bits tell apart."""
        return WINDOW // self.of

    @property
    def period_slots(self) -> int:
        """Slots after which words, groups and windows begin anew."""
        return self._period_slots(self.place_bits)

    @property
    def period(self) -> int:
        """k of that many slots."""
        return self.period_slots // self.kept * self.of

    @property
    def unit(self) -> int:
        """k that segments are a multiple of."""
        return self._unit(self.place_bits)

    def _period_slots(self, place_bits: int) -> int:
        return math.lcm(32 // place_bits, self.kept * (1 if place_bits == 2 else self.window_groups))

    def _unit(self, place_bits: int) -> int:
        return math.lcm(self._period_slots(place_bits) // self.kept * self.of, LANES)

    @property
    def pieces(self) -> int:
        """Segments that a group along k is cut into."""
        longest = max(1, SEGMENT // self.unit) * self.unit
        return -(-self.k_group // longest)

    @property
    def segment(self) -> int:
        """k of a segment, padding included."""
        return -(-self.k_group // (self.pieces * self.unit)) * self.unit

    @property
    def slots(self) -> int:
        """Slots of a column, padding included."""
        return self.padded_k // self.of * self.kept

    # -- the weight -------------------------------------------------------------------------------

    def pack(
        self,
        codes: np.ndarray,
        scales: np.ndarray | None = None,
        zero_points: np.ndarray | None = None,
        outliers: Outliers | None = None,
        bias: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """The weight as the function's arguments after x.

        Any of the arrays may be a transposed view. Peak: about twice the packed weight, and a block.

        Args:
            codes: ``[K, N]``: fp32 weights, or int8 or uint8 codes that follow the pattern around their zero
                points.
            scales: as :meth:`QuantizedMatMul.pack` takes them; None for fp32.
            zero_points: of the type of the codes and the shape of the scales, or None.
            outliers: None.
            bias: ``[N]``, exactly where the spec has one.

        Returns:
            values, places, and for codes fp32 scales, and for :attr:`whole` int32 ``[blocks, segments, 128]``: -128
            times the sum of a segment's codes; fp32 bias ``[blocks, 128]``.

        Raises:
            UsageError: the spec cannot be held, an array does not fit it, the weight breaks the pattern, or a code
                less its zero point has more bits.
        """
        if reason := self.why_not():
            raise UsageError(reason)
        if outliers is not None:
            raise UsageError("outliers beside sparse values are not held")
        kinds = (np.dtype(np.float32),) if self.bits == FLOAT else (np.dtype(np.int8), np.dtype(np.uint8))
        if codes.shape != (self.k, self.n) or codes.dtype not in kinds:
            wanted = " or ".join(map(str, kinds))
            raise UsageError(
                f"weights are {codes.dtype} {list(codes.shape)}, {wanted} [{self.k}, {self.n}] are packed"
            )
        self._check_sparse(codes, scales, zero_points, bias)
        stored = np.float32 if self.bits == FLOAT else np.int32
        values = np.empty((self.blocks, self.slots // self.per_word, CHUNKS, LANES), stored)
        places = np.empty((self.blocks, self.slots // self.per_place_word, CHUNKS, LANES), np.int32)
        sums = np.empty((self.blocks, self.segments, COLUMNS), np.int32)
        rows, columns = self._row(np.arange(self.k)), self._column(np.arange(self.n))
        for block in range(self.blocks):
            mine = np.flatnonzero(columns // COLUMNS == block)
            part = self._less_zero(codes, zero_points, mine)
            padded = np.zeros((self.padded_k, COLUMNS), part.dtype)
            padded[rows[:, None], columns[mine] % COLUMNS] = part
            kept, where = self._slots(padded)
            values[block], places[block] = self._words_of(kept), self._places(where)
            if self.whole:
                sums[block] = kept.reshape(self.segments, -1, COLUMNS).sum(axis=1, dtype=np.int32) * -128
        packed: list[np.ndarray] = [values, places]
        if scales is not None:
            packed.append(self._per_group(np.asarray(scales, np.float32)))
        if self.whole:
            packed.append(sums)
        if bias is not None:
            padded = np.zeros(self.blocks * COLUMNS, np.float32)
            padded[columns] = bias
            packed.append(padded.reshape(self.blocks, COLUMNS))
        return packed

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x[M, K], *pack(), y[M, N])`` as a scheduled function for a CPU.

        Raises:
            UsageError: the spec cannot be held.
        """
        from effic.backends.tvm.kernels.sparse_code import sparse_function

        if reason := self.why_not():
            raise UsageError(reason)
        return sparse_function(self, cpu)

    def _check_sparse(
        self,
        codes: np.ndarray,
        scales: np.ndarray | None,
        zero_points: np.ndarray | None,
        bias: np.ndarray | None,
    ) -> None:
        if (scales is None) != (self.bits == FLOAT):
            raise UsageError("values in fp32 have no scales, codes have some")
        groups = (self.n, self.k_groups) if self.grouping == "oc" else (self.k, -(-self.n // self.n_group))
        for role, array in (("scales", scales), ("zero points", zero_points)):
            if array is not None and array.shape != groups:
                raise UsageError(f"{role} are {list(array.shape)}, {list(groups)} are packed")
        if zero_points is not None and zero_points.dtype != codes.dtype:
            raise UsageError(f"zero points are {zero_points.dtype} where codes are {codes.dtype}")
        if (bias is not None) != self.bias or (bias is not None and bias.shape != (self.n,)):
            given = "none" if bias is None else list(bias.shape)
            raise UsageError(
                f"a bias of {given} is given, the function takes {[self.n] if self.bias else 'none'}"
            )

    def _less_zero(
        self, codes: np.ndarray, zero_points: np.ndarray | None, columns: np.ndarray
    ) -> np.ndarray:
        """Some columns of the weight as numbers that are zero where nothing is kept."""
        part = codes[:, columns]
        if self.bits == FLOAT:
            return part
        wide = part.astype(np.int16)
        if zero_points is not None and self.grouping == "oc":
            wide -= zero_points[columns].T[np.arange(self.k) // self.k_group]
        elif zero_points is not None:
            wide -= zero_points[:, columns // self.n_group]
        if wide.size and (wide.min() < -self.middle or wide.max() >= self.middle):
            raise UsageError(f"there are codes of more than {self.bits} bits")
        return wide.astype(np.int8)

    def _slots(self, padded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and places ``[slots, 128]`` of a padded block ``[padded_k, 128]``."""
        groups = padded.reshape(-1, self.of, COLUMNS)
        values = np.zeros((len(groups), self.kept, COLUMNS), padded.dtype)
        places = np.zeros(values.shape, np.uint8)
        taken = np.zeros((len(groups), COLUMNS), np.uint8)
        for place in range(self.of):
            here = groups[:, place]
            some = here != 0
            for slot in range(min(place + 1, self.kept)):
                chosen = some & (taken == slot)
                np.copyto(values[:, slot], here, where=chosen)
                np.copyto(places[:, slot], np.uint8(place), where=chosen)
            taken += some
        if taken.max() > self.kept:
            raise UsageError(f"the weight does not follow {self.kept}:{self.of} along its input channels")
        if self.place_bits == 4:
            # Within a window of several groups.
            places += (np.arange(len(groups)) % self.window_groups * self.of).astype(np.uint8)[:, None, None]
        return values.reshape(-1, COLUMNS), places.reshape(-1, COLUMNS)

    def _words_of(self, kept: np.ndarray) -> np.ndarray:
        """Values ``[slots, 128]`` as they are stored."""
        if self.bits == FLOAT:
            return kept.reshape(-1, CHUNKS, LANES)
        if self.bits == 4:
            return _joined((kept + np.int8(self.middle)).view(np.uint8), 4)
        return _joined(kept.view(np.uint8), 8)

    def _places(self, where: np.ndarray) -> np.ndarray:
        return _joined(where, self.place_bits)


def _joined(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Small numbers ``[slots, 128]`` as words int32 ``[slots · bits / 32, 8, 16]``.

    Slot s is field s // 4 of byte s % 4.
    """
    fields = 8 // bits
    split = numbers.reshape(-1, fields, 4, CHUNKS, LANES)
    joined = split[:, 0].copy()
    for field in range(1, fields):
        joined |= split[:, field] << np.uint8(field * bits)
    return np.ascontiguousarray(joined.transpose(0, 2, 3, 1)).view("<i4")[..., 0]

"""Products with 2-, 3-, 4- and 8-bit weights: ``y[M, N] = x[M, K] @ W[K, N] (+ bias)``, W never decoded to memory.

``W = (q - z) * s`` with a scale (and zero point) per group of ``g`` codes. Groups run along the input
channels of an output channel (``oc``, scales ``[N, K/g]``) or along the output channels of an input
channel (``ic``, AdaDim: scales ``[K, N/g]``); one group may be a whole channel.

Layout. A word of 32 bits holds 8 (4-bit; 16 2-bit, 4 8-bit) codes of consecutive k of one column: byte
``i``, field ``p`` is ``k = 4p + i``. Sixteen columns make a vector (a chunk), eight chunks a block of 128
columns, and a block's words lie in the order they are read::

    w: int32 [N/128, K/8, 8, 16]

so that integer arithmetic takes four k at once, ``(word >> 4p) & 0x0f0f0f0f`` (``vpdpbusd``), and fp32
arithmetic ``table[word >> 4j]`` (``vpermps``: decodes and converts at once). 3-bit codes are stored in 4.
Each group is padded to whole vectors (k: 16 codes, columns: 16, 32, 64 or a multiple of 128); padding
decodes to something, but meets a zero activation or a column that is not stored.

Algebra. ``oc``: ``y[n] = sum_G s[n,G] * (sum_k x[k] q[k,n] - z[n,G] sum_k x[k])``. ``ic``: the scale belongs
to the activation, ``a[k,H] = x[k] s[k,H]``, and ``y[n] = sum_k a[k,H] q[k,n] - sum_k a[k,H] z[k,H]``, H being
the group of column n. In integers the x (or a) of at most 256 k share a scale, ``max|x|/127`` for ``int8``
activations; the products are exact, and the zero-point sums are taken over the *rounded* activations.

fp32 activations. With VNNI they are integers as well, of 24 bits: three bytes ("digits"), each with sums of
its own that are joined at the end of the 256 k, ``256 (256 t2 + t1) + t0``. An activation counts in steps of
2^-23 of the largest of its 256 and the sums are exact, where fp32 arithmetic rounds every sum: for K = 2048
the output is off by 1.4e-7 to 1.8e-7 of its size (floats: 1.7e-7 to 6.3e-7), with channels of 10^4 times the
size 3.9e-7 to 6.0e-7 (2.3e-7 to 7.3e-7). Only channels that large whose weights are all zero would show, 3e-8
of their ratio to the others. It takes 3 instructions per 64 weights and row in place of 4, and 3 to decode
128 weights in place of 15. Elsewhere floats are multiplied: up to 4 rows decode words as they go; for more, 32
columns x at most 256 k are decoded to a buffer in cache, exact outliers added, and a dense tile runs over it.

Outliers (EasyQuant): exact weights in place of single codes, sorted by block and piece of k. The code below
one is set to the group's zero point, which decodes to zero; the outlier's share is added to the block's sums,
for up to 16 rows at once from a copy of x that has them side by side.

Roofline. Bytes: ``K N bits/8`` of codes, ``4 N K/g`` of scales (5 with zero points), read once per call.
Instructions per 64 weights and row: 1 dot product (``int8``) or 3 (``fp32``), 1.5 to decode per tile of 4 to
16 rows, and for ``ic`` about 6 (``int8``) or 16 per 16 activations, row and group of columns to round (a seventh of
M = 16 at g = 128). M = 1 is bound by memory, from M = 8 on the two ports that multiply are; of 16 rows at once each
dot product reads an activation of its own, which keeps both load ports as busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import LANES, spec_name
from effic.ir.errors import UsageError

CHUNKS = 8
"""Vectors of 16 columns in a block."""

COLUMNS = CHUNKS * LANES

SEGMENT = 256
"""Most k that share an activation's scale, and that outliers are listed by."""

_WIDTHS = {2: 2, 3: 4, 4: 4, 8: 8}


class Outliers(NamedTuple):
    """Exact weights: integer ``rows`` (k) and ``columns`` (n), and their ``values``, each ``[count]``."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class QuantizedMatMul:
    """``y[M, N] = x[M, K] @ ((q - z) * s)[K, N] + bias[N]`` with packed codes.

    What :meth:`pack` returns depends on neither ``m``, ``activations`` nor ``portable``.

    Attributes:
        m, k, n: sizes.
        bits: of a code: 2, 3, 4 or 8.
        group_size: codes per scale; -1 for whole channels.
        grouping: ``"oc"``: groups along k of an output channel; ``"ic"``: along n of an input channel.
        symmetric: signed codes and no zero points.
        activations: ``"int8"`` rounds them to 8 bits, a scale per row and at most 256 k; ``"fp32"`` to 24, if any.
        outliers: whether exact weights are given; one function serves any number of them.
        bias: whether a bias of N follows.
        portable: use the form without AVX512 and VNNI instructions of its own.
    """

    m: int
    k: int
    n: int
    bits: int = 4
    group_size: int = -1
    grouping: Literal["oc", "ic"] = "oc"
    symmetric: bool = True
    activations: Literal["fp32", "int8"] = "fp32"
    outliers: bool = False
    bias: bool = False
    portable: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("quantized", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(self.m, self.k, self.n) < 1:
            return f"a product of [{self.m}, {self.k}] and [{self.k}, {self.n}] has no elements"
        if self.bits not in _WIDTHS:
            return f"codes of {self.bits} bits are none of 2, 3, 4 and 8"
        if self.grouping not in ("oc", "ic"):
            return f"the grouping '{self.grouping}' is neither oc nor ic"
        if self.activations not in ("fp32", "int8"):
            return f"activations of '{self.activations}' are neither fp32 nor int8"
        if self.group_size != -1 and self.group_size < 1:
            return f"groups of {self.group_size} codes have no scale"
        return None

    # -- the shape of the layout ------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Bits that a code is stored in."""
        return _WIDTHS[self.bits]

    @property
    def middle(self) -> int:
        """Half the range of the codes, which fp32 arithmetic takes off them."""
        return 1 << (self.bits - 1)

    @property
    def per_word(self) -> int:
        """Codes in a word: consecutive k of a column."""
        return 32 // self.width

    @property
    def k_group(self) -> int:
        """Input channels that share a scale of an output channel (``ic``: all)."""
        whole = self.grouping == "ic" or self.group_size == -1
        return self.k if whole else min(self.group_size, self.k)

    @property
    def n_group(self) -> int:
        """Output channels that share a scale of an input channel (``oc``: all)."""
        whole = self.grouping == "oc" or self.group_size == -1
        return self.n if whole else min(self.group_size, self.n)

    @property
    def k_groups(self) -> int:
        """Groups along k."""
        return -(-self.k // self.k_group)

    @property
    def pieces(self) -> int:
        """Segments that a group along k is cut into."""
        return -(-self.k_group // SEGMENT)

    @property
    def segment(self) -> int:
        """k of a segment, padding included: a multiple of 16."""
        return -(-self.k_group // (self.pieces * LANES)) * LANES

    @property
    def segments(self) -> int:
        """Segments along k."""
        return self.k_groups * self.pieces

    @property
    def padded_k(self) -> int:
        """k of the packed weight."""
        return self.segments * self.segment

    @property
    def n_stride(self) -> int:
        """Columns from one group along n to the next in the packed weight."""
        if self.n_group >= self.n or self.n_group > COLUMNS // 2:
            return -(-self.n_group // COLUMNS) * COLUMNS
        stride = LANES
        while stride < self.n_group:
            stride *= 2
        return stride

    @property
    def n_groups(self) -> int:
        """Groups along n, those included that fill up the last block."""
        groups = -(-self.n // self.n_group)
        together = max(1, COLUMNS // self.n_stride)
        return -(-groups // together) * together

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns."""
        return self.n_groups * self.n_stride // COLUMNS

    # -- the weight -------------------------------------------------------------------------------

    def pack(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        zero_points: np.ndarray | None = None,
        outliers: Outliers | None = None,
        bias: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """The weight as the function's arguments after x.

        Any of the arrays may be a transposed view.

        Args:
            codes: int8 or uint8 ``[K, N]``.
            scales: ``[N, ceil(K/g)]`` (``oc``) or ``[K, ceil(N/g)]`` (``ic``), of any float type.
            zero_points: of the shape of ``scales`` and the type of ``codes``; None means zero. A symmetric spec
                takes none, and signed codes only.
            outliers: exactly where the spec has them.
            bias: ``[N]``, exactly where the spec has one.

        Returns:
            int32 ``[blocks, padded_k / per_word, 8, 16]``; fp32 scales ``[blocks, k_groups, 128]`` (``oc``) or
            ``[n_groups, padded_k]`` (``ic``); int8 zero points less :attr:`middle`, of the same shape; of
            outliers int32 ``[blocks * segments + 1]`` where each segment's begin, int32 ``[count]`` places
            (128 k + column), fp32 values; fp32 bias ``[blocks, 128]``.

        Raises:
            UsageError: the spec cannot be held, or an array does not fit it.
        """
        self._check(codes, scales, zero_points, outliers, bias)
        scales = np.asarray(scales, np.float32)
        # Codes and zero points from here on as unsigned numbers, of which the middle is taken off.
        offset = self.middle if codes.dtype == np.int8 else 0
        zeros = np.full(scales.shape, offset - self.middle, np.int16)
        if zero_points is not None:
            zeros += zero_points
        if zeros.size and (zeros.min() < -128 or zeros.max() > 127):
            raise UsageError(f"the zero points of {self.bits}-bit codes are out of reach of int8")
        padded = np.zeros((self.padded_k, self.blocks * COLUMNS), np.uint8)
        self._place(codes, padded, offset)
        found: list[np.ndarray] = []
        if outliers is not None:
            found = self._pack_outliers(outliers, padded, scales, zeros)
        packed = [self._words(padded), self._per_group(scales)]
        if not self.symmetric:
            packed.append(self._per_group(zeros.astype(np.int8)))
        packed += found
        if bias is not None:
            columns = np.zeros(self.blocks * COLUMNS, np.float32)
            columns[self._column(np.arange(self.n))] = bias
            packed.append(columns.reshape(self.blocks, COLUMNS))
        return packed

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x[M, K], *pack(), y[M, N])`` as a scheduled function for a CPU.

        Raises:
            UsageError: the spec cannot be held.
        """
        from effic.backends.tvm.kernels.quantized_code import quantized_function

        if reason := self.why_not():
            raise UsageError(reason)
        return quantized_function(self, cpu)

    def _check(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        zero_points: np.ndarray | None,
        outliers: Outliers | None,
        bias: np.ndarray | None,
    ) -> None:
        if reason := self.why_not():
            raise UsageError(reason)
        if codes.shape != (self.k, self.n) or codes.dtype not in (np.int8, np.uint8):
            raise UsageError(
                f"codes are {codes.dtype} {list(codes.shape)}, int8 or uint8 [{self.k}, {self.n}] are packed"
            )
        groups = (self.n, self.k_groups) if self.grouping == "oc" else (self.k, -(-self.n // self.n_group))
        for role, array in (("scales", scales), ("zero points", zero_points)):
            if array is not None and array.shape != groups:
                raise UsageError(f"{role} are {list(array.shape)}, {list(groups)} are packed")
        if self.symmetric and (zero_points is not None or codes.dtype != np.int8):
            raise UsageError("a symmetric weight has signed codes and no zero points")
        if zero_points is not None and zero_points.dtype != codes.dtype:
            raise UsageError(f"zero points are {zero_points.dtype} where codes are {codes.dtype}")
        if (outliers is not None) != self.outliers:
            given = 0 if outliers is None else len(outliers.values)
            raise UsageError(
                f"{given} outliers are given, the function takes {'some' if self.outliers else 'none'}"
            )
        if (bias is not None) != self.bias or (bias is not None and bias.shape != (self.n,)):
            shape = "none" if bias is None else list(bias.shape)
            raise UsageError(
                f"a bias of {shape} is given, the function takes {[self.n] if self.bias else 'none'}"
            )

    def _row(self, k: np.ndarray) -> np.ndarray:
        """Where input channels are in the packed weight."""
        places: np.ndarray = k // self.k_group * (self.pieces * self.segment) + k % self.k_group
        return places

    def _column(self, n: np.ndarray) -> np.ndarray:
        """Where output channels are in the packed weight."""
        places: np.ndarray = n // self.n_group * self.n_stride + n % self.n_group
        return places

    def _place(self, codes: np.ndarray, padded: np.ndarray, offset: int) -> None:
        """Write codes to ``padded`` as unsigned numbers.

        Raises:
            UsageError: a code has more bits than it may have.
        """
        unsigned = codes.view(np.uint8) + np.uint8(offset)
        if unsigned.max() >> self.bits:
            raise UsageError(f"there are codes of more than {self.bits} bits")
        rows, columns = self._row(np.arange(self.k)), self._column(np.arange(self.n))
        if rows[-1] == self.k - 1 and columns[-1] == self.n - 1:
            padded[: self.k, : self.n] = unsigned
        else:
            padded[np.ix_(rows, columns)] = unsigned

    def _words(self, padded: np.ndarray) -> np.ndarray:
        """Unsigned codes ``[padded_k, columns]`` as words."""
        fields = self.per_word // 4
        split = padded.reshape(-1, fields, 4, self.blocks, CHUNKS, LANES)
        joined = split[:, 0].copy()
        for field in range(1, fields):
            joined |= split[:, field] << np.uint8(field * self.width)
        return np.ascontiguousarray(joined.transpose(2, 0, 3, 4, 1)).view("<i4")[..., 0]

    def _per_group(self, values: np.ndarray) -> np.ndarray:
        """Scales or zero points as the function reads them; where a column or row is padding they are zero."""
        if self.grouping == "oc":
            columns = np.zeros((self.blocks * COLUMNS, self.k_groups), values.dtype)
            columns[self._column(np.arange(self.n))] = values
            return np.ascontiguousarray(columns.reshape(self.blocks, COLUMNS, -1).transpose(0, 2, 1))
        rows = np.zeros((self.n_groups, self.padded_k), values.dtype)
        rows[: values.shape[1], self._row(np.arange(self.k))] = values.T
        return rows

    def _pack_outliers(
        self, outliers: Outliers, padded: np.ndarray, scales: np.ndarray, zeros: np.ndarray
    ) -> list[np.ndarray]:
        """Sort the outliers, and set the codes below them to what decodes to zero."""
        rows, columns = np.asarray(outliers.rows, np.int64), np.asarray(outliers.columns, np.int64)
        inside = (rows >= 0) & (rows < self.k) & (columns >= 0) & (columns < self.n)
        if not inside.all():
            raise UsageError(f"there are outliers outside of {self.k} x {self.n} weights")
        oc = self.grouping == "oc"
        group = (columns, rows // self.k_group) if oc else (rows, columns // self.n_group)
        zero = zeros[group].astype(np.int32) + self.middle
        # A zero point that no code has leaves a rest, which is taken off the outlier's share.
        code = np.clip(zero, 0, (1 << self.bits) - 1)
        rest = (code - zero) * scales[group].astype(np.float64)
        values = (np.asarray(outliers.values, np.float64) - rest).astype(np.float32)
        k, n = self._row(rows), self._column(columns)
        padded[k, n] = code
        segment = n // COLUMNS * self.segments + k // self.segment
        order = np.lexsort((n, k, segment))
        counts = np.bincount(segment, minlength=self.blocks * self.segments)
        begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        places = (k * COLUMNS + n % COLUMNS).astype(np.int32)
        return [begins, places[order], values[order]]

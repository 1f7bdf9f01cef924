"""Products with 2-, 3-, 4- and 8-bit weights on a GPU; the forms are those of :mod:`.products_cuda`.

``W = (q - z) * s`` with a scale (and zero point) per group of ``g`` codes, along the input channels of an
output channel (``oc``) or along the output channels of an input channel (``ic``, AdaDim).

Layout. An output channel is a row of 32-bit words, consecutive k from the low bits up::

    w: int32 [N, padded_k / per_word]

A group along k is padded to whole *chunks* of one to four words, what a thread loads at once, so that a
chunk has one scale. 3-bit codes are stored in 4.

Algebra, few rows. ``oc``: ``y[n] = sum_G s[n,G] * (sum_k x[k] q[k,n] - z[n,G] sum_k x[k])``. ``ic``: with
``a[k] = x[k] s[k,H]`` for the group H of column n, ``y[n] = sum_k a[k] q[k,n] - sum_k a[k] z[k,H]``; a and
``a z`` are made once per block, whose 32 output channels are of one group. In tiles each weight is decoded.

Roofline. Bytes: ``K N bits/8`` of codes, ``4 N K/g`` of scales (5 with zero points); ``ic`` reads the scales
of its group once per 32 output channels: an eighth of a byte per weight. 6 instructions per weight and 1
more per weight and row: 4 bits at 3.35 TB/s are 6.7e12 weights/s, about what an H100's 132 x 128 lanes
decode, so both limits are near; not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from effic.backends.tvm.kernels.lanes import spec_name
from effic.backends.tvm.kernels.products_cuda import ROWS, Weight, product_function
from effic.ir.errors import UsageError

_WIDTHS = {2: 2, 3: 4, 4: 4, 8: 8}
_MOST_CODES = 32
_VECTORS = (4, 2, 1)
"""Words that a thread loads at once: 16 bytes are the most."""

_PER_WARP = {"oc": 4, "ic": 8}
_FEWER_PER_WARP = 4
"""Output channels of a warp with more than two rows: sums and words take registers."""


@dataclass(frozen=True)
class CudaQuantizedMatMul:
    """``y[M, N] = x[M, K] @ ((q - z) * s)[K, N] + bias[N]`` with packed codes, on a GPU.

    What :meth:`pack` returns depends on neither ``m`` nor ``dtype``.

    Attributes:
        m, k, n: sizes.
        bits: of a code: 2, 3, 4 or 8.
        group_size: codes per scale; -1 for whole channels.
        grouping: ``"oc"``: groups along k of an output channel; ``"ic"``: along n of an input channel.
        symmetric: signed codes and no zero points.
        dtype: of x and y, ``float32`` or ``float16``.
        bias: whether a bias of N follows.
    """

    m: int
    k: int
    n: int
    bits: int = 4
    group_size: int = -1
    grouping: Literal["oc", "ic"] = "oc"
    symmetric: bool = True
    dtype: Literal["float32", "float16"] = "float32"
    bias: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("cuda_quantized", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(self.m, self.k, self.n) < 1:
            return f"a product of [{self.m}, {self.k}] and [{self.k}, {self.n}] has no elements"
        if self.bits not in _WIDTHS:
            return f"codes of {self.bits} bits are none of 2, 3, 4 and 8"
        if self.grouping not in ("oc", "ic"):
            return f"the grouping '{self.grouping}' is neither oc nor ic"
        if self.dtype not in ("float32", "float16"):
            return f"activations of {self.dtype} are neither float32 nor float16"
        if self.group_size != -1 and self.group_size < 1:
            return f"groups of {self.group_size} codes have no scale"
        return None

    @property
    def width(self) -> int:
        """Bits that a code is stored in."""
        return _WIDTHS[self.bits]

    @property
    def middle(self) -> int:
        """Half the range of the codes."""
        return 1 << (self.bits - 1)

    @property
    def per_word(self) -> int:
        """Codes in a word."""
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
    def n_groups(self) -> int:
        """Groups along n."""
        return -(-self.n // self.n_group)

    @property
    def vector(self) -> int:
        """Words of a chunk: the most that divide a group, or that pad a large one by an eighth at most."""
        for words in _VECTORS:
            codes = words * self.per_word
            if codes <= _MOST_CODES and (self.k_group % codes == 0 or self.k_group >= 8 * codes):
                return words
        return 1

    @property
    def codes(self) -> int:
        """Codes of a chunk."""
        return self.vector * self.per_word

    @property
    def group_stride(self) -> int:
        """Packed k from one group to the next: whole chunks."""
        return -(-self.k_group // self.codes) * self.codes

    @property
    def padded_k(self) -> int:
        """k of the packed weight."""
        return self.k_groups * self.group_stride

    def pack(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        zero_points: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """The weight as the function's arguments after x.

        Args:
            codes: int8 or uint8 ``[K, N]``; may be a transposed view.
            scales: ``[N, ceil(K/g)]`` (``oc``) or ``[K, ceil(N/g)]`` (``ic``), of any float type.
            zero_points: of the shape of ``scales`` and the type of ``codes``; None means zero. A symmetric spec
                takes none, and signed codes only.
            bias: ``[N]``, exactly where the spec has one.

        Returns:
            int32 ``[N, padded_k / per_word]``; fp32 scales ``[N, k_groups]`` (``oc``) or ``[n_groups, K]``
            (``ic``); int8 zero points less :attr:`middle`, of the same shape; fp32 bias ``[N]``.

        Raises:
            UsageError: the spec cannot be held, or an array does not fit it.
        """
        self._check(codes, scales, zero_points, bias)
        offset = self.middle if codes.dtype == np.int8 else 0
        unsigned = codes.view(np.uint8) + np.uint8(offset)
        if unsigned.max() >> self.bits:
            raise UsageError(f"there are codes of more than {self.bits} bits")
        padded = np.zeros((self.n, self.padded_k), np.uint8)
        places = np.arange(self.k)
        places = places // self.k_group * self.group_stride + places % self.k_group
        padded[:, places] = unsigned.T
        per_byte = 8 // self.width
        packed_bytes = padded[:, ::per_byte].copy()
        for field in range(1, per_byte):
            packed_bytes |= padded[:, field::per_byte] << np.uint8(field * self.width)
        packed = [np.ascontiguousarray(packed_bytes).view("<i4"), self._laid(scales.astype(np.float32))]
        if not self.symmetric:
            zeros = np.full(scales.shape, offset - self.middle, np.int16)
            if zero_points is not None:
                zeros += zero_points
            if zeros.min() < -128 or zeros.max() > 127:
                raise UsageError(f"the zero points of {self.bits}-bit codes are out of reach of int8")
            packed.append(self._laid(zeros.astype(np.int8)))
        if bias is not None:
            packed.append(np.ascontiguousarray(bias, np.float32))
        return packed

    def cuda_func(self, arch: str) -> Any:
        """``(x[M, K], *pack(), y[M, N])`` as a scheduled function for a GPU.

        Args:
            arch: as CUDA names it, ``sm_90``; the code is the same for all from ``sm_80`` on.

        Raises:
            UsageError: the spec cannot be held.
        """
        return self._function(serial=False)

    def serial_func(self) -> Any:
        """The same function with its threads one after the other, for a CPU: to try it, not to use it."""
        return self._function(serial=True)

    def _function(self, *, serial: bool) -> Any:
        if reason := self.why_not():
            raise UsageError(reason)
        weight = _Codes(self)
        return product_function(self.name, self.m, self.k, self.n, self.dtype, self.bias, weight, serial)

    def _laid(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values if self.grouping == "oc" else values.T)

    def _check(
        self, codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bias: np.ndarray | None
    ) -> None:
        if reason := self.why_not():
            raise UsageError(reason)
        if codes.shape != (self.k, self.n) or codes.dtype not in (np.int8, np.uint8):
            raise UsageError(
                f"codes are {codes.dtype} {list(codes.shape)}, int8 or uint8 [{self.k}, {self.n}] are packed"
            )
        groups = (self.n, self.k_groups) if self.grouping == "oc" else (self.k, self.n_groups)
        for role, array in (("scales", scales), ("zero points", zero_points)):
            if array is not None and array.shape != groups:
                raise UsageError(f"{role} are {list(array.shape)}, {list(groups)} are packed")
        if self.symmetric and (zero_points is not None or codes.dtype != np.int8):
            raise UsageError("a symmetric weight has signed codes and no zero points")
        if zero_points is not None and zero_points.dtype != codes.dtype:
            raise UsageError(f"zero points are {zero_points.dtype} where codes are {codes.dtype}")
        if (bias is not None) != self.bias or (bias is not None and bias.shape != (self.n,)):
            given = "none" if bias is None else list(bias.shape)
            raise UsageError(
                f"a bias of {given} is given, the function takes {[self.n] if self.bias else 'none'}"
            )


class _Codes(Weight):
    """Codes as :class:`CudaQuantizedMatMul` packs them."""

    def __init__(self, spec: CudaQuantizedMatMul) -> None:
        self.spec = spec
        self.inputs = spec.grouping == "ic"
        self.codes, self.chunks = spec.codes, spec.padded_k // spec.codes
        self.per_warp = _PER_WARP[spec.grouping] if spec.m <= ROWS // 2 else _FEWER_PER_WARP
        self.unit = spec.per_word
        self.n_group, self.n_groups = spec.n_group, spec.n_groups
        self.offsets = self.inputs and not spec.symmetric

    def arguments(self, T: Any) -> None:
        spec = self.spec
        self.w = T.arg("w", T.Buffer((spec.n, spec.padded_k // spec.per_word), "int32"))
        groups = (spec.n_groups, spec.k) if self.inputs else (spec.n, spec.k_groups)
        self.scales = T.arg("scales", T.Buffer(groups, "float32"))
        self.zeros = None if spec.symmetric else T.arg("zeros", T.Buffer(groups, "int8"))
        self._words: Any = None

    def real(self, T: Any, k: Any) -> tuple[Any, Any]:
        spec = self.spec
        inside = k % spec.group_stride
        channel = k // spec.group_stride * spec.k_group + inside
        return T.min(channel, T.int32(spec.k - 1)), T.And(inside < spec.k_group, channel < spec.k)

    def factor(self, T: Any, group: Any, channel: Any) -> tuple[Any, Any]:
        if not self.inputs:
            return None, None
        zero = None if self.zeros is None else T.cast(self.zeros[group, channel], "float32")
        return self.scales[group, channel], zero

    def load(self, T: Any, slot: int, row: Any, chunk: Any) -> None:
        vector = self.spec.vector
        if slot == 0:
            self._words = T.alloc_buffer((self.per_warp * vector,), "int32", scope="local")
        if vector == 1:
            T.buffer_store(self._words, self.w[row, chunk], [slot])
        else:
            whole = self.w[row, T.ramp(chunk * vector, 1, vector)]
            T.buffer_store(self._words, whole, [T.ramp(slot * vector, 1, vector)])

    def number(self, T: Any, word: Any, field: Any) -> Any:
        """A code less the middle of its range, in fp32."""
        spec = self.spec
        code = T.shift_right(word, T.cast(field, "int32") * T.int32(spec.width))
        code = T.bitwise_and(code, T.int32((1 << spec.width) - 1))
        return T.cast(code - T.int32(spec.middle), "float32")

    def add(
        self, T: Any, slots: int, rows: int, x: Callable[[int, Any], Any], sums: Callable[[int, int], Any]
    ) -> None:
        spec, vector, words = self.spec, self.spec.vector, self._words
        numbers = T.alloc_buffer((slots,), "float32", scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        with T.unroll(vector) as word, T.unroll(spec.per_word) as field:
            for slot in range(slots):
                T.buffer_store(numbers, self.number(T, words[slot * vector + word], field), [slot])
            for row in range(rows):
                T.buffer_store(value, x(row, word * spec.per_word + field), [0])
                for slot in range(slots):
                    buffer, index = sums(slot, row)
                    T.buffer_store(buffer, buffer[index] + numbers[slot] * value[0], [index])

    @property
    def sums_x(self) -> bool:
        return not self.spec.symmetric

    def finish(self, T: Any, row: Any, chunk: Any, total: Any, x_sum: Any) -> Any:
        if self.inputs:
            return total - x_sum if self.sums_x else total
        group = chunk * self.codes // self.spec.group_stride
        if self.zeros is not None:
            total = total - T.cast(self.zeros[row, group], "float32") * x_sum
        return total * self.scales[row, group]

    def decode(self, T: Any, row: Any, k: Any, store: Callable[[Any, Any], None]) -> None:
        spec = self.spec
        word = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(word, self.w[row, k // spec.per_word], [0])
        if not self.inputs:
            group = k // spec.group_stride
            scale = T.alloc_buffer((1,), "float32", scope="local")
            zero = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(scale, self.scales[row, group], [0])
            if self.zeros is not None:
                T.buffer_store(zero, T.cast(self.zeros[row, group], "float32"), [0])
        for field in range(spec.per_word):
            number = self.number(T, word[0], field)
            if self.inputs:
                channel = T.min(k + field, T.int32(spec.k - 1))
                group = row // spec.n_group
                if self.zeros is not None:
                    number = number - T.cast(self.zeros[group, channel], "float32")
                number = number * self.scales[group, channel]
            else:
                if self.zeros is not None:
                    number = number - zero[0]
                number = number * scale[0]
            store(field, number)

"""Products with 2:4 weights on a GPU: of every 4 consecutive k two weights are stored, and where they stand.

Layout. An output channel is a row of pairs and a row of 32-bit words of 4 bits per group of 4 k, low bits
first: the position of the first weight in bits 0 and 1, of the second in bits 2 and 3::

    values: fp32 or fp16 [N, padded_k / 2]      places: int32 [N, padded_k / 32]

Few rows: the x of each weight is gathered from shared memory. Tiles: a group is decoded to four weights,
two of them zero, and multiplied as dense ones are: this saves memory and its traffic, and no arithmetic.
The sparse tensor cores (``mma.sp``) are not used.

Roofline. ``K N`` bytes of values in fp16, ``K N / 8`` of places: 9/16 of dense fp16; 17/32 of dense fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from effic.backends.tvm.kernels.lanes import spec_name
from effic.backends.tvm.kernels.products_cuda import ROWS, Weight, product_function
from effic.ir.errors import UsageError

GROUP, KEPT = 4, 2
_PER_WORD = 8
"""Groups whose places are in a word."""

_CODES = GROUP * _PER_WORD
_VALUES = KEPT * _PER_WORD
_BYTES_AT_ONCE = 16


@dataclass(frozen=True)
class CudaSparseMatMul:
    """``y[M, N] = x[M, K] @ W[K, N] + bias[N]`` with at most two of any four consecutive k not zero.

    What :meth:`pack` returns depends not on ``m``.

    Attributes:
        m, k, n: sizes.
        dtype: of x, y and the stored values, ``float32`` or ``float16``.
        bias: whether a bias of N follows.
    """

    m: int
    k: int
    n: int
    dtype: Literal["float32", "float16"] = "float32"
    bias: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("cuda_sparse", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(self.m, self.k, self.n) < 1:
            return f"a product of [{self.m}, {self.k}] and [{self.k}, {self.n}] has no elements"
        if self.dtype not in ("float32", "float16"):
            return f"activations of {self.dtype} are neither float32 nor float16"
        return None

    @property
    def padded_k(self) -> int:
        """k of the packed weight."""
        return -(-self.k // _CODES) * _CODES

    def pack(self, weight: np.ndarray, bias: np.ndarray | None = None) -> list[np.ndarray]:
        """The weight as the function's arguments after x.

        Args:
            weight: ``[K, N]``, of any float type; may be a transposed view.
            bias: ``[N]``, exactly where the spec has one.

        Returns:
            values ``[N, padded_k / 2]``, int32 places ``[N, padded_k / 32]``, fp32 bias ``[N]``.

        Raises:
            UsageError: the spec cannot be held, an array does not fit it, or the weight is not 2:4.
        """
        if reason := self.why_not():
            raise UsageError(reason)
        if weight.shape != (self.k, self.n):
            raise UsageError(f"the weight is {list(weight.shape)}, [{self.k}, {self.n}] is packed")
        if (bias is not None) != self.bias or (bias is not None and bias.shape != (self.n,)):
            given = "none" if bias is None else list(bias.shape)
            raise UsageError(
                f"a bias of {given} is given, the function takes {[self.n] if self.bias else 'none'}"
            )
        if not is_two_of_four(weight):
            raise UsageError(
                "the weight is not 2:4: four consecutive input channels have more than two weights"
            )
        padded = np.zeros((self.n, self.padded_k), self.dtype)
        padded[:, : self.k] = weight.T
        groups = padded.reshape(self.n, -1, GROUP)
        # The two largest by "is not zero", in order of their place: stable, so that places differ.
        places = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[..., :KEPT], axis=2)
        values = np.take_along_axis(groups, places, axis=2)
        codes = (places[..., 0] | places[..., 1] << 2).astype(np.uint8)
        packed = (codes[:, ::2] | codes[:, 1::2] << np.uint8(4)).astype(np.uint8)
        found = [np.ascontiguousarray(values.reshape(self.n, -1)), np.ascontiguousarray(packed).view("<i4")]
        return found if bias is None else [*found, np.ascontiguousarray(bias, np.float32)]

    def cuda_func(self, arch: str) -> Any:
        """``(x[M, K], *pack(), y[M, N])`` as a scheduled function for a GPU; see :mod:`.quantized_cuda`.

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
        weight = _Pairs(self)
        return product_function(self.name, self.m, self.k, self.n, self.dtype, self.bias, weight, serial)


def is_two_of_four(weight: np.ndarray) -> bool:
    """Whether no four consecutive input channels of a ``[K, N]`` weight have more than two weights."""
    whole = weight.shape[0] // GROUP * GROUP
    kept = (weight[:whole] != 0).reshape(-1, GROUP, weight.shape[1]).sum(axis=1)
    rest = (weight[whole:] != 0).sum(axis=0)
    return bool((kept <= KEPT).all() and (rest <= KEPT).all())


class _Pairs(Weight):
    """Pairs as :class:`CudaSparseMatMul` packs them."""

    codes, unit, n_groups = _CODES, GROUP, 1

    def __init__(self, spec: CudaSparseMatMul) -> None:
        self.spec, self.n_group = spec, spec.n
        self.chunks = spec.padded_k // _CODES
        self.per_warp = 2 if spec.m <= ROWS // 2 else 1
        self.vector = _BYTES_AT_ONCE // np.dtype(spec.dtype).itemsize

    def arguments(self, T: Any) -> None:
        spec = self.spec
        self.values = T.arg("values", T.Buffer((spec.n, spec.padded_k // KEPT), spec.dtype))
        self.places = T.arg("places", T.Buffer((spec.n, spec.padded_k // _CODES), "int32"))
        self._loaded: Any = None
        self._words: Any = None

    def real(self, T: Any, k: Any) -> tuple[Any, Any]:
        return T.min(k, T.int32(self.spec.k - 1)), k < self.spec.k

    def load(self, T: Any, slot: int, row: Any, chunk: Any) -> None:
        if slot == 0:
            self._loaded = T.alloc_buffer((self.per_warp * _VALUES,), self.spec.dtype, scope="local")
            self._words = T.alloc_buffer((self.per_warp,), "int32", scope="local")
        T.buffer_store(self._words, self.places[row, chunk], [slot])
        for begin in range(0, _VALUES, self.vector):
            whole = self.values[row, T.ramp(chunk * _VALUES + begin, 1, self.vector)]
            T.buffer_store(self._loaded, whole, [T.ramp(slot * _VALUES + begin, 1, self.vector)])

    def add(
        self, T: Any, slots: int, rows: int, x: Callable[[int, Any], Any], sums: Callable[[int, int], Any]
    ) -> None:
        value = T.alloc_buffer((1,), "float32", scope="local")
        place = T.alloc_buffer((1,), "int32", scope="local")
        with T.unroll(_VALUES) as i:
            for slot in range(slots):
                T.buffer_store(value, T.cast(self._loaded[slot * _VALUES + i], "float32"), [0])
                code = T.shift_right(self._words[slot], T.cast(i, "int32") * T.int32(2))
                T.buffer_store(place, i // KEPT * GROUP + T.bitwise_and(code, T.int32(GROUP - 1)), [0])
                for row in range(rows):
                    buffer, index = sums(slot, row)
                    T.buffer_store(buffer, buffer[index] + value[0] * x(row, place[0]), [index])

    def decode(self, T: Any, row: Any, k: Any, store: Callable[[Any, Any], None]) -> None:
        code = T.alloc_buffer((1,), "int32", scope="local")
        pair = T.alloc_buffer((KEPT,), "float32", scope="local")
        word = T.shift_right(self.places[row, k // _CODES], k % _CODES)
        T.buffer_store(code, T.bitwise_and(word, T.int32(15)), [0])
        for i in range(KEPT):
            T.buffer_store(pair, T.cast(self.values[row, k // KEPT + i], "float32"), [i])
        zero = T.float32(0)
        for j in range(GROUP):
            first = T.Select(T.bitwise_and(code[0], T.int32(3)) == j, pair[0], zero)
            second = T.Select(T.shift_right(code[0], T.int32(2)) == j, pair[1], zero)
            store(j, first + second)

"""MatMul and Gemm with a weight whose zeros follow N:M: on effic's kernels for what is kept.

A weight is looked at once per build: the pattern it is declared to follow, the one it is stored in, or any of 4,
8 and 16 weights that its zeros happen to follow. A weight that :mod:`effic.ir.compressed` stores is read
one at a time while it is packed anew, and is dense nowhere in the build.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.backends.ort.linear import Linear
from effic.backends.ort.scenes import EncodedInput, encoded_input
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.quantized import COLUMNS
from effic.backends.tvm.kernels.quantized_activations import DIRECT_ROWS
from effic.backends.tvm.kernels.sparse import FLOAT, WINDOW, SparseMatMul
from effic.backends.tvm.lowering import Lowering
from effic.backends.tvm.operators.encoded import fingerprint
from effic.backends.tvm.operators.products import per_group, read_form, rows_of, run_kernel
from effic.ir.compressed import recognise_compressed
from effic.ir.encodings import code_values
from effic.ir.errors import UsageError
from effic.ir.model import constant_tensor
from effic.ir.sparsity import Pattern, declared
from effic.ir.tensors import borrow

_PIECE = 1 << 20
"""Weights that are looked at together."""

_LENGTHS = (4, 8, 16)
"""Groups that undeclared patterns are looked for in."""

Reading = Callable[[], Any]
"""Gives a context of the weight ``[K, N]``."""


@dataclass(frozen=True)
class _Zeros:
    """What a weight's zeros follow.

    Attributes:
        pattern: the fewest kept, of the shortest group.
        low, high: the least and largest number, for codes less their zero points.
    """

    pattern: Pattern
    low: float
    high: float


@dataclass(frozen=True)
class _Weight:
    """A weight as the kernel is to have it.

    Attributes:
        spec: with the pattern 1:2 until the zeros have been looked at.
        names: what it may be called in the model's metadata.
        stored: the pattern that it is stored in, as text.
        numbers: gives ``[K, N]``, zero where nothing is kept.
        pack: the arrays of a spec.
    """

    spec: SparseMatMul
    names: tuple[str, ...]
    stored: str | None
    numbers: Reading
    pack: Callable[[SparseMatMul, np.ndarray | None], list[np.ndarray]]


def product_on_sparse(
    lowering: Lowering, x: Any, right: ir.Value | None, linear: Linear, tail: Any
) -> Any | None:
    """The product of activations with an N:M weight, plain or in codes; None where another kernel is the better.

    Args:
        lowering: for a CPU.
        x: the activations.
        right: the weight.
        linear: what is computed.
        tail: the bias that can be taken along, see :mod:`.matmul`.
    """
    rows, cpu = rows_of(x), lowering.cpu
    if cpu is None or rows is None or 0 in rows.lead or right is None:
        return None
    encoded = encoded_input(right)
    if encoded is not None:
        weight = _in_codes(lowering, encoded, linear, rows.typical)
    else:
        weight = _plain(right, linear, rows.typical)
    if weight is None:
        return None
    key = ("nm", fingerprint(right), linear.transposed)
    if key not in lowering.shared.choices:
        lowering.shared.choices[key] = _zeros_of(lowering, weight)
    zeros: _Zeros | None = lowering.shared.choices[key]
    if zeros is None:
        return None
    spec = replace(weight.spec, kept=zeros.pattern.n, of=zeros.pattern.m)
    if spec.bits != FLOAT:
        if zeros.low < -128 or zeros.high > 127:
            return None
        spec = replace(spec, bits=4 if zeros.low >= -8 and zeros.high <= 7 else 8)
    what = f"{zeros.pattern}, {'fp32' if spec.bits == FLOAT else f'int{spec.bits}'} values"
    reason = spec.why_not() or why_slower(spec, cpu, weight.stored is not None)
    if reason is not None:
        lowering.tell(f"{what}, but no sparse kernel: {reason}")
        return None
    tail.read(spec.n, activations=False)
    bias = tail.bias
    spec = replace(spec, bias=bias is not None)
    whole = ("sparse", fingerprint(right), linear.transposed, linear.alpha, tail.key if spec.bias else ())
    packed = lowering.packed(spec, whole, weight.names[0], lambda: weight.pack(spec, bias))
    lowering.tell(f"{what}, sparse kernel")
    return tail.finish(run_kernel(lowering, spec, x, packed, rows))


_DENSE_ROWS = 16
"""For more rows the dense kernel is the faster where more than 3 of 8 fp32 weights are kept: out of cache 2:4 has
1.13 of its speed at 8 rows, 1.10 at 16, 0.86 at 32, 0.70 at 128; 1:4 still 1.3 at 128. Codes stay sparse for
any rows: at 128, 2:4 with fp32 activations has 0.80 to 0.84 of the quantized kernel's speed (at 32 1.03, at 16
1.05 to 1.14), and a form of its own for a bucket of many rows would be a second copy of the weight, 1.3 (4 bits)
to 1.6 times as large."""


def why_slower(spec: SparseMatMul, cpu: Cpu, compressed: bool) -> str | None:
    """Why another kernel is the faster one, or None; measured at 2048 x 2048 against the dense and quantized ones.

    Args:
        spec: with its pattern.
        cpu: what it is for.
        compressed: whether the weight is stored compressed: in fp32 no other kernel holds it then.
    """
    columns, density = COLUMNS * spec.blocks, spec.kept / spec.of
    if compressed and spec.bits == FLOAT:
        return None
    if spec.padded_k * columns * density > spec.k * spec.n:
        return f"padded to {spec.padded_k} x {columns}, more would be read than of the dense weight"
    if spec.rounds and not cpu.vnni:
        # 0.5 of the quantized kernel's speed and less.
        return "without VNNI, activations in 8 bits are gathered one by one"
    if not cpu.avx512 and density > 1 / 4:
        # 2:4: 0.5 to 0.8 of a dense kernel's speed for one row; 1:4 1.1 to 1.8.
        return "without AVX512, gathering activations takes longer than reading the zeros"
    if spec.bits == FLOAT and not cpu.avx512 and spec.m > DIRECT_ROWS:
        # Panels are decoded: 0.9 of the dense kernel's speed at 16 rows (1:4 in codes: 1.05 of the quantized one's).
        return f"without AVX512, for {spec.m} rows the dense kernel was measured the faster"
    if spec.bits == FLOAT and density > 3 / 8 and spec.m > _DENSE_ROWS:
        return f"for {spec.m} rows the dense kernel was measured the faster"
    return None


# -- weights ----------------------------------------------------------------------------------------


def _plain(right: ir.Value, linear: Linear, rows: int) -> _Weight | None:
    tensor, stored = constant_tensor(right), None
    names: tuple[str, ...] = (right.name or "weight",)
    if tensor is None:
        compressed = recognise_compressed(right)
        if compressed is None:
            return None
        tensor, stored = compressed.tensor(), compressed.pattern
        names = (compressed.weight or names[0], names[0])
    shape = tuple(tensor.shape.numpy())
    if len(shape) != 2 or 0 in shape or tensor.dtype != ir.DataType.FLOAT:
        return None
    k, n = (shape[1], shape[0]) if linear.transposed else shape

    @contextmanager
    def numbers() -> Iterator[np.ndarray]:
        with borrow(tensor) as array:
            yield array.T if linear.transposed else array

    def pack(spec: SparseMatMul, bias: np.ndarray | None) -> list[np.ndarray]:
        with numbers() as matrix:
            scaled = matrix if linear.alpha == 1 else matrix * np.float32(linear.alpha)
            return spec.pack(scaled, bias=bias)

    spec = SparseMatMul(rows, k, n, bits=FLOAT, kept=1, of=2)
    return _Weight(spec, names, stored, numbers, pack)


def _in_codes(lowering: Lowering, weight: EncodedInput, linear: Linear, rows: int) -> _Weight | None:
    encoding = weight.encoding
    k_axis = int(weight.transposed) ^ int(linear.transposed)
    form = read_form(encoding, k_axis)
    if form is None or encoding.outliers is not None:
        return None
    if encoding.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    grouping, group, _, _ = form
    spec = SparseMatMul(
        rows,
        encoding.shape[k_axis],
        encoding.shape[1 - k_axis],
        bits=8,
        group_size=group,
        grouping=grouping,
        activations=lowering.options.get("activations", "fp32"),
        kept=1,
        of=2,
    )

    def codes() -> np.ndarray:
        found = code_values(encoding)
        return found if k_axis == 0 else found.T

    def points() -> np.ndarray | None:
        zeros = encoding.zero_points
        return None if zeros is None else per_group(spec, zeros, encoding, k_axis)

    @contextmanager
    def numbers() -> Iterator[np.ndarray]:
        found, zeros = codes(), points()
        if zeros is None:
            yield found
            return
        wide = found.astype(np.int16)
        if grouping == "oc":
            wide -= zeros.T[np.arange(spec.k) // spec.k_group]
        else:
            wide -= zeros[:, np.arange(spec.n) // spec.n_group]
        yield wide

    def pack(spec: SparseMatMul, bias: np.ndarray | None) -> list[np.ndarray]:
        scales = per_group(spec, encoding.scales, encoding, k_axis).astype(np.float32)
        return spec.pack(codes(), scales * np.float32(linear.alpha), points(), None, bias)

    stored = None if encoding.compressed is None else encoding.compressed.pattern
    return _Weight(spec, (weight.name, weight.value.name or weight.name), stored, numbers, pack)


# -- what the zeros follow --------------------------------------------------------------------------


def _zeros_of(lowering: Lowering, weight: _Weight) -> _Zeros | None:
    known = declared(lowering.model)
    wanted = [known[name] for name in weight.names if name in known]
    # Anyone may have written to the metadata.
    with suppress(UsageError):
        wanted += [] if weight.stored is None else [Pattern.parse(weight.stored)]
    with weight.numbers() as matrix:
        return zeros_of(matrix, {one.m for one in wanted})


def zeros_of(matrix: np.ndarray, lengths: set[int] | frozenset[int] = frozenset()) -> _Zeros | None:
    """The pattern that the zeros of a matrix ``[K, N]`` follow along K, None where more than half is kept.

    Args:
        matrix: the numbers.
        lengths: lengths of groups to try besides 4, 8 and 16.
    """
    tried = sorted({*_LENGTHS, *(length for length in lengths if 1 < length <= WINDOW)})
    # In a group longer than K a dense weight would seem to have zeros.
    tried = [length for length in tried if length <= len(matrix)]
    if not tried:
        return None
    most = dict.fromkeys(tried, 1)
    rows = max(1, _PIECE // matrix.shape[1])
    rows = -(-rows // math.lcm(*tried)) * math.lcm(*tried)
    low = high = 0.0
    for start in range(0, len(matrix), rows):
        piece = matrix[start : start + rows]
        some = piece != 0
        for length in list(most):
            groups = np.arange(0, len(piece), length)
            largest = int(np.add.reduceat(some, groups, axis=0, dtype=np.uint8).max())
            most[length] = max(most[length], largest)
            if 2 * most[length] > length:
                del most[length]
        if not most:
            return None
        low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    length = min(most, key=lambda one: (most[one] / one, one))
    return _Zeros(Pattern(most[length], length), low, high)

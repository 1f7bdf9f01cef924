"""A merged weight that is computed as it is written: base plus the product of thin factors.

Nothing the size of the weight is kept. A block of the base is read from its file, the product is added
to it in the processor's cache, and the block goes to the output, so that merging costs about what
copying the file does.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effic.ir.mapped import MappedTensor
from effic.ir.tensors import borrow

# Weights per block: a call to the system and one to the other thread are nothing beside it.
_BLOCK = 1 << 18

# A product of at most so many multiplications is left to one thread by OpenBLAS (its
# SMP_THRESHOLD_MIN times GEMM_MULTITHREAD_THRESHOLD), which here would wait for memory and for each
# other; so many rows are done at a time; and above this rank the multiplications cost more than moving
# the weight, so that threads are welcome.
_MULTIPLICATIONS = 1 << 18
_HEIGHT = 8
_THIN = 64

# Rows looked at to estimate the norm of a large weight; good to about a percent.
_SAMPLE = 64


class Term(NamedTuple):
    """A product added to a part of a matrix as it is stored.

    Attributes:
        rows, columns: the part, as half-open ranges.
        left: ``[rows, r]``, in the dtype that is computed in.
        right: ``[r, columns]``, likewise.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    left: np.ndarray
    right: np.ndarray

    def norm(self) -> float:
        """Frobenius norm of the product, without forming it: ``√Σ (LᵀL ∘ RRᵀ)``."""
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        square = float(np.sum((left.T @ left) * (right @ right.T)))
        return math.inf if math.isnan(square) else math.sqrt(max(0.0, square))

    def largest(self) -> float:
        """What no element of the product exceeds (Cauchy and Schwarz)."""
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        tallest = np.sum(left * left, axis=1).max(initial=0.0)
        return math.sqrt(tallest * np.sum(right * right, axis=0).max(initial=0.0))


class MergedTensor(ir.LazyTensor):
    """``base + Σ left @ right``, computed whenever it is asked for.

    Args:
        base: any floating-point tensor; kept, not copied.
        terms: what is added, in order; all of one dtype, float32 or float64.
        matrix_shape: rows and columns the base is seen as.
    """

    __slots__ = ("base", "matrix_shape", "terms")

    def __init__(
        self, base: ir.TensorProtocol, terms: Sequence[Term], matrix_shape: tuple[int, int], name: str
    ) -> None:
        super().__init__(self._whole, base.dtype, ir.Shape(base.shape.numpy()), name=name)
        self.base, self.terms, self.matrix_shape = base, tuple(terms), matrix_shape

    def overflows(self) -> bool:
        """Whether an element is infinite or NaN.

        Seldom looks: what is less than half a step of the type's largest number leaves any finite one finite.
        """
        info = ml_dtypes.finfo(self.dtype.numpy())  # type: ignore[no-untyped-call]
        if sum(term.largest() for term in self.terms) < float(info.max) * float(info.eps) / 4:
            return False
        return not all(bool(np.isfinite(block).all()) for block in self.blocks())

    def _whole(self) -> ir.TensorProtocol:
        return ir.Tensor(self.numpy(), dtype=self.dtype, name=self.name)

    def numpy(self) -> np.ndarray:
        """The merged weight as an array of its own."""
        out = np.empty(self.matrix_shape, self.dtype.numpy())
        at = 0
        for block in self.blocks():
            out[at : at + len(block)] = block
            at += len(block)
        return out.reshape(self.shape.numpy())

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def tofile(self, file: IO[bytes]) -> None:
        for block in self.blocks():
            file.write(block.reshape(-1).view(np.uint8).data)

    def blocks(self) -> Iterator[np.ndarray]:
        """The merged matrix from the top, some rows at a time; a block is valid until the next."""
        rows, columns = self.matrix_shape
        step = min(rows, max(1, _BLOCK // max(1, columns)))
        starts = range(0, rows, step)
        with contextlib.ExitStack() as open_until_the_end:
            source = None
            if not (isinstance(self.base, MappedTensor) and hasattr(os, "preadv")):
                source = open_until_the_end.enter_context(borrow(self.base)).reshape(self.matrix_shape)
            if len(starts) < 2:
                yield from (self._block(start, self._buffers(step), source) for start in starts)
                return
            # Two blocks are made while a third is written.
            workers = open_until_the_end.enter_context(ThreadPoolExecutor(2))
            free = [self._buffers(step) for _ in range(3)]
            coming: deque[tuple[Future[np.ndarray], tuple[np.ndarray, np.ndarray]]] = deque()
            left = iter(starts)
            while True:
                for start in itertools.islice(left, len(free)):
                    buffers = free.pop()
                    coming.append((workers.submit(self._block, start, buffers, source), buffers))
                if not coming:
                    return
                done, buffers = coming.popleft()
                yield done.result()
                free.append(buffers)

    def _buffers(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Room for some rows as stored and as computed: the same where the dtypes are."""
        stored, compute = np.dtype(self.dtype.numpy()), self.terms[0].left.dtype
        narrow = np.empty((rows, self.matrix_shape[1]), stored)
        # Not by a cast: what happens to lie there may be no number, and casting it warns.
        return narrow, narrow if stored == compute else np.empty(narrow.shape, compute)

    def _block(
        self, start: int, buffers: tuple[np.ndarray, np.ndarray], source: np.ndarray | None
    ) -> np.ndarray:
        """The merged rows from ``start`` on, in the first of the buffers."""
        count = min(len(buffers[0]), self.matrix_shape[0] - start)
        block, sums = buffers[0][:count], buffers[1][:count]
        if source is None:
            _read(self.base, start * block.shape[1] * block.dtype.itemsize, block)
        else:
            block[...] = source[start : start + count]
        touched = [t for t in self.terms if t.rows[0] < start + count and start < t.rows[1]]
        if not touched:
            return block
        # Each thread has a state of its own; what is infinite is found by overflows().
        with np.errstate(over="ignore", invalid="ignore"):
            if sums.dtype != block.dtype:
                np.copyto(sums, block, casting="unsafe")
            for term in touched:
                _add(sums, start, term)
            if sums.dtype != block.dtype:
                np.copyto(block, sums, casting="unsafe")
        return block


def _add(sums: np.ndarray, start: int, term: Term) -> None:
    """Add a term to the rows of the matrix that begin at ``start``, in place."""
    first, last = max(start, term.rows[0]), min(start + len(sums), term.rows[1])
    left = term.left[first - term.rows[0] : last - term.rows[0]]
    target = sums[first - start : last - start, term.columns[0] : term.columns[1]]
    rank, width = term.right.shape
    if rank > _THIN or not left.size:
        target += left @ term.right
        return
    # Few rows at a time: what the product writes is in the nearest cache when it is added. BLAS could add
    # in one go, but importing scipy for it costs more than it saves below some gigabytes.
    step = _MULTIPLICATIONS // (_HEIGHT * rank)
    product = np.empty((min(_HEIGHT, len(left)), width), sums.dtype)
    for row in range(0, len(left), _HEIGHT):
        part = left[row : row + _HEIGHT]
        for column in range(0, width, step):
            columns = slice(column, column + step)
            np.matmul(part, term.right[:, columns], out=product[: len(part), columns])
        target[row : row + _HEIGHT] += product[: len(part)]


def _read(tensor: ir.TensorProtocol, at: int, block: np.ndarray) -> None:
    """Fill a block with bytes of a mapped tensor from ``at`` on.

    Read, not mapped: no page faults, and no pages that count as this process's memory.
    """
    if not isinstance(tensor, MappedTensor):
        raise TypeError(f"'{tensor.name}' is not mapped")
    room = block.reshape(-1).view(np.uint8).data
    at += tensor.offset or 0
    while room:
        done = os.preadv(tensor.file.fd, [room], at)
        if done == 0:
            raise OSError(f"{tensor.file.path} has become shorter")
        room, at = room[done:], at + done


def norm_of(tensor: ir.TensorProtocol, shape: tuple[int, int]) -> tuple[float, bool]:
    """Frobenius norm of a tensor, and whether it is an estimate from evenly spaced rows."""
    rows, columns = shape
    with borrow(tensor) as array:
        matrix = array.reshape(shape)
        sampled = rows * columns > 1 << 20 and rows > _SAMPLE
        step = rows // _SAMPLE if sampled else 1
        total, count = 0.0, 0
        for start in range(0, rows, step if sampled else max(1, _BLOCK // max(1, columns))):
            stop = start + 1 if sampled else start + max(1, _BLOCK // max(1, columns))
            part = np.asarray(matrix[start:stop], dtype=np.float64).reshape(-1)
            total += float(np.dot(part, part))
            count += part.size
        del array, matrix
    return math.sqrt(total * (rows * columns / max(1, count))), sampled


def term_for(left: np.ndarray, right: np.ndarray, first: tuple[int, int], in_axis: int, into: int) -> Term:
    """The term of a delta ``left @ right`` ``[out, in]`` on some output channels, as the file stores them.

    Args:
        left: ``[out, r]``.
        right: ``[r, in]``.
        first: the output channels, as a half-open range.
        in_axis: axis of the stored matrix that is the input.
        into: number of inputs.
    """
    if in_axis == 1:
        return Term(first, (0, into), np.ascontiguousarray(left), np.ascontiguousarray(right))
    return Term((0, into), first, np.ascontiguousarray(right.T), np.ascontiguousarray(left.T))

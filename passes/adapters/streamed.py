"""A merged weight that is computed as it is written: base plus the product of thin factors.

Nothing the size of the weight is kept. A block of the base is read from its file, the product is added
to it in the processor's cache, and the block goes to the output, so that merging costs about what
copying the file does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
import onnx_ir as ir
from scipy.linalg.blas import dgemm, sgemm

from effic.ir.mapped import MappedTensor
from effic.ir.tensors import borrow

# Weights per block: with the buffers, about a 1 MiB second-level cache.
_BLOCK = 1 << 17

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
        return math.sqrt(max(0.0, float(np.sum((left.T @ left) * (right @ right.T)))))


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
        stored = np.dtype(self.dtype.numpy())
        compute = self.terms[0].left.dtype
        wide = np.empty((step, columns), compute)
        narrow = wide if stored == compute else np.empty((step, columns), stored)
        for start, block in _rows(self.base, self.matrix_shape, narrow):
            touched = [t for t in self.terms if t.rows[0] < start + len(block) and start < t.rows[1]]
            if not touched:
                yield block
                continue
            sums = wide[: len(block)]
            if sums.dtype != block.dtype:
                np.copyto(sums, block, casting="unsafe")
            for term in touched:
                _add(sums, start, term)
            if sums.dtype != block.dtype:
                np.copyto(block, sums, casting="unsafe")
            yield block


def _add(sums: np.ndarray, start: int, term: Term) -> None:
    """Add a term to the rows of the matrix that begin at ``start``, in place."""
    first, last = max(start, term.rows[0]), min(start + len(sums), term.rows[1])
    left = term.left[first - term.rows[0] : last - term.rows[0]]
    target = sums[first - start : last - start, term.columns[0] : term.columns[1]]
    if not target.flags.c_contiguous:
        target += left @ term.right
        return
    # BLAS counts columns first: the transposed block is a contiguous matrix to it, updated in one pass.
    gemm = sgemm if sums.dtype == np.float32 else dgemm
    gemm(1.0, term.right.T, left.T, beta=1.0, c=target.T, overwrite_c=True)


def _rows(
    tensor: ir.TensorProtocol, shape: tuple[int, int], buffer: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a tensor, copied into ``buffer`` some at a time, with the number of the first."""
    rows, columns = shape
    if isinstance(tensor, MappedTensor) and hasattr(os, "preadv"):
        # Read, not mapped: no page faults, and no pages that count as this process's memory.
        row_bytes = columns * buffer.dtype.itemsize
        for start in range(0, rows, len(buffer)):
            block = buffer[: min(len(buffer), rows - start)]
            room = memoryview(block.reshape(-1).view(np.uint8))
            at = (tensor.offset or 0) + start * row_bytes
            while room:
                done = os.preadv(tensor.file.fd, [room], at)
                if done == 0:
                    raise OSError(f"{tensor.file.path} has become shorter")
                room, at = room[done:], at + done
            yield start, block
        return
    with borrow(tensor) as array:
        matrix = array.reshape(shape)
        for start in range(0, rows, len(buffer)):
            block = buffer[: min(len(buffer), rows - start)]
            block[...] = matrix[start : start + len(block)]
            yield start, block
        del array, matrix


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

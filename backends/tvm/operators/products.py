"""What products on kernels have in common, whatever the weight and the target."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tvm import relax

from effic.backends.tvm.kernels.dense import DenseMatMul
from effic.backends.tvm.kernels.open_rows import CODED_SIZES, SIZES, OpenRows
from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of
from effic.backends.tvm.operators.encoded import as_matrix
from effic.ir.encodings import Encoding

OPEN_ROWS = 16
"""What is chosen by the number of rows is chosen for so many where that is open."""


class Rows(NamedTuple):
    """The batch dimensions of an activation, and their product; both may be open."""

    lead: tuple[Any, ...]
    count: Any

    @property
    def is_open(self) -> bool:
        """Whether the number of rows is known at run time only."""
        return not isinstance(self.count, int)

    @property
    def typical(self) -> int:
        """The number of rows, or what stands for it when a kernel is chosen."""
        return OPEN_ROWS if self.is_open else int(self.count)


def rows_of(x: Any) -> Rows | None:
    """The rows of an activation, None where it has no last axis of known length."""
    shape = shape_of(x)
    if not shape or not isinstance(shape[-1], int):
        return None
    return Rows(shape[:-1], math.prod(shape[:-1]))


def run_kernel(lowering: Lowering, spec: Any, x: Any, packed: list[Any], rows: Rows) -> Any:
    """Call a kernel of ``[M, K]`` and ``[M, N]`` on activations of any shape, fp16 through fp32.

    Where the number of rows is open, ``spec`` is made for several numbers of them.
    """
    kind = dtype_of(x)
    if kind != "float32":
        x = lowering.emit(relax.op.astype(x, "float32"))
    whole = len(rows.lead) == 1
    flat = x if whole else lowering.emit(relax.op.reshape(x, (rows.count, spec.k)))
    kernel = spec
    if rows.is_open:
        sizes = SIZES if isinstance(spec, DenseMatMul) else CODED_SIZES
        kernel = OpenRows(replace(spec, m=None).name, lambda m: replace(spec, m=m), sizes)
    y = lowering.call(kernel, [flat, *packed], (rows.count, spec.n), "float32")
    if not whole:
        y = lowering.emit(relax.op.reshape(y, (*rows.lead, spec.n)))
    return y if kind == "float32" else lowering.emit(relax.op.astype(y, kind))


def per_group(spec: Any, values: np.ndarray, encoding: Encoding, k_axis: int) -> np.ndarray:
    """Scales or zero points as ``[N, groups]`` (oc) or ``[K, groups]`` (ic).

    Args:
        spec: of a kernel, with ``n`` and ``grouping``.
        values: as the encoding has them.
        k_axis: the axis of the weight that is multiplied.
    """
    if values.ndim == 0:
        return np.broadcast_to(values, (spec.n, 1))
    if values.ndim == 1:
        return values.reshape(-1, 1)
    channels_first = k_axis == (0 if spec.grouping == "ic" else 1)
    return values if channels_first else values.T


def read_form(encoding: Encoding, k_axis: int) -> tuple[Any, int, bool, int] | None:
    """Grouping, group size, whether symmetric, and bits, as the specs of kernels have them.

    None where the codes are no matrix.
    """
    if not as_matrix(encoding):
        return None
    along_k = encoding.axis == k_axis
    if encoding.block_size:
        outputs = encoding.shape[encoding.axis]
        group = -1 if encoding.block_size >= outputs else encoding.block_size
        grouping = "oc" if along_k else "ic"
    elif encoding.scales.ndim:
        # Per channel: the axis numbers the channels.
        group, grouping = -1, "ic" if along_k else "oc"
    else:
        group, grouping = -1, "oc"
    symmetric = encoding.zero_points is None and encoding.codes.dtype.is_signed()
    bits = next(width for width in (2, 3, 4, 8) if encoding.bits <= width)
    return grouping, group, symmetric, bits

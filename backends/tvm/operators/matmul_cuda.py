"""MatMul and Gemm with a weight in codes, or in the pattern 2:4, on effic's kernels for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.ort.linear import Linear
from effic.backends.ort.scenes import EncodedInput, encoded_input
from effic.backends.tvm.kernels.quantized_cuda import CudaQuantizedMatMul
from effic.backends.tvm.kernels.sparse_cuda import CudaSparseMatMul, is_two_of_four
from effic.backends.tvm.lowering import Lowering, dtype_of
from effic.backends.tvm.operators.encoded import fingerprint
from effic.backends.tvm.operators.products import Rows, per_group, read_form, rows_of
from effic.ir.compressed import recognise_compressed
from effic.ir.encodings import code_values
from effic.ir.model import constant_tensor
from effic.ir.tensors import borrow

# An opaque kernel is never fused with its neighbours.
_OPAQUE = 8
# What is looked at first: most weights that are not 2:4 show it here.
_FIRST_ROWS = 8

_KINDS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def product_on_gpu(
    lowering: Lowering, x: Any, right: ir.Value | None, linear: Linear, tail: Any
) -> Any | None:
    """The product of activations with a weight in codes or in the pattern 2:4; None where no kernel holds it.

    Args:
        lowering: for a GPU.
        x: the activations.
        right: the weight.
        linear: what is computed.
        tail: the bias that can be taken along, see :mod:`.matmul`.
    """
    rows, dtype = rows_of(x), dtype_of(x)
    if rows is None or rows.is_open or 0 in rows.lead or right is None or dtype not in _KINDS:
        return None
    weight = encoded_input(right)
    if weight is not None:
        return _on_codes(lowering, x, rows, weight, linear, tail)
    return _on_pairs(lowering, x, rows, right, linear, tail)


def _on_codes(
    lowering: Lowering,
    x: Any,
    rows: Rows,
    weight: EncodedInput,
    linear: Linear,
    tail: Any,
) -> Any | None:
    encoding = weight.encoding
    k_axis = int(weight.transposed) ^ int(linear.transposed)
    form = read_form(encoding, k_axis)
    if form is None or encoding.outliers is not None or encoding.dtype not in _KINDS.values():
        return None
    grouping, group, symmetric, bits = form
    k, n = encoding.shape[k_axis], encoding.shape[1 - k_axis]
    dtype: Any = dtype_of(x)
    spec = CudaQuantizedMatMul(rows.count, k, n, bits, group, grouping, symmetric, dtype)
    if spec.why_not() is not None:
        return None
    tail.read(n, activations=False)
    bias = tail.bias
    spec = CudaQuantizedMatMul(rows.count, k, n, bits, group, grouping, symmetric, dtype, bias is not None)

    def pack() -> list[np.ndarray]:
        codes = code_values(encoding)
        scales = per_group(spec, encoding.scales, encoding, k_axis).astype(np.float32)
        zeros = encoding.zero_points
        points = None if zeros is None else per_group(spec, zeros, encoding, k_axis)
        return spec.pack(codes if k_axis == 0 else codes.T, scales * np.float32(linear.alpha), points, bias)

    key = (
        "cuda codes",
        fingerprint(weight.value),
        k_axis,
        linear.alpha,
        tail.key if tail.bias is not None else (),
    )
    packed = lowering.weights(key, weight.name, pack)
    return tail.finish(_run(lowering, spec, x, packed, rows.lead))


def _on_pairs(
    lowering: Lowering,
    x: Any,
    rows: Rows,
    right: ir.Value,
    linear: Linear,
    tail: Any,
) -> Any | None:
    dtype: Any = dtype_of(x)
    found = _plain_matrix(right)
    if found is None or found[0] is not _KINDS[dtype]:
        return None
    _, shape, reading = found
    turn = linear.transposed
    with reading() as array:
        matrix = array.T if turn else array
        if not (is_two_of_four(matrix[:_FIRST_ROWS]) and is_two_of_four(matrix)):
            return None
    k, n = (shape[1], shape[0]) if turn else shape
    tail.read(n, activations=False)
    bias = tail.bias
    spec = CudaSparseMatMul(rows.count, k, n, dtype, bias is not None)

    def pack() -> list[np.ndarray]:
        with reading() as array:
            matrix = array.T if turn else array
            return spec.pack(matrix if linear.alpha == 1 else matrix * matrix.dtype.type(linear.alpha), bias)

    key = ("cuda pairs", fingerprint(right), dtype, turn, linear.alpha, tail.key if bias is not None else ())
    packed = lowering.weights(key, right.name or "weight", pack)
    return tail.finish(_run(lowering, spec, x, packed, rows.lead))


def _plain_matrix(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...], Callable[[], Any]] | None:
    """Type and shape of a constant or compressed matrix, and a context that gives its array."""
    tensor = constant_tensor(value)
    if tensor is None:
        compressed = recognise_compressed(value)
        if compressed is None:
            return None
        tensor = compressed.tensor()
    shape = tuple(tensor.shape.numpy())
    if len(shape) != 2 or 0 in shape or tensor.dtype is None:
        return None

    @contextmanager
    def reading() -> Iterator[np.ndarray]:
        with borrow(tensor) as array:
            yield array

    return tensor.dtype, shape, reading


def _run(lowering: Lowering, spec: Any, x: Any, packed: Sequence[Any], lead: tuple[int, ...]) -> Any:
    """Call a kernel of ``[M, K]`` and ``[M, N]`` on activations of any shape."""
    flat = x if len(lead) == 1 else lowering.emit(relax.op.reshape(x, (spec.m, spec.k)))
    lowering.called.append(spec.name)
    found = lowering.shared.kernels.get(spec.name)
    if found is None:
        function = spec.cuda_func(lowering.options["arch"]).with_attr("op_pattern", _OPAQUE)
        found = lowering.shared.kernels[spec.name] = lowering.bb.add_func(function, spec.name)
    out = relax.TensorType((spec.m, spec.n), spec.dtype)
    y = lowering.emit(relax.call_tir(found, [flat, *packed], out))
    return y if len(lead) == 1 else lowering.emit(relax.op.reshape(y, (*lead, spec.n)))

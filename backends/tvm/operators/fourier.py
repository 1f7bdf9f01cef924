"""Fourier transforms as products with a constant matrix, computed in double precision while the model is built.

n numbers that become m take ``n * m`` multiplications: right for the lengths that audio models use, slower than
a fast transform for long signals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of

_MOST = 1 << 22
"""Numbers that a matrix may have."""


def dft(lowering: Lowering, node: ir.Node) -> None:
    """DFT of real or complex numbers, inverse and one-sided too, along one axis of a fixed size."""
    x = lowering.tensor(node.inputs[0])
    shape, emit = shape_of(x), lowering.emit
    inverse, onesided = (bool(node.attributes.get_int(name, 0)) for name in ("inverse", "onesided"))
    old = (node.version or lowering.opset) < 20
    axis = node.attributes.get_int("axis", 1) if old else _number(lowering, node, 2, -2)
    axis += len(shape) if axis < 0 else 0
    if not all(isinstance(size, int) for size in shape):
        lowering.refuse(node, "transforms a tensor of a size that is left open; pin it with shapes")
    half = inverse and onesided
    length = _number(lowering, node, 1, 2 * (shape[axis] - 1) if half else shape[axis])
    last = len(shape) - 1
    order = [i for i in range(last) if i != axis] + [axis, last]
    kept = [shape[i] for i in order[:-2]]
    rows = emit(relax.op.reshape(emit(relax.op.permute_dims(x, order)), [-1, shape[axis] * shape[last]]))
    matrix = _matrix(shape[axis], length, shape[last], inverse, onesided)
    y = _product(lowering, node, rows, matrix)
    parts = 1 if half else 2
    y = emit(relax.op.reshape(y, [*kept, matrix.shape[1] // parts, parts]))
    back = [order.index(i) for i in range(len(shape))]
    lowering.set(node.outputs[0], relax.op.permute_dims(y, back))


def stft(lowering: Lowering, node: ir.Node) -> None:
    """STFT: the transform of every frame of a signal, the window in the matrix."""
    x = lowering.tensor(node.inputs[0])
    shape, emit = shape_of(x), lowering.emit
    if len(shape) == 2:
        shape = (*shape, 1)
    batch, size, parts = shape
    if not (isinstance(size, int) and isinstance(parts, int) and isinstance(batch, int)):
        lowering.refuse(node, "transforms a signal of a size that is left open; pin it with shapes")
    window = node.inputs[2] if len(node.inputs) > 2 else None
    factors = None if window is None else lowering.array(window)
    if window is not None and factors is None:
        lowering.refuse(node, "takes its window from the inputs' values")
    step = _number(lowering, node, 1, 0)
    length = _number(lowering, node, 3, size if factors is None else len(factors))
    if step < 1 or not 0 < length <= size or (factors is not None and len(factors) != length):
        lowering.refuse(node, f"cuts frames of {length} numbers, {step} apart, from {size} numbers")
    frames = 1 + (size - length) // step
    at = (np.arange(frames)[:, None] * step + np.arange(length)).reshape(-1)
    signal = emit(relax.op.reshape(x, [batch, size, parts]))
    places = lowering.weight(("frames", size, length, step), "frames", lambda: at.astype(np.int64))
    cut = emit(relax.op.take(signal, places, 1, mode="clip"))
    rows = emit(relax.op.reshape(cut, [batch * frames, length * parts]))
    matrix = _matrix(length, length, parts, False, bool(node.attributes.get_int("onesided", 1)))
    if factors is not None:
        matrix = matrix * np.repeat(factors.astype(np.float64), parts)[:, None]
    y = _product(lowering, node, rows, matrix)
    lowering.set(node.outputs[0], relax.op.reshape(y, [batch, frames, matrix.shape[1] // 2, 2]))


def _matrix(size: int, length: int, parts: int, inverse: bool, onesided: bool) -> np.ndarray:
    """What a row of ``size`` numbers, each of ``parts`` (real, imaginary), is multiplied with.

    A signal is cut or filled up with zeros to ``length``. The columns are numbers of two parts, of one where
    half a spectrum becomes a real signal.

    Returns:
        float64 ``[size * parts, columns]``.
    """
    unit = np.eye(size, dtype=np.complex128)
    if inverse and onesided:
        found = np.stack([np.fft.irfft(unit * factor, length, axis=1) for factor in (1, 1j)[:parts]], 1)
        return found.reshape(size * parts, -1)
    function = np.fft.ifft if inverse else np.fft.fft
    spectrum = function(unit, length, axis=1)
    if onesided:
        spectrum = spectrum[:, : length // 2 + 1]
    both = np.stack([spectrum * factor for factor in (1, 1j)[:parts]], 1)
    return np.stack([both.real, both.imag], -1).reshape(size * parts, -1)


def _product(lowering: Lowering, node: ir.Node, rows: Any, matrix: np.ndarray) -> Any:
    if matrix.size > _MOST:
        lowering.refuse(
            node, f"transforms {matrix.shape[0]} numbers at once, which a matrix is too large for"
        )
    dtype = dtype_of(rows)
    name = f"fourier_{matrix.shape[0]}_{matrix.shape[1]}"
    weight = lowering.weight(("fourier", node.name, name), name, lambda: matrix.astype(dtype))
    return lowering.emit(relax.op.matmul(rows, weight))


def _number(lowering: Lowering, node: ir.Node, index: int, default: int) -> int:
    """A constant input of one number."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return default
    array = lowering.array(value)
    if array is None:
        lowering.refuse(node, f"takes '{value.name}' from the inputs' values")
    return int(array.reshape(-1)[0])

"""Weights in groups along the output channels, as ONNX Runtime's kernels can run them.

A group is ``g`` output channels of one input channel, so its scale belongs to an input channel and
can be moved to the activations: for the ``j``-th ``g`` columns of ``W``, with codes ``C`` and zero
points ``z``,

    x @ W[:, j] = (x * s[j]) @ C[:, j] - x @ (z[j] * s[j])

That is a product with bare integers, which every integer kernel can do, and one number per row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import Layout, block_codes, block_size, kernel_bits
from effic.backends.ort.linear import read_linear
from effic.backends.ort.scenes import EncodedInput
from effic.ir.encodings import Encoding, pack, unpack

Form = Literal["split", "prefill", "exact"]

TYPICAL_ROWS: dict[Form, int] = {"split": 1, "prefill": 16, "exact": 1}
"""Rows of activations a form is meant for, where the model does not say how many there are."""


@dataclasses.dataclass(frozen=True, eq=False)
class InputGroups:
    """An encoding whose groups run along the output channels.

    Attributes:
        encoding: the encoding, of a matrix.
        k_axis: axis of its codes that numbers the input channels.
        size: output channels per group, at most all of them; the last group may be short.
    """

    encoding: Encoding
    k_axis: int
    size: int

    @property
    def inputs(self) -> int:
        """K."""
        return self.encoding.shape[self.k_axis]

    @property
    def outputs(self) -> int:
        """N."""
        return self.encoding.shape[1 - self.k_axis]

    @property
    def starts(self) -> range:
        """The first output channel of each group."""
        return range(0, self.outputs, self.size)

    @property
    def count(self) -> int:
        """G."""
        return len(self.starts)

    def width(self, start: int) -> int:
        """Output channels of the group that begins at ``start``."""
        return min(self.size, self.outputs - start)

    def scales(self) -> np.ndarray:
        """Scale of each group and input channel, float32 ``[G, K]``."""
        return self._rows(self.encoding.scales)

    def zeros(self, half: int) -> np.ndarray | None:
        """Zero points as float32 ``[G, K]``, or None when all are zero.

        Args:
            half: what is taken off unsigned codes to make them signed.
        """
        encoding = self.encoding
        offset = 0 if encoding.codes.dtype.is_signed() else half
        if encoding.zero_points is None:
            return np.full((self.count, self.inputs), -offset, np.float32) if offset else None
        rows = self._rows(encoding.zero_points) - np.float32(offset)
        return rows if rows.any() else None

    def _rows(self, values: np.ndarray) -> np.ndarray:
        if values.ndim == 2 and self.k_axis == 0:
            values = values.T
        return np.ascontiguousarray(values.reshape(self.count, self.inputs), np.float32)


def read_groups(encoding: Encoding, k_axis: int) -> InputGroups | None:
    """The encoding as groups along the output channels, or None where it is not that.

    Args:
        encoding: of a weight.
        k_axis: axis of its codes that numbers the input channels.
    """
    matrix = len(encoding.codes.shape) == 2 and tuple(encoding.codes.shape) == encoding.shape
    if not matrix or encoding.outliers is not None or 0 in encoding.shape:
        return None
    outputs = encoding.shape[1 - k_axis]
    if encoding.block_size:
        if encoding.axis == k_axis:
            return None
        return InputGroups(encoding, k_axis, min(encoding.block_size, outputs))
    if encoding.scales.ndim == 1 and encoding.axis == k_axis:
        return InputGroups(encoding, k_axis, outputs)
    return None


def groups_of_linear(node: ir.Node, weight: EncodedInput) -> InputGroups | None:
    """The groups along the output channels that a MatMul's or Gemm's right operand is encoded in, if so."""
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    return read_groups(weight.encoding, int(weight.transposed) ^ int(read_linear(node).transposed))


def why_no_kernel(groups: InputGroups, form: Form, level: int) -> str | None:
    """Why no kernel multiplies with these codes fast, as a phrase, or None."""
    kind = groups.encoding.dtype
    if kind not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the kernels compute in fp32 and fp16, not in {kind.name}"
    if form == "split":
        bits = kernel_bits(groups.encoding, groups.inputs, groups.inputs, level)
        return bits if isinstance(bits, str) else None
    return None


def group_layout(groups: InputGroups, start: int, level: int) -> Layout:
    """How a group's codes become blocks of ``MatMulNBits``: the largest there are, for no scale changes
    along the input channels any more.

    Args:
        groups: for which :func:`why_no_kernel` knows no reason.
        start: the group's first output channel.
        level: the kernel's accuracy level.
    """
    bits, inputs = kernel_bits(groups.encoding, groups.inputs, groups.inputs, level), groups.inputs
    assert isinstance(bits, int)
    block = block_size(inputs, inputs, bits)
    assert block is not None
    return Layout(bits, block, inputs, inputs, groups.width(start), groups.k_axis)


def group_blocks(groups: InputGroups, start: int, layout: Layout) -> np.ndarray:
    """A group's codes in block layout: uint8 ``[g, blocks, block_bytes]``, unsigned."""
    return block_codes(_part(groups, start), layout)


def group_matrix(groups: InputGroups, start: int) -> ir.TensorProtocol:
    """A group's codes as a signed matrix ``[K, g]`` of their stored width; unsigned ones less half the range."""
    part = _part(groups, start)
    kind = part.dtype
    signed = signed_type(kind)
    rows, columns = part.shape.numpy()
    values = unpack(np.frombuffer(part.tobytes(), np.uint8), kind, rows * columns).reshape(rows, columns)
    if groups.k_axis == 1:
        values = np.ascontiguousarray(values.T)
    if kind != signed:
        values = (values.astype(np.int16) - (1 << (kind.bitwidth - 1))).astype(np.int8)
    if signed.bitwidth == 8:
        return ir.Tensor(np.ascontiguousarray(values).view(np.int8))
    return ir.PackedTensor(pack(values, signed), signed, shape=ir.Shape(values.shape))


def signed_type(kind: ir.DataType) -> ir.DataType:
    """The signed integer type of the same width."""
    return {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}[kind.bitwidth]


def _part(groups: InputGroups, start: int) -> ir.TensorProtocol:
    """The codes of one group, as the whole is stored."""
    codes, width = groups.encoding.codes, groups.width(start)
    if groups.count == 1:
        return codes
    rows, columns = codes.shape.numpy()
    bits = codes.dtype.bitwidth
    raw = np.frombuffer(codes.tobytes(), np.uint8)
    axis = 1 - groups.k_axis
    shape = (width, columns) if axis == 0 else (rows, width)
    # Whole bytes are cut out as they are; elsewhere the codes are unpacked first.
    if axis == 0 and columns * bits % 8 == 0:
        part = raw.reshape(rows, -1)[start : start + width]
    elif axis == 1 and all(n * bits % 8 == 0 for n in (columns, start, width)):
        part = raw.reshape(rows, -1)[:, start * bits // 8 : (start + width) * bits // 8]
    else:
        values = unpack(raw, codes.dtype, rows * columns).reshape(rows, columns)
        values = values[start : start + width] if axis == 0 else values[:, start : start + width]
        part = pack(values, codes.dtype)
    part = np.ascontiguousarray(part).reshape(-1)
    if bits == 8:
        return ir.Tensor(part.view(codes.dtype.numpy()).reshape(shape), dtype=codes.dtype)
    return ir.PackedTensor(part, codes.dtype, shape=ir.Shape(shape))


# -- what it costs ----------------------------------------------------------------------------------

# Nanoseconds of one thread with AVX512-VNNI, fitted to chains of 256² to 2048² matrices with 1 to 64
# groups and 1, 16 and 128 rows (`python -m benchmarks.input_group_forms`): per weight; per weight and
# row of x. They scale with the processor; what is decided on is their ratio.
_PER_WEIGHT = {
    "fp32": (0.31, 0.0175),
    "split": (0.02, 0.0139),
    # Fitted to 1 and 16 rows; with more it gains on fp32 again, and never catches up.
    "split0": (0.12, 0.036),
    "prefill": (0.06, 0.0055),
}
# Starting a node; and, per group, the activations once more: scaled, and rounded again to 8 bits.
_PER_NODE = 1500.0
_PER_SCALE = 2.0
_PER_ACTIVATION = {"split": 0.85, "split0": 0.42, "prefill": 0.85}


def speed(groups: InputGroups, form: Form, level: int, rows: int) -> float:
    """How many times as fast as the decoded weight a form is expected to be.

    Args:
        groups: the weight.
        form: ``"split"`` or ``"prefill"``.
        level: accuracy level of the n-bit kernels.
        rows: of the activations.
    """
    weights = groups.inputs * groups.outputs
    kind = "split0" if form == "split" and level < 4 else form

    def product(name: str) -> float:
        fixed, per_row = _PER_WEIGHT[name]
        return _PER_NODE + weights * (fixed + per_row * rows)

    group = 2 * _PER_NODE + groups.inputs * (_PER_SCALE + _PER_ACTIVATION[kind] * rows)
    return product("fp32") / (product(kind) + groups.count * group)

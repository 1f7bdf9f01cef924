"""The block layout of ONNX Runtime's n-bit kernels: planning it, and moving codes into it.

``MatMulNBits`` wants the weight of ``y = x @ W`` as ``[N, blocks, bytes]``: one row per output
channel, cut into blocks along the input channels, low bits first, unsigned codes. An encoding holds
the codes as the graph stores the weight: ``[K, N]`` for a MatMul, ``[N, K]`` behind a Transpose.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import Encoding, pack, unpack

BLOCK_SIZES: dict[int, tuple[int, ...]] = {
    2: (32, 64, 128),
    4: (16, 32, 64, 128, 256),
    8: (16, 32, 64, 128, 256),
}
"""Blocks the kernels take, by bits. 2 bits with 16 or 256 load, but decode the weight at every call."""

INT8_ACTIVATIONS = 4
"""The accuracy level whose kernels round activations to 8 bits; every level below computes in fp32."""

# A tile of the transposition and its temporary fit into a core's L2 cache (1 MiB) together.
_TILE_ROWS = 2048
_TILE_WORDS = 64

_MASKS = {2: 0x33333333, 4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an encoding becomes blocks.

    Attributes:
        bits: width of the codes the kernel sees: 2, 4 or 8.
        block: codes per block, a power of two.
        group: codes that share a scale in the encoding; a multiple of ``block``, or the whole row.
        inputs, outputs: K and N.
        k_axis: axis of the stored codes that numbers the input channels.
    """

    bits: int
    block: int
    group: int
    inputs: int
    outputs: int
    k_axis: int

    @property
    def blocks(self) -> int:
        """Blocks per output channel; the last one may be short."""
        return -(-self.inputs // self.block)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block * self.bits // 8


def rows_of_groups(encoding: Encoding, k_axis: int) -> int | str:
    """Codes of one output channel that share a scale, or why the encoding is no such thing.

    Args:
        encoding: of a weight.
        k_axis: axis of its codes that numbers the input channels.
    """
    if encoding.outliers is not None:
        return "it keeps single weights (outliers) beside the codes"
    if len(encoding.codes.shape) != 2 or tuple(encoding.codes.shape) != encoding.shape:
        return "it is no matrix of codes"
    if encoding.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the kernels compute in fp32 and fp16, not in {encoding.dtype.name}"
    inputs = encoding.shape[k_axis]
    if 0 in encoding.shape:
        return "it is empty"
    per_input_channel = (
        "its groups run along the output channels, the kernels' blocks along the input channels"
    )
    if encoding.block_size:
        return min(encoding.block_size, inputs) if encoding.axis == k_axis else per_input_channel
    return per_input_channel if encoding.scales.ndim == 1 and encoding.axis == k_axis else inputs


def plan(encoding: Encoding, k_axis: int, level: int) -> Layout | str:
    """The layout an encoding runs fastest in, or why ``MatMulNBits`` cannot run it fast.

    Args:
        encoding: of a 2-D weight.
        k_axis: axis of its codes that numbers the input channels.
        level: the kernel's accuracy level; below 4 only the 4-bit kernels are fast.
    """
    group = rows_of_groups(encoding, k_axis)
    if isinstance(group, str):
        return group
    inputs, outputs = encoding.shape[k_axis], encoding.shape[1 - k_axis]
    bits = kernel_bits(encoding, group, inputs, level)
    if isinstance(bits, str):
        return bits
    block = block_size(group, inputs, bits)
    if block is None:
        return f"blocks have 16, 32, 64, 128 or 256 codes, and none of these divides its groups of {group}"
    return Layout(bits, block, group, inputs, outputs, k_axis)


def kernel_bits(encoding: Encoding, group: int, inputs: int, level: int) -> int | str:
    """Width of the codes the fastest kernel takes, or why there is none.

    Args:
        encoding: of a weight.
        group: codes along the input channels that share a scale.
        inputs: K.
        level: the kernel's accuracy level.
    """
    bits = 4 if encoding.stored_bits <= 4 else 8
    if bits == 8 and level != INT8_ACTIVATIONS:
        return f"at accuracy level {level} the runtime has a fast kernel for 4-bit codes only"
    narrow = level == INT8_ACTIVATIONS and encoding.bits <= 2
    if narrow and block_size(group, inputs, 2) and _fits_2_bits(encoding):
        return 2
    return bits


def block_size(group: int, inputs: int, bits: int) -> int | None:
    """The largest block the kernels take that keeps every block inside one group, or None."""
    sizes = BLOCK_SIZES[bits]
    if group >= inputs:
        return next((size for size in sizes if size >= inputs), sizes[-1])
    return next((size for size in reversed(sizes) if group % size == 0), None)


def block_codes(codes: ir.TensorProtocol, layout: Layout) -> np.ndarray:
    """Codes in block layout: uint8 ``[N, blocks, block_bytes]``, unsigned, the last block padded.

    Args:
        codes: 2-D, as the encoding stores them.
        layout: that :func:`plan` made for the encoding.
    """
    packed = _packed_rows(codes, layout.bits)
    if layout.k_axis == 0:
        packed = transpose_codes(packed, layout.outputs, layout.bits)
    if codes.dtype.is_signed():
        # Two's complement to offset binary: flip the sign bit of every code.
        signs = np.uint8(0xFF // ((1 << layout.bits) - 1) << (layout.bits - 1))
        packed = np.bitwise_xor(packed, signs, out=packed if packed.flags.writeable else None)
    row = layout.blocks * layout.block_bytes
    if packed.shape[1] < row:
        packed = np.pad(packed, ((0, 0), (0, row - packed.shape[1])))
    return np.ascontiguousarray(packed[:, :row]).reshape(layout.outputs, layout.blocks, layout.block_bytes)


def block_scales(encoding: Encoding, layout: Layout) -> np.ndarray:
    """Scales ``[N, blocks]`` in the weight's dtype, repeated where a group has several blocks."""
    return _per_block(encoding.scales, encoding, layout)


def block_zero_points(encoding: Encoding, layout: Layout) -> np.ndarray | None:
    """Zero points as unsigned values, uint8 ``[N, blocks]``; None when all are the kernel's default."""
    half = 1 << (layout.bits - 1)
    offset = half if encoding.codes.dtype.is_signed() else 0
    if encoding.zero_points is None:
        if offset:
            return None
        return np.zeros((layout.outputs, layout.blocks), np.uint8)
    values = (encoding.zero_points.astype(np.int16) + offset).astype(np.uint8)
    values = _per_block(values, encoding, layout)
    return None if bool(np.all(values == half)) else values


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values ``[rows, n]`` to bytes ``[rows, ceil(n * bits / 8)]``, each row by itself."""
    per_byte = 8 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    dtype = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
    return pack(values, dtype).reshape(values.shape[0], -1)


def transpose_codes(packed: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """Transpose a matrix of packed codes without unpacking it.

    32 bits of a row hold ``32 / bits`` codes. As many rows make a square of codes, which is turned
    over by swapping halves, quarters and so on, for all squares of a tile at once; then the words
    themselves change places.

    Args:
        packed: uint8 ``[rows, ceil(columns * bits / 8)]``, low bits first, each row padded to bytes.
        columns: codes per row.
        bits: 2, 4 or 8.

    Returns:
        uint8 ``[columns, bytes]``, rows padded with zeros to a multiple of four bytes.
    """
    rows, width = packed.shape
    side = 32 // bits
    if rows % side or width % 4 or not packed.flags.c_contiguous:
        packed = np.pad(packed, ((0, -rows % side), (0, -width % 4)))
        rows, width = packed.shape
    source = packed.view("<u4")
    words = source.shape[1]
    out = np.empty((words, side, rows // side), "<u4")
    tile = np.empty(_TILE_ROWS * _TILE_WORDS, "<u4")
    spare = np.empty(tile.size // 2, "<u4")
    for left in range(0, words, _TILE_WORDS):
        for top in range(0, rows, _TILE_ROWS):
            part = source[top : top + _TILE_ROWS, left : left + _TILE_WORDS]
            high, wide = part.shape[0] // side, part.shape[1]
            planes = tile[: part.size].reshape(side, high, wide)
            np.copyto(planes, part.reshape(high, side, wide).transpose(1, 0, 2))
            _turn_squares(planes.reshape(side, high * wide), spare, bits)
            out[left : left + wide, :, top // side : top // side + high] = planes.transpose(2, 0, 1)
    return out.view(np.uint8).reshape(words * side, -1)[:columns]


def _turn_squares(planes: np.ndarray, spare: np.ndarray, bits: int) -> None:
    """Transpose squares of codes in place; ``planes[i]`` holds row ``i`` of every square."""
    side = planes.shape[0]
    half = side // 2
    while half:
        shift, mask = np.uint32(half * bits), np.uint32(_MASKS[half * bits])
        pairs = planes.reshape(side // (2 * half), 2, -1)
        low, high = pairs[:, 0], pairs[:, 1]
        moved = spare[: low.size].reshape(low.shape)
        # Exchange the upper half of `low` with the lower half of `high` (Hacker's Delight, 7-3).
        np.right_shift(low, shift, out=moved)
        np.bitwise_xor(moved, high, out=moved)
        np.bitwise_and(moved, mask, out=moved)
        np.bitwise_xor(high, moved, out=high)
        np.left_shift(moved, shift, out=moved)
        np.bitwise_xor(low, moved, out=low)
        half //= 2


def _per_block(values: np.ndarray, encoding: Encoding, layout: Layout) -> np.ndarray:
    shape = (layout.outputs, layout.blocks)
    if encoding.block_size:
        rows = values if layout.k_axis == 1 else values.T
        places = np.arange(layout.blocks) * layout.block // encoding.block_size
        return np.ascontiguousarray(rows[:, places])
    return np.ascontiguousarray(np.broadcast_to(values.reshape(-1, 1), shape))


def _packed_rows(codes: ir.TensorProtocol, bits: int) -> np.ndarray:
    """Codes as stored, ``bits`` wide, each row padded to whole bytes: uint8 ``[rows, bytes]``."""
    rows, columns = codes.shape.numpy()
    raw = np.frombuffer(codes.tobytes(), np.uint8)
    if codes.dtype.bitwidth == bits and columns * bits % 8 == 0:
        return raw.reshape(rows, -1)
    values = unpack(raw, codes.dtype, rows * columns).reshape(rows, columns)
    return pack_rows(values.view(np.uint8) & np.uint8((1 << bits) - 1), bits)


def _fits_2_bits(encoding: Encoding) -> bool:
    """Whether codes and zero points declared as 2-bit are: the declaration is only metadata."""
    if encoding.stored_bits == 2:
        return True
    raw = np.frombuffer(encoding.codes.tobytes(), np.uint8)
    values = unpack(raw, encoding.codes.dtype, encoding.elements)
    low, high = (-2, 1) if encoding.codes.dtype.is_signed() else (0, 3)
    parts = [values] if encoding.zero_points is None else [values, encoding.zero_points]
    return all(part.size == 0 or (int(part.min()) >= low and int(part.max()) <= high) for part in parts)

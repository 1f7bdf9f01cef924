"""2:4 weights in 4 bits as ``MatMulNBits`` blocks that the runtime makes when it loads the file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import Layout, block_codes
from effic.backends.ort.scenes import EncodedInput, graph_of, put_named
from effic.ir.compressed import COMPRESSED_KEY, Compressed, lookup_table
from effic.ir.model import Model, constant_tensor

_TABLE = "nm_blocks"


def lookup_blocks(
    model: Model, weight: EncodedInput, layout: Layout, zeros: np.ndarray | None
) -> ir.Value | None:
    """Blocks ``[N, blocks, bytes]`` as a look-up of whole 2:4 groups, two bytes each.

    Three bits per weight in the file; the runtime folds the look-up when it loads it.

    Args:
        model: the model.
        weight: the encoded weight.
        layout: of its blocks.
        zeros: zero points by block, one per byte, or None.

    Returns:
        The value, or None where the weight is not compressed so that its groups are those of the blocks.
    """
    compressed = weight.encoding.compressed
    if compressed is None or layout.bits != 4 or layout.inputs % layout.block:
        return None
    sources = _sources(compressed)
    if sources is None:
        return None
    codes, values = (constant_tensor(source) for source in sources)
    if codes is None or values is None or 4 * codes.size != layout.inputs * layout.outputs:
        return None
    signed = weight.encoding.codes.dtype.is_signed()
    table = block_table(signed)
    shape = (layout.outputs, layout.blocks, layout.block_bytes)
    shift = None
    if not signed and weight.encoding.zero_points is not None and zeros is not None:
        # The same zero point in both halves of every byte of the block.
        shift = (zeros * np.uint8(0x11))[:, :, None]
    numbers = codes.numpy().astype(np.int32) * 256 + values.numpy()
    blocks = table[numbers.reshape(-1)].reshape(shape)
    if shift is not None:
        blocks ^= shift
    # Groups may run the other way, or be shifted by zero points that lie otherwise: what counts is the result.
    if not np.array_equal(blocks, block_codes(weight.encoding.codes, layout)):
        return None
    return _write(model, weight, compressed, sources, table, shape, shift)


def block_table(signed: bool) -> np.ndarray:
    """All 2:4 groups as two bytes of blocks: uint8 ``[16 · 256, 2]``.

    Args:
        signed: codes are two's complement, which the kernel wants moved up by eight.
    """
    groups = lookup_table(ir.DataType.UINT4)
    if signed:
        groups = groups ^ 8
    return np.asarray(groups[:, 0::2] | groups[:, 1::2] << np.uint8(4))


def _sources(compressed: Compressed) -> tuple[ir.Value, ir.Value] | None:
    """The constants of codes and of values that groups are looked up by."""
    if compressed.core.op_type != "Gather":
        return None
    index = compressed.core.inputs[1]
    sums = index.producer() if index is not None else None
    if sums is None or sums.op_type != "Add":
        return None
    found = []
    for value in sums.inputs:
        # Through the Mul of the codes, and the Cast of both.
        while value is not None and value.producer() is not None and constant_tensor(value) is None:
            value = value.producer().inputs[0]  # type: ignore[union-attr]
        if value is not None:
            found.append(value)
    return (found[0], found[1]) if len(found) == 2 else None


def _write(
    model: Model,
    weight: EncodedInput,
    compressed: Compressed,
    sources: tuple[ir.Value, ir.Value],
    table: np.ndarray,
    shape: tuple[int, ...],
    shift: np.ndarray | None,
) -> ir.Value:
    before, name = weight.dequantize, weight.name
    graph, int32 = graph_of(before), int(ir.DataType.INT32)
    high, low = (put_named(model, f"{name}.nm_numbers", before, "Cast", [s], to=int32) for s in sources)
    width = _shared(model, graph, f"{_TABLE}_bytes", np.array(256, np.int32))
    high = put_named(model, f"{name}.nm_rows", before, "Mul", [high, width])
    index = put_named(model, f"{name}.nm_index", before, "Add", [high, low])
    groups = _shared(model, graph, f"{_TABLE}_{'unsigned' if table[0, 0] == 0 else 'signed'}", table)
    value = put_named(model, f"{name}.nm_spread", before, "Gather", [groups, index], axis=0)
    value.producer().metadata_props[COMPRESSED_KEY] = compressed.core.metadata_props.get(COMPRESSED_KEY, "{}")  # type: ignore[union-attr]
    target = model.add_initializer(graph, f"{name}.block_shape", np.array(shape, np.int64))
    value = put_named(model, f"{name}.nm_blocks", before, "Reshape", [value, target])
    if shift is not None:
        points = model.add_initializer(graph, f"{name}.block_shift", shift)
        value = put_named(model, f"{name}.nm_shifted", before, "BitwiseXor", [value, points])
    value.type, value.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(shape)
    return value


def _shared(model: Model, graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant that all weights of a graph share."""
    known = graph.initializers.get(name)
    if (
        known is not None
        and (tensor := known.const_value) is not None
        and np.array_equal(tensor.numpy(), array)
    ):
        return known
    return model.add_initializer(graph, name, array)

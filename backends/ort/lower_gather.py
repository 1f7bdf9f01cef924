"""Embedding look-ups on ONNX Runtime's GatherBlockQuantized: decode the rows that are read, no more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effic.backends.ort.block_store import Blocks, add_scales
from effic.backends.ort.blocks import pack_rows, rows_of_groups
from effic.backends.ort.scenes import (
    MICROSOFT,
    EncodedInput,
    copy_note,
    graph_of,
    import_domain,
    put,
    put_named,
    remove_unread,
    statically_quantized,
    take_over,
)
from effic.ir.encodings import Encoding, pack, unpack
from effic.ir.model import Model
from effic.passes.base import Remarks

_LEAST_BLOCK = 16


def lower_gather(
    model: Model, node: ir.Node, weight: EncodedInput, shared: Blocks | None, remarks: Remarks
) -> None:
    """Replace ``Gather(DequantizeLinear(table), ids)``, or leave a remark.

    Args:
        model: the model.
        node: the Gather.
        weight: its table.
        shared: blocks a MatMul already has of the same table (tied embeddings).
        remarks: gets one entry.
    """
    if reason := _why_not(node, weight):
        remarks.missed(node, f"no kernel looks rows up in its compressed table '{weight.name}': {reason}")
        return
    source, encoding, read = weight.dequantize, weight.encoding, node.inputs[0]
    result = None if shared is None else _from_blocks(model, node, weight, shared)
    how = "sharing the blocks of the MatMul that is tied to it"
    if result is None:
        block = _block(encoding)
        if block is None:
            remarks.missed(
                node, f"no kernel looks rows up in groups of {encoding.group_size}: use a multiple of 16"
            )
            return
        result = _from_rows(model, node, weight, block)
        how = f"blocks of {block}"
    lookup = result.producer()
    if lookup is not None and lookup.op_type == "GatherBlockQuantized":
        copy_note(source, lookup)
    take_over(model, node, result)
    remove_unread([step for step in (read.producer() if read is not None else None,) if step is not None])
    remarks.passed(
        node,
        f"GatherBlockQuantized, {encoding.stored_bits} bits, {how}: decodes the rows it reads",
        bits=encoding.bits,
    )


def _why_not(node: ir.Node, weight: EncodedInput) -> str | None:
    if statically_quantized(node):
        return "its result is quantized again: left for the runtime to fuse"
    axis = node.attributes.get("axis")
    if weight.transposed:
        return "it is transposed first"
    if axis is not None and (axis.is_ref() or axis.as_int() not in (0, -2)):
        return "it looks up columns, the kernel looks up rows"
    # Rows are output channels: the same shape of groups as a linear layer's [N, K].
    group = rows_of_groups(weight.encoding, 1)
    return group if isinstance(group, str) else None


def _block(encoding: Encoding) -> int | None:
    """Codes per block of the kernel: any power of two from 16 that keeps blocks inside groups."""
    columns = encoding.shape[1]
    group = encoding.block_size or columns
    if group >= columns:
        return max(_LEAST_BLOCK, 1 << (columns - 1).bit_length())
    block = group & -group
    return block if block >= _LEAST_BLOCK else None


def _from_rows(model: Model, node: ir.Node, weight: EncodedInput, block: int) -> ir.Value:
    """Look up in the table's own rows of codes, in blocks of ``block``."""
    encoding, before = weight.encoding, weight.dequantize
    graph, stored = graph_of(before), before.inputs[0]
    scales = _per_block(encoding.scales, encoding, block)
    zeros = None if encoding.zero_points is None else _per_block(encoding.zero_points, encoding, block)
    kind = encoding.codes.dtype
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": 4}
    points: ir.TensorProtocol | None = None
    if encoding.stored_bits == 4 and stored is not None:
        # The kernel takes 4-bit types as they are; there zero is the default zero point.
        codes = stored
        if zeros is not None:
            points = model.scratch.packed("zeros", pack(zeros, kind), kind, zeros.shape)
    else:
        attributes["bits"], rows, zeros = _unsigned_rows(encoding, zeros, scales.shape)
        codes = model.add_initializer(graph, f"{weight.name}.rows", rows)
        if zeros is not None:
            points = model.scratch.tensor("zeros", pack_rows(zeros, attributes["bits"]))
    zero_value = (
        None if points is None else model.add_initializer(graph, f"{weight.name}.row_zero_points", points)
    )
    inputs = [codes, node.inputs[1], add_scales(model, before, weight.name, scales), zero_value]
    new = put(node, "GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, like=node)
    import_domain(model, new)
    return new.outputs[0]


def _unsigned_rows(
    encoding: Encoding, zeros: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[int, np.ndarray, np.ndarray | None]:
    """Bits, codes and zero points as uint8, where the default zero point is ``2 ** (bits - 1)``.

    Args:
        encoding: with 2- or 8-bit codes.
        zeros: its zero points per block.
        shape: of scales and zero points.
    """
    rows, columns = encoding.shape
    # Rows must be whole bytes; 2-bit rows that are not are widened.
    bits = encoding.stored_bits if columns * encoding.stored_bits % 8 == 0 else 8
    half = 1 << (bits - 1)
    raw = np.frombuffer(encoding.codes.tobytes(), np.uint8)
    values = unpack(raw, encoding.codes.dtype, rows * columns).reshape(rows, columns)
    if not encoding.codes.dtype.is_signed():
        return bits, pack_rows(values, bits), np.zeros(shape, np.uint8) if zeros is None else zeros
    # Adding half modulo 256 takes signed to unsigned for every width.
    shifted = values.view(np.uint8) + np.uint8(half)
    return bits, pack_rows(shifted, bits), None if zeros is None else zeros.view(np.uint8) + np.uint8(half)


def _per_block(values: np.ndarray, encoding: Encoding, block: int) -> np.ndarray:
    """Scales or zero points as ``[rows, blocks]``."""
    rows, columns = encoding.shape
    blocks = np.arange(-(-columns // block))
    if not encoding.block_size:
        return np.ascontiguousarray(np.broadcast_to(values.reshape(-1, 1), (rows, blocks.size)))
    return np.ascontiguousarray(values[:, blocks * block // encoding.block_size])


def _from_blocks(model: Model, node: ir.Node, weight: EncodedInput, shared: Blocks) -> ir.Value | None:
    """Look up in the blocks of a tied MatMul, ``[rows, blocks, bytes]``, then join the blocks."""
    layout, ids = shared.layout, node.inputs[1]
    if layout.inputs % layout.block or ids is None or ids.shape is None:
        return None
    before = weight.dequantize
    graph, name = graph_of(before), weight.name
    cube = np.array([layout.outputs, layout.blocks, 1], np.int64)
    shape = model.add_initializer(graph, f"{name}.lookup_shape", cube)
    scales = put_named(model, f"{name}.lookup_scales", before, "Reshape", [shared.scales, shape])
    zeros = None
    if shared.zeros is not None:
        # One zero point per byte: the kernel packs along the last axis, which has length one here.
        zeros = model.add_initializer(graph, f"{name}.lookup_zero_points", shared.zeros[:, :, None])
    inputs = [shared.codes, ids, scales, zeros]
    attributes = {"gather_axis": 0, "quantize_axis": 2, "block_size": layout.block, "bits": layout.bits}
    lookup = put(node, "GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, like=node)
    import_domain(model, lookup)
    copy_note(before, lookup)
    rows = lookup.outputs[0]
    rows.name = model.unique_name(f"{name}.row_blocks")
    whole_rows = np.array([0] * len(ids.shape) + [layout.inputs], np.int64)
    joined = model.add_initializer(graph, f"{name}.row_shape", whole_rows)
    return put(node, "Reshape", [rows, joined]).outputs[0]

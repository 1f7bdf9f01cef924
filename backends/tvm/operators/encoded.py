"""Weights in codes: as parameters, and decoded by a kernel at every call where no product takes the codes.

Nothing is decoded while the model is built. A weight that only products read which have kernels for codes
is never decoded at all; see :mod:`effic.backends.tvm.operators.matmul`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from effic.backends.ort.scenes import encoded_input
from effic.backends.tvm.lowering import Lowering, relax_dtype, shape_of, why_no_type
from effic.ir.compressed import COMPRESSED_KEY, recognise_compressed
from effic.ir.encodings import Encoding, code_values
from effic.ir.errors import UnsupportedError
from effic.ir.model import ONNX_DOMAINS, constant_tensor

_PER_BYTE = {8: 1, 4: 2, 2: 4}


def fingerprint(value: ir.Value) -> tuple[int, ...]:
    """What an encoded or compressed weight is made of: identities of its constants, the same in every bucket.

    Tensors live as long as the model, and clones of the model share them.
    """
    found: list[int] = []
    todo, seen = [value], set()
    while todo:
        current = todo.pop()
        tensor = constant_tensor(current)
        if tensor is not None:
            found.append(id(tensor))
            continue
        node = current.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [one for one in node.inputs if one is not None]
    return tuple(found)


def decodes_weight(node: ir.Node) -> bool:
    """Whether a node is a step on the way from constants to a weight, which is taken when the weight is read."""
    if node.domain not in ONNX_DOMAINS or len(node.outputs) != 1:
        return False
    if node.op_type in ("DequantizeLinear", "Reshape", "ScatterElements", "Transpose", "Identity"):
        weight = encoded_input(node.outputs[0])
        if weight is not None:
            return True
    return False


def compressed_steps(graph: ir.Graph) -> dict[ir.Node, None]:
    """The nodes that decompress N:M weights."""
    found: dict[ir.Node, None] = {}
    if not any(COMPRESSED_KEY in node.metadata_props for node in graph):
        return found
    for node in graph:
        for value in node.outputs:
            compressed = recognise_compressed(value)
            if compressed is not None:
                found.update(dict.fromkeys(compressed.nodes))
    return found


def decoded(lowering: Lowering, value: ir.Value) -> Any | None:
    """The plain weight behind a value that :func:`decodes_weight`'s nodes make, None for any other value."""
    weight = encoded_input(value)
    if weight is not None:
        plain = _decode(lowering, weight.value, weight.encoding, weight.name)
        return lowering.emit(relax.op.permute_dims(plain, [1, 0])) if weight.transposed else plain
    compressed = recognise_compressed(value)
    if compressed is None:
        return None
    if (reason := why_no_type(compressed.dtype)) is not None:
        raise UnsupportedError(f"the weight '{compressed.weight or value.name}' {reason}")
    # No product with this pattern has a kernel: the zeros are stored.
    name = compressed.weight or value.name or "weight"
    return lowering.weight(("dense", *fingerprint(value)), name, lambda: compressed.dense().numpy())


@dataclass(frozen=True)
class Codes:
    """Codes and their scales as parameters: what a kernel decodes elements from.

    Attributes:
        codes: uint8 of the codes' shape, with ``ceil(last / per_byte)`` on the last axis.
        scales: of the shape that the encoding has; fp32, or the weight's dtype.
        zeros: as ``scales``, int8 or uint8, or None.
    """

    encoding: Encoding
    codes: Any
    scales: Any
    zeros: Any | None

    @property
    def arguments(self) -> list[Any]:
        """The parameters, in the order that :meth:`element` takes their tensors."""
        return [one for one in (self.codes, self.scales, self.zeros) if one is not None]

    def element(self, tensors: Sequence[Any], at: Sequence[Any]) -> Any:
        """The decoded element of the codes' tensor at a position, as a TE expression in fp32."""
        encoding = self.encoding
        bits = _stored_width(encoding)
        per_byte = _PER_BYTE[bits]
        last: Any = at[-1] if at else None
        if per_byte == 1:
            code = tensors[0](*at)
        else:
            byte = tensors[0](*at[:-1], last // per_byte)
            shift = tirx.Cast("uint8", (last % per_byte) * bits)
            code = tirx.bitwise_and(tirx.shift_right(byte, shift), tirx.const((1 << bits) - 1, "uint8"))
        number = tirx.Cast("int32", code)
        if encoding.codes.dtype.is_signed():
            # Stored with the sign bit turned, so that all codes are unsigned.
            number = number - (1 << (bits - 1))
        where = _group(encoding, at)
        if self.zeros is not None:
            number = number - tirx.Cast("int32", tensors[2](*where))
        return tirx.Cast("float32", number) * tirx.Cast("float32", tensors[1](*where))


def codes_of(lowering: Lowering, value: ir.Value, encoding: Encoding, name: str) -> Codes:
    """The codes of an encoding as parameters, packed.

    Raises:
        UnsupportedError: the weight's element type cannot be computed with.
    """
    if (reason := why_no_type(encoding.dtype)) is not None:
        raise UnsupportedError(f"the weight '{name}' {reason}")
    key = fingerprint(value)
    codes = lowering.weight(("codes", *key), f"{name}.codes", lambda: _packed(encoding))
    scales = lowering.weight(("scales", *key), f"{name}.scales", lambda: np.asarray(encoding.scales))
    zeros = None
    if encoding.zero_points is not None:
        points = encoding.zero_points
        zeros = lowering.weight(("zeros", *key), f"{name}.zero_points", lambda: points)
    return Codes(encoding, codes, scales, zeros)


def gather_rows(lowering: Lowering, weight: ir.Value, encoding: Encoding, name: str, ids: Any) -> Any:
    """Rows of an encoded matrix, decoded: ``[*ids, D]`` for a weight ``[V, D]`` without outliers.

    An index below zero counts from the end, as ONNX has it; one past the end reads the last row.
    """
    codes = codes_of(lowering, weight, encoding, name)
    rows, width = encoding.shape
    lead = shape_of(ids)

    def compute(ids: Any, *tensors: Any) -> Any:
        def row(*at: Any) -> Any:
            index = tirx.Cast("int64", ids(*at[:-1]))
            index = tirx.Select(index < 0, index + rows, index)
            index = tirx.max(tirx.min(index, tirx.const(rows - 1, "int64")), tirx.const(0, "int64"))
            return tirx.Cast(relax_dtype(encoding.dtype), codes.element(tensors, (index, at[-1])))

        return te.compute((*lead, width), row, name="gather_decoded")

    return lowering.bb.emit_te(compute, ids, *codes.arguments, primfunc_name_hint="gather_decoded")


def _decode(lowering: Lowering, value: ir.Value, encoding: Encoding, name: str) -> Any:
    codes = codes_of(lowering, value, encoding, name)
    dtype = relax_dtype(encoding.dtype)

    def compute(*tensors: Any) -> Any:
        return te.compute(
            encoding.codes.shape.numpy(),
            lambda *at: tirx.Cast(dtype, codes.element(tensors, at)),
            name="decoded",
        )

    plain = lowering.bb.emit_te(compute, *codes.arguments, primfunc_name_hint="decode")
    if encoding.outliers is not None:
        key = fingerprint(value)
        exact = encoding.outliers
        places = lowering.weight(
            ("places", *key), f"{name}.outlier_indices", lambda: exact.indices.astype(np.int64)
        )
        values = lowering.weight(("exact", *key), f"{name}.outlier_values", lambda: exact.values)
        flat = lowering.emit(relax.op.reshape(plain, (encoding.elements,)))
        plain = lowering.emit(relax.op.scatter_elements(flat, places, values, axis=0))
    if shape_of(plain) != encoding.shape:
        plain = lowering.emit(relax.op.reshape(plain, encoding.shape))
    return plain


def _stored_width(encoding: Encoding) -> int:
    # One byte per code where there is no last axis to pack along.
    return encoding.stored_bits if encoding.codes.shape.rank() else 8


def _packed(encoding: Encoding) -> np.ndarray:
    """Codes as unsigned numbers, several to a byte along the last axis, the first one lowest."""
    bits = _stored_width(encoding)
    values = code_values(encoding)
    unsigned = values.view(np.uint8)
    if encoding.codes.dtype.is_signed():
        unsigned = (unsigned + np.uint8(1 << (bits - 1))) & np.uint8((1 << bits) - 1)
    per_byte = _PER_BYTE[bits]
    if per_byte == 1:
        return np.ascontiguousarray(unsigned)
    missing = -unsigned.shape[-1] % per_byte
    if missing:
        unsigned = np.pad(unsigned, [(0, 0)] * (unsigned.ndim - 1) + [(0, missing)])
    packed = unsigned[..., ::per_byte].copy()
    for position in range(1, per_byte):
        packed |= unsigned[..., position::per_byte] << np.uint8(position * bits)
    return packed


def _group(encoding: Encoding, at: Sequence[Any]) -> tuple[Any, ...]:
    """Where the scale of the element at a position is."""
    if encoding.block_size:
        axis = encoding.axis
        return (*at[:axis], at[axis] // encoding.block_size, *at[axis + 1 :])
    return (at[encoding.axis],) if encoding.scales.ndim else ()


def as_matrix(encoding: Encoding) -> bool:
    """Whether the codes are the matrix itself."""
    return (
        len(encoding.shape) == 2
        and tuple(encoding.codes.shape) == encoding.shape
        and math.prod(encoding.shape) > 0
    )

"""Compressed weights as plain ONNX: build them, recognise them, decode them.

An encoded weight is integer codes with a scale, and perhaps a zero point, per group of codes::

    codes ─> DequantizeLinear(scales, zero_points) [─> Reshape] ─> weight

and, where single weights are kept exact (outliers, as in EasyQuant, arXiv 2403.02775)::

    … ─> Reshape(-1) ─> ScatterElements(positions, values) ─> Reshape ─> weight

Only standard operators are used (blocked ``DequantizeLinear``: opset 21; 2-bit types: opset 25), so
any ONNX tool runs the result. The reshape comes after the dequantization because runtimes have no
kernels that move 4-bit elements. Outliers overwrite: the code below one is zero and what it decodes
to never counts.

There are no 3-bit types in ONNX, and no 2-bit ones before opset 25: such codes are stored in a wider
type, and the ``DequantizeLinear`` node carries the true width in its metadata, under
:data:`ENCODING_KEY`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.ir.compressed import Compressed, recognise_compressed
from effic.ir.errors import UnsupportedError
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, noted_text

ENCODING_KEY = "effic.encoding"
"""Key in the metadata of a DequantizeLinear node: JSON with bits, group_size, axis, symmetric, weight."""

CODE_TYPES = (
    ir.DataType.INT2,
    ir.DataType.UINT2,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
_SIGNED = (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# onnx releases whose files may hold these types: 4-bit since IR version 10, 2-bit since 13.
_IR_VERSION_4_BIT = 10
_IR_VERSION_2_BIT = 13
_OPSET_BLOCKED = 21
_OPSET_2_BIT = 25


@dataclasses.dataclass(frozen=True, eq=False)
class Outliers:
    """Weights that are stored exactly, beside the codes.

    Attributes:
        indices: int32 or int64 ``[n]``, positions in the flattened weight, ascending.
        values: ``[n]``, the weights there, in the weight's own dtype.
    """

    indices: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """A compressed weight.

    The codes lie as the graph stores the weight, or as its 2-D form (convolutions: the first axis
    by all others). ``weight = (codes - zero_points) * scales``, group by group, then the reshape to
    ``shape``, then the outliers.

    Attributes:
        codes: integer tensor, INT2 … UINT8; :func:`code_values` unpacks it.
        scales: float32, float16 or bfloat16, the dtype of the weight. Blocked: the shape of
            ``codes`` with ``ceil(dim / block_size)`` on ``axis``; per channel: ``[dim of axis]``;
            per tensor: ``[]``.
        zero_points: int8 or uint8 of the same shape, unpacked, or None for zero.
        axis: blocked: the axis of ``codes`` that blocks run along; per channel: the axis that
            numbers the channels (the two are *across* each other).
        block_size: codes per block along ``axis``; 0 for one scale per channel or tensor.
        bits: true width of a code; the storage type may be wider. Read from metadata, so whoever
            stores the codes in a narrower type must check that they fit.
        shape: the weight's shape.
        outliers: exact values, or None.
        weight: name the weight had before it was encoded, where known.
        compressed: how the codes are stored, where that is not one by one; ``codes`` are decompressed
            whenever they are read. Does not survive :func:`build`.
    """

    codes: ir.TensorProtocol
    scales: np.ndarray
    zero_points: np.ndarray | None
    axis: int
    block_size: int
    bits: int
    shape: tuple[int, ...]
    outliers: Outliers | None = None
    weight: str | None = None
    compressed: Compressed | None = None

    @property
    def symmetric(self) -> bool:
        """Whether code 0 stands for zero everywhere."""
        return self.zero_points is None

    @property
    def group_size(self) -> int:
        """Codes that share a scale; -1 when a scale covers a whole channel or tensor."""
        return self.block_size or -1

    @property
    def run_axis(self) -> int | None:
        """Axis of 2-D codes that groups run along; None when one scale covers the whole tensor.

        For codes of more axes a per-channel scale covers several; then the first is given.
        """
        if self.block_size:
            return self.axis
        if self.scales.ndim == 0:
            return None
        return 1 if self.axis == 0 else 0

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the decoded weight."""
        return ir.DataType.from_numpy(self.scales.dtype)

    @property
    def stored_bits(self) -> int:
        """Bits a code takes in the file."""
        return int(self.codes.dtype.bitwidth)

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def code_type(bits: int, symmetric: bool, opset: int) -> ir.DataType:
    """The narrowest ONNX type that holds ``bits``-bit codes at ``opset``."""
    if bits <= 2 and opset >= _OPSET_2_BIT:
        return ir.DataType.INT2 if symmetric else ir.DataType.UINT2
    if bits <= 4:
        return ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    return ir.DataType.INT8 if symmetric else ir.DataType.UINT8


# -- sizes ---------------------------------------------------------------------------------------


def stored_bytes(encoding: Encoding) -> int:
    """Bytes of the constants that hold the encoding in a file."""
    codes = encoding.codes.nbytes if encoding.compressed is None else encoding.compressed.nbytes
    total = codes + encoding.scales.nbytes
    if encoding.zero_points is not None:
        total += -(-encoding.zero_points.size * encoding.stored_bits // 8)
    if encoding.outliers is not None:
        total += encoding.outliers.indices.nbytes + encoding.outliers.values.nbytes
    return int(total)


def effective_bits(encoding: Encoding) -> float:
    """Bits per weight with everything counted: codes and zero points at their true width, scales,
    outliers. What 3-bit codes waste in 4-bit storage is left out; :func:`stored_bytes` has it."""
    codes = encoding.elements * encoding.bits
    if encoding.compressed is not None:
        codes = 8 * encoding.compressed.nbytes
    total = codes + encoding.scales.nbytes * 8
    if encoding.zero_points is not None:
        total += encoding.zero_points.size * encoding.bits
    if encoding.outliers is not None:
        total += 8 * (encoding.outliers.indices.nbytes + encoding.outliers.values.nbytes)
    return float(total / max(encoding.elements, 1))


# -- codes in memory -----------------------------------------------------------------------------


def pack(values: np.ndarray, dtype: ir.DataType, out: np.ndarray | None = None) -> np.ndarray:
    """Codes to the bytes ONNX stores: low bits first, the last byte filled with zeros.

    Args:
        values: int8 or uint8 array of any shape, within the range of ``dtype``.
        dtype: one of :data:`CODE_TYPES`.
        out: uint8 ``[bytes]`` to write to, instead of a new array.

    Returns:
        uint8 ``[ceil(size * bits / 8)]``.
    """
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    bits = dtype.bitwidth
    several: np.ndarray = flat
    if bits < 8:
        per_byte = 8 // bits
        if flat.size % per_byte:
            flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.uint8)])
        # Two (or four) codes as one number: contiguous arithmetic is several times faster than strides.
        if bits == 4:
            several = flat.view("<u2") & 0x0F0F
            several |= several >> 4
        else:
            several = flat.view("<u4") & 0x03030303
            several |= several >> 6
            several |= several >> 12
    if out is None:
        return several.astype(np.uint8)
    np.copyto(out, several, casting="unsafe")
    return out


def unpack(packed: np.ndarray, dtype: ir.DataType, count: int) -> np.ndarray:
    """The inverse of :func:`pack`: ``count`` codes as int8 (signed types) or uint8, flat."""
    signed = dtype in _SIGNED
    bits = dtype.bitwidth
    packed = packed.reshape(-1).view(np.uint8)
    if bits == 8:
        return packed[:count].view(np.int8 if signed else np.uint8)
    per_byte, mask = 8 // bits, (1 << bits) - 1
    out = np.empty(packed.size * per_byte, np.uint8)
    for position in range(per_byte):
        np.bitwise_and(packed >> (position * bits), mask, out=out[position::per_byte])
    out = out[:count]
    if signed:
        # Sign extension: flip the sign bit, then take it off again.
        half = 1 << (bits - 1)
        out ^= half
        values = out.view(np.int8)
        values -= half
        return values
    return out


def code_tensor(values: np.ndarray, dtype: ir.DataType) -> ir.TensorProtocol:
    """A tensor of codes from int8 or uint8 values, one per byte; see :func:`pack`."""
    if dtype.bitwidth == 8:
        return ir.Tensor(np.asarray(values, order="C"), dtype=dtype)
    return ir.PackedTensor(pack(values, dtype), dtype, shape=ir.Shape(values.shape))


def code_values(encoding: Encoding) -> np.ndarray:
    """The codes one per byte: int8 or uint8 array of the shape of ``encoding.codes``."""
    return _integers(encoding.codes)


def _integers(tensor: ir.TensorProtocol) -> np.ndarray:
    packed = np.frombuffer(tensor.tobytes(), dtype=np.uint8)
    shape = tensor.shape.numpy()
    return unpack(packed, tensor.dtype, math.prod(shape)).reshape(shape)


def decode(encoding: Encoding) -> np.ndarray:
    """The weight an encoding stands for, bit for bit what ``DequantizeLinear`` and the rest compute.

    Returns:
        Array of ``encoding.shape`` in the weight's dtype.
    """
    weight = dequantize(
        code_values(encoding), encoding.scales, encoding.zero_points, encoding.axis, encoding.block_size
    ).reshape(encoding.shape)
    if encoding.outliers is not None:
        weight.reshape(-1)[encoding.outliers.indices] = encoding.outliers.values
    return weight


def dequantize(
    codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, axis: int, block_size: int
) -> np.ndarray:
    """``(codes - zero_points) * scales`` as the ONNX operator means it.

    The difference is exact, the product is taken in float32 and rounded once to the dtype of
    ``scales``.

    Args:
        codes: int8 or uint8.
        scales: see :class:`Encoding`.
        zero_points: as ``scales``, or None.
        axis: see :class:`Encoding`.
        block_size: see :class:`Encoding`.

    Returns:
        New array of the shape of ``codes`` and the dtype of ``scales``.
    """
    out = codes.astype(np.float32)
    for values, operation in ((zero_points, np.subtract), (scales, np.multiply)):
        if values is None:
            continue
        parameters = values.astype(np.float32)
        if block_size == 0:
            if parameters.ndim == 1:
                parameters = parameters.reshape([-1 if i == axis else 1 for i in range(out.ndim)])
            operation(out, parameters, out=out)
            continue
        # Whole blocks at once through a view with an axis for the block; the short last one by itself.
        whole = out.shape[axis] // block_size
        head = out[_along(axis, 0, whole * block_size)]
        view = head.reshape(*out.shape[:axis], whole, block_size, *out.shape[axis + 1 :])
        operation(view, np.expand_dims(parameters[_along(axis, 0, whole)], axis + 1), out=view)
        tail = out[_along(axis, whole * block_size, None)]
        if tail.size:
            operation(tail, parameters[_along(axis, whole, None)], out=tail)
    return out if scales.dtype == np.float32 else out.astype(scales.dtype)


def _along(axis: int, start: int, stop: int | None) -> tuple[slice, ...]:
    return (*([slice(None)] * axis), slice(start, stop))


# -- to the graph --------------------------------------------------------------------------------


def build(
    model: Model,
    graph: ir.Graph,
    encoding: Encoding,
    name: str,
    *,
    axis_name: str | None = None,
    before: ir.Node | None = None,
) -> ir.Value:
    """Write an encoding into a graph as standard ONNX.

    Args:
        model: the model; its IR version is raised where a 2- or 4-bit type needs it.
        graph: the graph that gets the constants and the nodes. Opset 21 or later.
        encoding: what to write.
        name: the weight's name; the constants are called ``name.codes`` and so on.
        axis_name: ``"oc"`` or ``"ic"``, written to the metadata for readers.
        before: node of ``graph`` the new nodes are put before; the first node by default.

    Returns:
        The value of the decoded weight.

    Raises:
        UnsupportedError: the codes are of no integer type ONNX can dequantize.
    """
    if encoding.codes.dtype not in CODE_TYPES:
        raise UnsupportedError(
            f"weight '{name}' has codes of type {encoding.codes.dtype.name}; use INT2 to UINT8"
        )
    if encoding.codes.dtype.bitwidth < 8:
        least = _IR_VERSION_2_BIT if encoding.codes.dtype.bitwidth == 2 else _IR_VERSION_4_BIT
        model.ir.ir_version = max(model.ir.ir_version, least)
    writer = _Writer(model, graph, name)
    inputs = [writer.constant("codes", encoding.codes), writer.constant("scales", encoding.scales)]
    if encoding.zero_points is not None:
        inputs.append(writer.constant("zero_points", code_tensor(encoding.zero_points, encoding.codes.dtype)))
    attributes: dict[str, Any] = {}
    if encoding.scales.ndim:
        attributes["axis"] = encoding.axis
    if encoding.block_size:
        attributes["block_size"] = encoding.block_size
    shape = tuple(encoding.codes.shape.numpy())
    value = writer.node("DequantizeLinear", inputs, attributes, "dequantize", encoding.dtype, shape)
    notes = {
        "bits": encoding.bits,
        "group_size": encoding.group_size,
        "axis": axis_name,
        "symmetric": encoding.symmetric,
        "weight": name,
    }
    writer.nodes[0].metadata_props[ENCODING_KEY] = json.dumps(notes, separators=(",", ":"))
    if encoding.outliers is not None:
        flat = (math.prod(shape),)
        if shape != flat:
            value = writer.reshape(value, flat, "flat", encoding.dtype)
        places = writer.constant("outlier_indices", encoding.outliers.indices)
        values = writer.constant("outlier_values", encoding.outliers.values)
        value = writer.node(
            "ScatterElements", [value, places, values], {"axis": 0}, "outliers", encoding.dtype, flat
        )
        shape = flat
    if shape != encoding.shape:
        value = writer.reshape(value, encoding.shape, "reshape", encoding.dtype)
    writer.place(before)
    return value


class _Writer:
    """Collects the constants and nodes of one encoding."""

    def __init__(self, model: Model, graph: ir.Graph, name: str) -> None:
        self.model, self.graph, self.name = model, graph, name
        self.nodes: list[ir.Node] = []
        self.last_constant: ir.Node | None = None

    def constant(self, role: str, tensor: np.ndarray | ir.TensorProtocol) -> ir.Value:
        value = self.model.add_initializer(self.graph, f"{self.name}.{role}", tensor)
        # In a function body constants are nodes, each put at the front: the first one made is the
        # last in order.
        self.last_constant = self.last_constant or value.producer()
        return value

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, Any],
        role: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{self.name}.{role}")
        value = node.outputs[0]
        value.name = self.model.unique_name(f"{self.name}.{role}")
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.nodes.append(node)
        return value

    def reshape(self, value: ir.Value, shape: tuple[int, ...], role: str, dtype: ir.DataType) -> ir.Value:
        target = self.constant(f"{role}_shape", np.asarray(shape, np.int64))
        return self.node("Reshape", [value, target], {}, role, dtype, shape)

    def place(self, before: ir.Node | None) -> None:
        if before is not None and self.last_constant is None:
            self.graph.insert_before(before, self.nodes)
        elif self.last_constant is not None:
            self.graph.insert_after(self.last_constant, self.nodes)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], self.nodes)
        else:
            self.graph.extend(self.nodes)


# -- from the graph ------------------------------------------------------------------------------


def recognise(value: ir.Value | None) -> Encoding | None:
    """The encoding behind a value, whoever wrote it, or None.

    Args:
        value: what a node reads as its weight: the output of a ``DequantizeLinear`` of constants
            (blocked, per channel or per tensor), or of a Reshape, Identity or overwriting
            ScatterElements of constants behind one.
    """
    steps: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type == "DequantizeLinear":
            encoding = _read_dequantize(node)
            for step in reversed(steps):
                if encoding is None:
                    break
                encoding = (
                    _read_reshape(encoding, step)
                    if step.op_type == "Reshape"
                    else _read_scatter(encoding, step)
                )
            return encoding
        if node.op_type not in ("Reshape", "ScatterElements", "Identity"):
            return None
        if node.op_type != "Identity":
            steps.append(node)
        value = node.inputs[0]
    return None


def encoding_nodes(value: ir.Value) -> list[ir.Node]:
    """The nodes :func:`recognise` looks through, from the value up to the DequantizeLinear."""
    nodes: list[ir.Node] = []
    current: ir.Value | None = value
    while current is not None:
        node = current.producer()
        if node is None:
            break
        nodes.append(node)
        if node.op_type == "DequantizeLinear":
            break
        current = node.inputs[0]
    return nodes


def _read_dequantize(node: ir.Node) -> Encoding | None:
    if any(attribute.is_ref() for attribute in node.attributes.values()) or "output_dtype" in node.attributes:
        return None
    codes = constant_tensor(node.inputs[0])
    compressed = None if codes is not None else recognise_compressed(node.inputs[0])
    codes = codes if compressed is None else compressed.tensor()
    scale = _constant_through_cast(node.inputs[1])
    zero = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and zero is None:
        return None
    if codes is None or scale is None or codes.dtype not in CODE_TYPES:
        return None
    if zero is not None and (zero.dtype != codes.dtype or tuple(zero.shape) != scale.shape):
        return None
    shape = tuple(codes.shape.numpy())
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    zeros = None if zero is None else _integers(zero)
    axis += len(shape) if axis < 0 else 0
    single = scale.shape == (1,) and block == 0 and not (axis < len(shape) and shape[axis] == 1)
    if scale.ndim == 0 or single:
        # One element stands for the whole tensor, as a scalar or, in older files, as a vector.
        axis, block, scale = 0, 0, scale.reshape(())
        zeros = None if zeros is None else zeros.reshape(())
    else:
        if not 0 <= axis < len(shape) or block < 0:
            return None
        expected: tuple[int, ...] = (shape[axis],)
        if block:
            expected = (*shape[:axis], -(-shape[axis] // block), *shape[axis + 1 :])
        if scale.shape != expected:
            return None
    notes = _read_notes(node)
    bits = notes.get("bits")
    if not isinstance(bits, int) or not 1 <= bits <= codes.dtype.bitwidth:
        bits = int(codes.dtype.bitwidth)
    return Encoding(
        codes=codes,
        scales=scale,
        zero_points=zeros if zeros is not None and zeros.any() else None,
        axis=axis,
        block_size=block,
        bits=bits,
        shape=shape,
        weight=noted_text(notes.get("weight")),
        compressed=compressed,
    )


def _read_notes(node: ir.Node) -> dict[str, Any]:
    try:
        notes = json.loads(node.metadata_props.get(ENCODING_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _constant_through_cast(value: ir.Value | None) -> np.ndarray | None:
    """A constant float array, also when it is stored as fp16 and widened by a Cast."""
    tensor, to = constant_tensor(value), None
    node = value.producer() if value is not None else None
    if tensor is None and node is not None and node.op_type == "Cast" and node.domain in ONNX_DOMAINS:
        attribute = node.attributes.get("to")
        if attribute is None or attribute.is_ref():
            return None
        tensor, to = constant_tensor(node.inputs[0]), ir.DataType(attribute.as_int())
    if tensor is None or tensor.dtype not in _FLOATS or (to is not None and to not in _FLOATS):
        return None
    array = np.array(tensor.numpy())
    return array if to is None else array.astype(to.numpy())


def _read_reshape(encoding: Encoding, node: ir.Node) -> Encoding | None:
    target = constant_tensor(node.inputs[1])
    if target is None or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    shape = [int(d) for d in target.numpy().reshape(-1)]
    if not node.attributes.get_int("allowzero", 0):
        if any(d == 0 and i >= len(encoding.shape) for i, d in enumerate(shape)):
            return None
        shape = [encoding.shape[i] if d == 0 else d for i, d in enumerate(shape)]
    if shape.count(-1) == 1:
        rest = math.prod(d for d in shape if d != -1)
        if rest == 0 or encoding.elements % rest:
            return None
        shape[shape.index(-1)] = encoding.elements // rest
    if math.prod(shape) != encoding.elements or any(d < 0 for d in shape):
        return None
    return dataclasses.replace(encoding, shape=tuple(shape))


def _read_scatter(encoding: Encoding, node: ir.Node) -> Encoding | None:
    indices, values = constant_tensor(node.inputs[1]), constant_tensor(node.inputs[2])
    reduction = node.attributes.get("reduction")
    if reduction is not None and (reduction.is_ref() or reduction.as_string() != "none"):
        return None
    if indices is None or values is None or encoding.outliers is not None:
        return None
    # On a flat tensor the only axis is 0; elsewhere positions are not positions in the whole.
    if len(encoding.shape) != 1 or values.dtype != encoding.dtype or len(indices.shape) != 1:
        return None
    places = np.array(indices.numpy())
    if tuple(values.shape) != places.shape:
        return None
    if places.size and (places.min() < -encoding.elements or places.max() >= encoding.elements):
        return None
    places = np.where(places < 0, places + encoding.elements, places).astype(places.dtype)
    # Ascending, as they are written here, they differ; looking for equal ones takes much longer.
    if not (places[1:] > places[:-1]).all() and np.unique(places).size != places.size:
        # Which of two writes to one place wins is for the runtime to say.
        return None
    return dataclasses.replace(encoding, outliers=Outliers(places, np.array(values.numpy())))

"""Weights stored as the few values that are not zero and where they stand, as plain ONNX.

A sparse weight, or the codes of a quantized one, is spread out over zeros when the model is loaded::

    ScatterElements(Expand(0), Gather(table, Cast(codes)), values) ─> [Reshape ─> Slice] ─> Reshape [─> Transpose]

``values [units, kept]`` are the weights that are kept, ``codes [units]`` say which positions of the unit
they have, through a small ``table`` (or are the positions themselves). 4-bit values are widened to bytes
in between and narrowed at the end, since ONNX has no operators that move them; for 2:4 both values of a
group are one byte, which with the group's 4-bit code is looked up in a table of all the groups there are::

    Gather(lookup, Cast(codes) * 256 + Cast(bytes)) ─> Reshape … ─> Cast

Where a quantized zero is not code 0, codes are stored as their difference (exclusive or) from the zero
point, so that what is spread are zeros here as well::

    … ─> BitwiseXor(zero_points) ─> Cast ─> DequantizeLinear

Only standard operators are used (opset 21), all of them such as runtimes fold when they load a file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.errors import InvalidModelError
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, noted_text

COMPRESSED_KEY = "effic.compressed"
"""Key in the metadata of the node that spreads: JSON with the pattern, the weight's name and bits per weight."""

_STEPS = ("Cast", "BitwiseXor", "Reshape", "Slice", "Transpose", "Identity")
_CORES = ("ScatterElements", "Gather")
_COMPUTED = (*_STEPS, *_CORES, "Expand", "Mul", "Add")

_NARROW = {ir.DataType.INT4: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.UINT8}

# More nodes than any form has, and more axes than any tensor: what is larger is something else.
_NODES, _RANK = 32, 8

# 2:4 groups of 4-bit codes: values of a byte, and codes.
_LOOKUP_BYTES, _LOOKUP_CODES = 256, 16
_GROUPS = _LOOKUP_BYTES * _LOOKUP_CODES


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What is stored of a sparse tensor, and how it lies.

    Attributes:
        values: ``[units, kept]`` of the tensor's type; with ``table`` None and ``positions`` false UINT8
            ``[units]``, two 4-bit values of a 2:4 group in a byte, the first one low.
        codes: UINT4 or UINT8 ``[units]``; ``[units, kept]`` with ``positions``.
        table: int32 ``[codes, kept]``, positions by code; None with ``positions``, or where whole groups
            are looked up (2:4 in 4 bits: the code is ``i0 | i1 << 2``).
        positions: whether codes are positions in the unit already.
        unit: weights that are decoded together.
        dtype: element type of the result.
        shape: shape of the result.
        along: ``(A, C, B)``: the result's elements with groups along the axis of length C. Units fill
            vectors of C, in the order of A, B; the last of each may stick out.
        zero_points: value (of a constant), its axis and block size, where a quantized zero is not code 0;
            see :class:`effic.ir.encodings.Encoding`.
    """

    values: ir.TensorProtocol
    codes: ir.TensorProtocol
    table: np.ndarray | None
    positions: bool
    unit: int
    dtype: ir.DataType
    shape: tuple[int, ...]
    along: tuple[int, int, int]
    zero_points: tuple[ir.Value, int, int] | None = None

    @property
    def looked_up(self) -> bool:
        """Whether groups are looked up whole."""
        return self.table is None and not self.positions


@dataclasses.dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed tensor in a graph.

    Attributes:
        value: what it decompresses to.
        nodes: those that do it, in order from the value up.
        core: the one that spreads.
        dtype: element type of the value.
        shape: its shape.
        pattern: such as ``"2:4"``, or None where that is not noted.
        weight: name the weight had before, or None.
    """

    value: ir.Value
    nodes: tuple[ir.Node, ...]
    core: ir.Node
    dtype: ir.DataType
    shape: tuple[int, ...]
    pattern: str | None
    weight: str | None

    def tensor(self) -> ir.TensorProtocol:
        """The decompressed tensor, computed each time it is read."""
        # Planned now: the nodes may be gone when the tensor is read.
        dense = functools.partial(_dense, _plan(self.value), self.dtype, self.shape)
        return ir.LazyTensor(dense, self.dtype, ir.Shape(self.shape), name=self.value.name)

    def dense(self) -> ir.TensorProtocol:
        """The decompressed tensor, computed now."""
        return _dense(_plan(self.value), self.dtype, self.shape)

    def constants(self) -> list[ir.Value]:
        """The constants it is made of, each once."""
        found: dict[int, ir.Value] = {}
        for node in self.nodes:
            for value in node.inputs:
                if value is not None and constant_tensor(value) is not None:
                    found[id(value)] = value
        return list(found.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its constants in a file, without tables and what else others read (zero points)."""
        own = set(self.nodes)
        return sum(
            tensor.nbytes
            for value in self.constants()
            if (tensor := constant_tensor(value)) is not None
            and all(use.node in own and (use.node.op_type, use.idx) != ("Gather", 0) for use in value.uses())
        )

    def describe(self) -> str:
        """``2:4 sparse, compressed``."""
        return f"{self.pattern} sparse, compressed" if self.pattern else "sparse, compressed"


# -- to the graph --------------------------------------------------------------------------------


class Tables:
    """What the weights of a graph share: tables, and zeros to spread values over, which a runtime then
    holds once while it loads."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[tuple[int, bytes, str], ir.Value] = {}
        self._zeros: dict[tuple[int, ir.DataType, tuple[int, int]], ir.Value] = {}
        self._first: dict[int, ir.Node] = {}

    def first(self, graph: ir.Graph) -> ir.Node:
        """The node before which all that decompresses goes: the first that is no constant."""
        if id(graph) not in self._first:
            self._first[id(graph)] = next(node for node in graph if node.op_type != "Constant")
        return self._first[id(graph)]

    def zeros(
        self, graph: ir.Graph, dtype: ir.DataType, shape: tuple[int, int], target: ir.Value
    ) -> ir.Value:
        """A tensor of zeros of ``shape``, which ``target`` holds."""
        key = id(graph), dtype, shape
        if key not in self._zeros or self.model.is_function_body(graph):
            zero = self.constant(graph, f"nm_zero_{dtype.name.lower()}", np.zeros((), dtype.numpy()))
            node = ir.node("Expand", [zero, target])
            node.outputs[0].name = self.model.unique_name(f"nm_zeros_{shape[0]}x{shape[1]}")
            graph.insert_before(self.first(graph), node)
            self._zeros[key] = node.outputs[0]
        return self._zeros[key]

    def constant(self, graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
        """A constant of ``graph``, the one with the same contents if there is one."""
        if self.model.is_function_body(graph):
            # There constants are nodes, which have to stand before all that reads them.
            return self.model.add_initializer(graph, name, array)
        key = id(graph), array.tobytes(), f"{array.dtype}{array.shape}"
        if key not in self._known:
            self._known[key] = self.model.add_initializer(graph, name, array)
        return self._known[key]


def build(
    tables: Tables, parts: Parts, name: str, pattern: str, *, before: ir.Node, graph: ir.Graph
) -> ir.Value:
    """Write a compressed tensor into a graph.

    Args:
        tables: of the model.
        parts: what to write.
        name: the weight's name; the constants are called ``name.nm_values`` and so on.
        pattern: ``"2:4"``, for readers.
        before: node of ``graph`` the new nodes are put before.
        graph: gets the constants.

    Returns:
        The value of the whole tensor.
    """
    return _Writer(tables, graph, name, before).write(parts, pattern)


class _Writer:
    def __init__(self, tables: Tables, graph: ir.Graph, name: str, before: ir.Node) -> None:
        self.tables, self.graph, self.name, self.before = tables, graph, name, before
        self.model = tables.model

    def write(self, parts: Parts, pattern: str) -> ir.Value:
        wide = _NARROW.get(parts.dtype, parts.dtype)
        whole = self.looked_up(parts, wide) if parts.looked_up else self.scattered(parts, wide)
        core = whole.producer()
        if core is not None:
            notes = {"pattern": pattern, "weight": self.name}
            core.metadata_props[COMPRESSED_KEY] = json.dumps(notes, separators=(",", ":"))
        value = self.laid_out(whole, parts)
        if parts.zero_points is not None:
            value = self.shifted(value, parts, wide)
        if wide != parts.dtype:
            value = self.node("Cast", [value], "narrow", to=int(parts.dtype))
        # Those in between need none, and would take as much of a small file as the nodes themselves.
        value.type, value.shape = ir.TensorType(parts.dtype), ir.Shape(parts.shape)
        return value

    def scattered(self, parts: Parts, wide: ir.DataType) -> ir.Value:
        units = int(parts.values.shape[0])  # type: ignore[arg-type]
        values = self.constant("nm_values", parts.values)
        if wide != parts.dtype:
            values = self.node("Cast", [values], "nm_wide", to=int(wide))
        codes = self.constant("nm_codes", parts.codes)
        places = self.node("Cast", [codes], "nm_numbers", to=int(ir.DataType.INT32))
        if parts.table is not None:
            table = self.tables.constant(self.graph, f"nm_positions_{parts.unit}", parts.table)
            places = self.node("Gather", [table, places], "nm_positions", axis=0)
        shape = units, parts.unit
        base = self.tables.zeros(self.graph, wide, shape, self.shape_of(shape))
        return self.node("ScatterElements", [base, places, values], "nm_spread", axis=1)

    def looked_up(self, parts: Parts, wide: ir.DataType) -> ir.Value:
        table = lookup_table(parts.dtype).view(wide.numpy())
        lookup = self.tables.constant(self.graph, f"nm_groups_{wide.name.lower()}", table)
        width = self.tables.constant(self.graph, "nm_bytes", np.array(_LOOKUP_BYTES, np.int32))
        numbers = []
        for role, tensor in (("nm_codes", parts.codes), ("nm_values", parts.values)):
            stored = self.constant(role, tensor)
            numbers.append(self.node("Cast", [stored], f"{role}_wide", to=int(ir.DataType.INT32)))
        high = self.node("Mul", [numbers[0], width], "nm_rows")
        index = self.node("Add", [high, numbers[1]], "nm_numbers")
        return self.node("Gather", [lookup, index], "nm_spread", axis=0)

    def laid_out(self, value: ir.Value, parts: Parts) -> ir.Value:
        """From units to the tensor's own order and shape."""
        outer, length, inner = parts.along
        rows = outer * inner
        padded = -(-length // parts.unit) * parts.unit
        if padded != length:
            value = self.reshape(value, (rows, padded), "nm_vectors")
            bounds = [
                self.tables.constant(self.graph, f"nm_bound_{number}", np.array([number], np.int64))
                for number in (0, length, 1)
            ]
            value = self.node("Slice", [value, *bounds], "nm_cut")
        if inner == 1:
            return self.reshape(value, parts.shape, "nm_whole")
        value = self.reshape(value, (outer, inner, length), "nm_turned")
        value = self.node("Transpose", [value], "nm_order", perm=[0, 2, 1])
        return self.reshape(value, parts.shape, "nm_whole")

    def shifted(self, value: ir.Value, parts: Parts, wide: ir.DataType) -> ir.Value:
        """Add the zero points back."""
        assert parts.zero_points is not None
        zero, axis, block = parts.zero_points
        points = constant_tensor(zero)
        scalar = points is None or not points.shape.numpy()
        whole = parts.shape
        if wide != parts.dtype:
            zero = self.node("Cast", [zero], "nm_zero_points", to=int(wide))
        if scalar:
            return self.node("BitwiseXor", [value, zero], "nm_shifted")
        if not block:
            zero = self.reshape(zero, tuple(-1 if i == axis else 1 for i in range(len(whole))), "nm_across")
            return self.node("BitwiseXor", [value, zero], "nm_shifted")
        if whole[axis] % block:
            numbers = (np.arange(whole[axis]) // block).astype(np.int32)
            spread = self.tables.constant(self.graph, f"nm_blocks_{block}", numbers)
            zero = self.node("Gather", [zero, spread], "nm_spread_points", axis=axis)
            return self.node("BitwiseXor", [value, zero], "nm_shifted")
        # An axis for the block lets one zero point stand for all of it.
        split = (*whole[:axis], whole[axis] // block, block, *whole[axis + 1 :])
        value = self.reshape(value, split, "nm_split")
        across = tuple(1 if i == axis + 1 else size for i, size in enumerate(split))
        zero = self.reshape(zero, across, "nm_across")
        value = self.node("BitwiseXor", [value, zero], "nm_shifted")
        return self.reshape(value, whole, "nm_joined")

    def constant(self, role: str, tensor: ir.TensorProtocol) -> ir.Value:
        return self.model.add_initializer(self.graph, f"{self.name}.{role}", tensor)

    def shape_of(self, shape: tuple[int, ...]) -> ir.Value:
        name = "nm_shape_" + "x".join(map(str, shape))
        return self.tables.constant(self.graph, name, np.asarray(shape, np.int64))

    def reshape(self, value: ir.Value, shape: tuple[int, ...], role: str) -> ir.Value:
        return self.node("Reshape", [value, self.shape_of(shape)], role)

    def node(self, op_type: str, inputs: list[ir.Value], role: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        value = node.outputs[0]
        value.name = self.model.unique_name(f"{self.name}.{role}")
        self.graph.insert_before(self.before, node)
        return value


def lookup_table(dtype: ir.DataType) -> np.ndarray:
    """All 2:4 groups of 4-bit codes: uint8 ``[16 · 256, 4]``, row ``code · 256 + byte``.

    Args:
        dtype: INT4: negative codes are extended to bytes; UINT4: as they are.
    """
    codes, values = np.arange(_LOOKUP_CODES), np.arange(_LOOKUP_BYTES, dtype=np.uint8)
    out = np.zeros((_LOOKUP_CODES, _LOOKUP_BYTES, 4), np.uint8)
    for shift, nibble in ((0, values & 15), (2, values >> 4)):
        if dtype == ir.DataType.INT4:
            nibble = (nibble ^ 8) - np.uint8(8)
        out[codes, :, codes >> shift & 3] = nibble
    return out.reshape(-1, 4)


# -- from the graph ------------------------------------------------------------------------------


def recognise_compressed(value: ir.Value | None) -> Compressed | None:
    """The compressed tensor behind a value, or None.

    What counts is what the nodes do: constants, in one of the forms above, and nothing else.
    """
    core = _core(value)
    if value is None or core is None or value.dtype is None or value.shape is None:
        return None
    nodes: dict[int, ir.Node] = {}
    if not _only_constants(value, nodes):
        return None
    if not all(isinstance(d, int) for d in value.shape):
        return None
    try:
        notes = json.loads(core.metadata_props.get(COMPRESSED_KEY, "{}"))
    except (ValueError, RecursionError):
        notes = {}
    notes = notes if isinstance(notes, dict) else {}
    shape = tuple(d for d in value.shape if isinstance(d, int))
    pattern, weight = (noted_text(notes.get(key)) for key in ("pattern", "weight"))
    return Compressed(value, tuple(nodes.values()), core, value.dtype, shape, pattern, weight)


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A constant's tensor, or the decompressed one of a compressed constant, or None."""
    tensor = constant_tensor(value)
    if tensor is None:
        found = recognise_compressed(value)
        tensor = None if found is None else found.tensor()
    return tensor


def _core(value: ir.Value | None) -> ir.Node | None:
    """The node that spreads, behind steps that only move elements about."""
    while value is not None:
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type in _CORES:
            break
        if node.op_type not in _STEPS:
            return None
        value = node.inputs[0]
    else:
        return None
    first = node.inputs[0]
    if node.op_type == "Gather":
        # All the groups there are, looked up by what is computed from codes; a backend may have two
        # 4-bit codes in a byte.
        groups = constant_tensor(first)
        if groups is None or groups.dtype not in _NARROW.values():
            return None
        return node if tuple(groups.shape) in ((_GROUPS, 4), (_GROUPS, 2)) else None
    source = first.producer() if first is not None else None
    if source is None or source.op_type != "Expand" or source.domain not in ONNX_DOMAINS:
        return None
    zero = constant_tensor(source.inputs[0])
    reduction = node.attributes.get("reduction")
    if reduction is not None and (reduction.is_ref() or reduction.as_string() != "none"):
        return None
    if zero is None or zero.size != 1 or np.array(zero.numpy()).any():
        return None
    # A file may claim any size: groups have at most 256 weights, so that values tell how many there are.
    target, values = constant_tensor(source.inputs[1]), _behind_cast(node.inputs[2])
    if target is None or values is None or target.size > _RANK:
        return None
    return node if math.prod(map(int, target.numpy().reshape(-1))) <= 256 * values.size else None


def _behind_cast(value: ir.Value | None) -> ir.TensorProtocol | None:
    node = value.producer() if value is not None else None
    cast = node is not None and node.op_type == "Cast" and constant_tensor(value) is None
    return constant_tensor(node.inputs[0] if node is not None and cast else value)


def _only_constants(value: ir.Value, nodes: dict[int, ir.Node]) -> bool:
    """Collect the nodes that compute a value; whether they need nothing but constants, and can be computed."""
    if constant_tensor(value) is not None:
        return True
    node = value.producer()
    if node is None or node.domain not in ONNX_DOMAINS or node.op_type not in _COMPUTED:
        return False
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return False
    if id(node) in nodes:
        return True
    nodes[id(node)] = node
    if len(nodes) > _NODES:
        return False
    return all(source is not None and _only_constants(source, nodes) for source in node.inputs)


class _Step(NamedTuple):
    """A node, the numbers of the values it reads and how it is written."""

    operator: str
    attributes: dict[str, ir.Attr]
    sources: list[int]


def _plan(value: ir.Value) -> Callable[[], np.ndarray]:
    """How to compute a value that :func:`_only_constants` accepts: every node once, the last one its own."""
    numbers: dict[ir.Value, int] = {}
    rows: list[ir.TensorProtocol | _Step] = []
    _line_up(value, numbers, rows)
    return functools.partial(_carry_out, rows)


def _line_up(value: ir.Value, numbers: dict[ir.Value, int], rows: list[ir.TensorProtocol | _Step]) -> int:
    """Add what computes a value to ``rows``, sources first; its number there."""
    if value not in numbers:
        row: ir.TensorProtocol | _Step | None = constant_tensor(value)
        if row is None:
            node = value.producer()
            assert node is not None
            sources = [_line_up(source, numbers, rows) for source in node.inputs if source is not None]
            row = _Step(node.op_type, dict(node.attributes), sources)
        numbers[value] = len(rows)
        rows.append(row)
    return numbers[value]


def _carry_out(rows: list[ir.TensorProtocol | _Step]) -> np.ndarray:
    # Groups have at most 256 weights: whatever a file claims, nothing on the way is larger.
    most = 256 * sum(row.size for row in rows if not isinstance(row, _Step))
    last = {source: n for n, row in enumerate(rows) if isinstance(row, _Step) for source in row.sources}
    arrays: dict[int, np.ndarray] = {}
    for number, row in enumerate(rows):
        if isinstance(row, _Step):
            arrays[number] = _compute(row.operator, row.attributes, [arrays[n] for n in row.sources], most)
            for source in set(row.sources):
                if last[source] == number:
                    del arrays[source]
        else:
            arrays[number] = _load(row)
    return arrays[len(rows) - 1]


def _dense(plan: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    from effic.ir.encodings import code_tensor  # which reads compressed codes itself

    try:
        array = np.ascontiguousarray(plan()).reshape(shape)
    except (ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise InvalidModelError(
            f"a compressed weight of shape {list(shape)} cannot be decompressed: {error}; write the file anew"
        ) from error
    return code_tensor(array, dtype) if dtype in _NARROW else ir.Tensor(array, dtype=dtype)


def _load(tensor: ir.TensorProtocol) -> np.ndarray:
    """A constant; 4-bit numbers one per byte, which NumPy computes with."""
    array = tensor.numpy()
    return array.astype(_NARROW[tensor.dtype].numpy()) if tensor.dtype in _NARROW else array


def _compute(
    operator: str, attributes: dict[str, ir.Attr], arrays: list[np.ndarray], most: int
) -> np.ndarray:
    first = arrays[0]
    axis = attributes["axis"].as_int() if "axis" in attributes else 0
    if operator == "Gather":
        size = first.size // max(1, first.shape[axis]) * arrays[1].size
    elif operator in ("Expand", "BitwiseXor", "Mul", "Add"):
        other = tuple(map(int, arrays[1])) if operator == "Expand" else arrays[1].shape
        size = math.prod(np.broadcast_shapes(first.shape, other))
    else:
        size = 0
    if size > most:
        raise ValueError(f"{operator} makes {size} elements of far fewer")
    match operator:
        case "Cast":
            kind = ir.DataType(attributes["to"].as_int())
            return first.astype(_NARROW.get(kind, kind).numpy(), copy=False)
        case "Identity":
            return first
        case "Reshape":
            return first.reshape([first.shape[i] if d == 0 else int(d) for i, d in enumerate(arrays[1])])
        case "Transpose":
            return first.transpose(list(attributes["perm"].as_ints()) if "perm" in attributes else None)
        case "Slice":
            return _sliced(arrays)
        case "Expand":
            return np.broadcast_to(first, np.broadcast_shapes(first.shape, tuple(map(int, arrays[1]))))
        case "Gather":
            return np.take(first, arrays[1], axis=axis)
        case "ScatterElements":
            out = np.array(first)
            np.put_along_axis(out, arrays[1].astype(np.intp), arrays[2], axis=axis)
            return out
        case "BitwiseXor":
            return np.asarray(np.bitwise_xor(first, arrays[1]))
        case "Mul":
            return np.asarray(np.multiply(first, arrays[1]))
        case _:
            return np.asarray(np.add(first, arrays[1]))


def _sliced(arrays: list[np.ndarray]) -> np.ndarray:
    whole, starts, stops = arrays[0], arrays[1].reshape(-1), arrays[2].reshape(-1)
    axes = arrays[3].reshape(-1) if len(arrays) > 3 else np.arange(len(starts))
    steps = arrays[4].reshape(-1) if len(arrays) > 4 else np.ones(len(starts), np.int64)
    index = [slice(None)] * whole.ndim
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        index[int(axis)] = slice(int(start), int(stop), int(step))
    return whole[tuple(index)]

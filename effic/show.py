"""What is in a model: operators, sizes, weight sites, encodings, costs, and how the file was made."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.decoded import DecodedWeight, decoded_weights
from effic.ir.compressed import recognise_compressed, tensor_of
from effic.ir.cost import ModelCost, NodeCost, model_cost
from effic.ir.encodings import Encoding, stored_bytes
from effic.ir.model import Model, PassRecord, constant_tensor
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import Pattern, declared
from effic.ir.weights import WeightSite, weight_sites
from effic.measure import Measurement, measure_model
from effic.record import get_build

# Weights of a site that are looked at to tell how many are zero.
_COUNTED = 1 << 22


@dataclass(frozen=True)
class Port:
    """An input or output: its name, element type and shape (names and None for dynamic sizes)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass
class OpRow:
    """One operator's share: how many nodes, their multiply-adds, and the constants they read first."""

    op: str
    count: int = 0
    macs: int = 0
    weight_bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class SiteRow:
    """One weight: where it is used, its shape, how it is stored, and why it cannot be rewritten.

    Attributes:
        name: the initializer.
        kind: the operator that uses it.
        shape_oi: ``(out, in)``.
        groups: of a grouped convolution.
        storage: its element type, or the encoding in words.
        bits: bits in the file per element, scales and the like included.
        bytes: as stored.
        why_not: why passes leave it alone, or None.
        pattern: sparsity that is declared for it (``"2:4"``), or None.
        density: fraction of it that is not zero (of a large weight, of an evenly spread part); None for
            an encoded weight without a declared pattern.
        decoded: whether it is computed from codes when the file is loaded.
    """

    name: str
    kind: str
    shape_oi: tuple[int, int]
    groups: int
    storage: str
    bits: float
    bytes: int
    why_not: str | None
    pattern: str | None = None
    density: float | None = None
    decoded: bool = False


@dataclass
class Shown:
    """Everything :func:`inspect_model` found. ``nodes`` is in order of cost, most first."""

    path: str
    sha256: str | None
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: list[Port]
    outputs: list[Port]
    graphs: int
    functions: int
    measurement: Measurement
    cost: ModelCost
    ops: list[OpRow]
    sites: list[SiteRow]
    nodes: list[NodeCost]
    notes: list[str]
    record: list[PassRecord]
    build: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON-able data."""
        row = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("measurement", "cost")
        }
        for name in ("inputs", "outputs", "ops", "sites", "nodes", "record"):
            row[name] = [dataclasses.asdict(item) for item in row[name]]
        return {
            **row,
            "file_bytes": self.measurement.file_bytes,
            "cost": self.cost.to_dict(),
            "tensors": self.measurement.tensors,
        }


def inspect_model(path: str | os.PathLike[str]) -> Shown:
    """Read a model file and describe it.

    Args:
        path: an ``.onnx`` file.

    Raises:
        UsageError: there is no such file.
        InvalidModelError: it is broken.
    """
    model = read_onnx(path)
    cost = model_cost(model)
    graph = model.ir
    patterns = declared(model)
    sites, decoded = weight_sites(model), decoded_weights(model)
    parts = {name for weight in decoded for name in weight.parts}
    return Shown(
        path=os.fspath(path),
        sha256=model.origin.sha256,
        producer=" ".join(filter(None, (graph.producer_name, graph.producer_version))),
        ir_version=graph.ir_version,
        opsets=dict(graph.opset_imports),
        inputs=[_port(v) for v in graph.graph.inputs],
        outputs=[_port(v) for v in graph.graph.outputs],
        graphs=sum(1 for _ in model.graphs()),
        functions=len(graph.functions),
        measurement=measure_model(model, Path(path), cost),
        cost=cost,
        ops=_ops(cost),
        sites=[
            *(_site(s, patterns.get(s.name)) for s in sites if _is_stored(s) and s.name not in parts),
            *map(_decoded, decoded),
            *_kernel_sites(model),
        ],
        nodes=_movers(cost),
        notes=list(model.origin.notes),
        record=model.record,
        build=get_build(model),
    )


def dtype_text(dtype: ir.DataType | None) -> str:
    """An element type as NumPy and torch call it: ``float32`` where ONNX says FLOAT."""
    name = "?" if dtype is None else dtype.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _port(value: ir.Value) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return Port(value.name or "", dtype_text(value.dtype), shape)


def _ops(cost: ModelCost) -> list[OpRow]:
    rows: dict[str, OpRow] = {}
    for node in cost.per_node:
        row = rows.setdefault(node.op_type, OpRow(node.op_type))
        row.count += 1
        row.macs += node.macs or 0
        row.weight_bytes += node.weight_bytes
        row.parameters += node.parameters
    return sorted(rows.values(), key=lambda row: (-row.weight_bytes, -row.macs, -row.count))


def _movers(cost: ModelCost) -> list[NodeCost]:
    """Nodes by their share of the weights or of the multiply-adds, whichever is larger."""
    weights, macs = max(1, cost.weight_bytes), max(1, cost.macs)
    return sorted(
        (node for node in cost.per_node if node.weight_bytes or node.macs),
        key=lambda node: -max(node.weight_bytes / weights, (node.macs or 0) / macs),
    )


def _is_stored(site: WeightSite) -> bool:
    # A product of two activations is a site too, for passes to refuse; it weighs nothing.
    return site.encoding is not None or tensor_of(site.value) is not None


def _site(site: WeightSite, pattern: Pattern | None) -> SiteRow:
    rows, columns = site.shape_oi if site.shape else (0, 0)
    if site.encoding is not None:
        storage, nbytes = storage_text(site, site.encoding), stored_bytes(site.encoding)
    else:
        tensor = constant_tensor(site.value)
        storage, nbytes = dtype_text(site.dtype), 0 if tensor is None else tensor.nbytes
        if site.compressed is not None:
            nbytes = site.compressed.nbytes
    if site.compressed is not None:
        storage += f", {site.compressed.describe()}"
    return SiteRow(
        name=site.name,
        kind=site.kind,
        shape_oi=(rows, columns),
        groups=site.groups,
        storage=storage,
        bits=8 * nbytes / max(1, rows * columns),
        bytes=nbytes,
        why_not=site.why_not,
        pattern=None if pattern is None else str(pattern),
        density=None if pattern is None and site.encoding is not None else _density(site),
    )


def _decoded(weight: DecodedWeight) -> SiteRow:
    rows, columns = weight.shape_oi
    codes = "computed" if weight.codes is None else f"{dtype_text(weight.codes.dtype)}, decoded"
    return SiteRow(
        name=weight.name,
        kind=weight.site.kind,
        shape_oi=(rows, columns),
        groups=weight.site.groups,
        storage=f"{codes} when loaded",
        bits=8 * weight.bytes / max(1, rows * columns),
        bytes=weight.bytes,
        why_not="it is in the form that lowering gave it already",
        decoded=True,
    )


def _density(site: WeightSite) -> float | None:
    """Fraction of a weight that is not zero; of a large one, over evenly spread rows."""
    if not site.shape or not site.elements:
        return None
    with site.matrix() as matrix:
        rows, columns = matrix.shape
        # Steps are odd: down the rows patterns repeat in steps that mostly are even.
        step = max(1, rows * columns // _COUNTED) | 1
        part = matrix[::step]
        return float(np.count_nonzero(part) / part.size)


def storage_text(site: WeightSite, encoding: Encoding) -> str:
    """An encoding in words: ``4-bit symmetric, groups of 32 per oc``."""
    kind = "symmetric" if encoding.symmetric else "asymmetric"
    axis = site.axis_of(encoding)
    scales = "one scale" if axis is None else f"per {axis}"
    groups = scales if encoding.group_size < 0 else f"groups of {encoding.group_size} {scales}"
    outliers = "" if encoding.outliers is None else f", {encoding.outliers.indices.size} outliers"
    return f"{encoding.bits}-bit {kind}, {groups}{outliers}"


def _kernel_sites(model: Model) -> list[SiteRow]:
    """Compressed weights that a runtime's own operator decodes, as lowering leaves them."""
    rows: dict[int, SiteRow] = {}
    for node in model.nodes("MatMulNBits", "GatherBlockQuantized", domain="com.microsoft"):
        lookup = node.op_type == "GatherBlockQuantized"
        places = (0, 2, 3) if lookup else (1, 2, 3)
        codes, scales, zeros = (_stored(node.inputs[i]) if i < len(node.inputs) else None for i in places)
        compressed = None
        if codes is None and (compressed := recognise_compressed(node.inputs[places[0]])) is not None:
            codes = compressed.tensor()
        # Several nodes may share a weight; the first tells about it.
        key = id(codes if compressed is None else compressed.value)
        if codes is None or key in rows:
            continue
        numbers = {k: a.as_int() for k, a in node.attributes.items() if a.type == ir.AttributeType.INT}
        bits, block = numbers.get("bits", 4), numbers.get("block_size", 128)
        if lookup:
            length = codes.shape.numpy()[0]
            shape = length, codes.size * codes.dtype.bitwidth // bits // max(1, length)
        else:
            shape = numbers.get("N", 0), numbers.get("K", 0)
        nbytes = sum(t.nbytes for t in (codes, scales, zeros) if t is not None)
        if compressed is not None:
            nbytes += compressed.nbytes - codes.nbytes
        kind = "symmetric" if zeros is None else "asymmetric"
        rows[key] = SiteRow(
            name=(codes.name if compressed is None else compressed.weight) or "",
            kind=node.op_type,
            shape_oi=shape,
            groups=1,
            storage=f"{bits}-bit {kind}, blocks of {block}"
            + ("" if compressed is None else f", {compressed.describe()}"),
            bits=8 * nbytes / max(1, shape[0] * shape[1]),
            bytes=nbytes,
            why_not="it is in the form of its kernel already",
        )
    return list(rows.values())


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant behind an input, also behind a Cast or Reshape (how lowering shares and narrows scales)."""
    tensor, node = constant_tensor(value), value.producer() if value is not None else None
    while tensor is None and node is not None and node.op_type in ("Cast", "Reshape"):
        source = node.inputs[0]
        tensor, node = constant_tensor(source), source.producer() if source is not None else None
    return tensor

"""compress-nm: N:M weights stored as the values that are kept and where they stand."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.compressed import Parts, Tables, build, lookup_table
from effic.ir.encodings import Encoding, code_values, encoding_nodes, pack
from effic.ir.model import Model, constant_tensor, describe
from effic.ir.sparsity import Pattern, along_groups, declared
from effic.ir.weights import KINDS, WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.quantize.weight_only import matches_site, say_unmatched
from effic.passes.sparsify import nm_codec
from effic.passes.sparsify.nm_codec import Storage, storage_of

_OPSET = 21

# What the nodes and small constants of one weight take in a file, and those that add zero points, as
# measured: they are worth it only for weights that save more.
_GRAPH_BYTES = 1000
_SHIFT_BYTES = 500

# 2:4 groups of 4-bit codes are looked up whole from so many on: five times as fast to load, and the
# table of 16 KiB is then a small part of what is saved.
_LOOKED_UP = 1 << 16

_4_BIT = (ir.DataType.INT4, ir.DataType.UINT4)
_8_BIT = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class CompressNM(Pass):
    """Store sparse weights as their values and where these stand: smaller files, the same numbers.

    Before:  y = MatMul(x, w)                                w of a declared pattern such as 2:4
    After:   y = MatMul(x, ScatterElements(zeros, Gather(positions, codes), values))

    Of every ``m`` weights along the input channels the ``n`` kept ones are stored, and a code for where
    they stood: 2:4 takes 36 bits per four weights in fp16, 68 in fp32, 20 for 8-bit and 12 for 4-bit
    codes of a quantized weight, whose DequantizeLinear reads the decompressed codes. All bits of the
    weights stay. Runtimes decompress once, when they load the file: it takes the memory and has the speed
    of the dense one. Goes last: what changes weights afterwards says that it leaves these alone.

    Missed when the weight follows no declared pattern (``detect`` finds undeclared ones), breaks it,
    would not get smaller, is a table that Gather reads, is read as something else too, may be overridden
    by the caller, or has 2-bit codes, which runtimes cannot move.
    """

    name: ClassVar[str] = "compress-nm"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    needs_opset: ClassVar[int] = _OPSET

    detect: str = option("", help="also weights that follow this pattern undeclared: 2:4", example="2:4")
    skip: tuple[str, ...] = option(
        (), help="weights to leave alone: patterns of weight or node names, or kind:Conv"
    )
    kinds: tuple[str, ...] = option(
        ("MatMul", "Gemm", "Conv", "ConvTranspose"),
        help="operators whose weights are compressed",
        choices=KINDS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detect:
            Pattern.parse(self.detect)

    def candidates(self, model: Model, remarks: Remarks) -> list[WeightSite] | None:
        return [site for site in weight_sites(model, self.kinds) if self._why_not(site) is None]

    def stays(self) -> float:
        """What of a pattern that keeps few, such as 1:8, is left."""
        return 0.125

    def apply(self, model: Model, remarks: Remarks) -> None:
        say_unmatched(model, "skip", self.skip, remarks)
        detect = Pattern.parse(self.detect) if self.detect else None
        patterns, tables, dense = declared(model), _Charged(model), 0
        for site in weight_sites(model, self.kinds):
            pattern = patterns.get(site.name, detect)
            if pattern is None:
                dense += site.encoding is not None or constant_tensor(site.value) is not None
            elif reason := self._why_not(site):
                remarks.missed(site.name, reason)
            elif isinstance(outcome := _compress(model, site, pattern, tables), str):
                remarks.missed(site.name, outcome)
            else:
                remarks.passed(site.name, _sentence(outcome), **outcome)
        if dense:
            count = f"{dense} weights follow" if dense > 1 else "1 weight follows"
            remarks.missed(
                "the model",
                f"{count} no declared pattern and stay dense; prune first, or give detect=2:4 to look for one",
            )

    def _why_not(self, site: WeightSite) -> str | None:
        if site.compressed is not None:
            return f"is {site.compressed.describe()} already"
        if site.why_not is not None:
            return site.why_not
        if matches_site(site, self.skip):
            return "is named in skip"
        if "Gather" in site.kinds:
            return "is a table whose rows Gather looks up; it would be decompressed whole"
        if site.other_readers and site.encoding is None:
            return f"is read by {site.other_readers[0]} as well, so the original would have to stay"
        if site.opset < _OPSET:
            return f"lives in a function at opset {site.opset}; compressed weights need opset {_OPSET}"
        if site.encoding is not None:
            return _why_not_codes(site, site.encoding)
        return None


class _Charged(Tables):
    """Tables of the weights compressed so far; the first weight that needs one pays for it."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.paid: set[tuple[int, str]] = set()

    def price(self, graph: ir.Graph, storage: Storage, kind: ir.DataType, looked_up: bool) -> tuple[str, int]:
        """Name and bytes of the table a weight needs, bytes 0 where ``graph`` has it."""
        name = f"groups of {kind.name}" if looked_up else str(storage)
        size = lookup_table(kind).nbytes if looked_up else 0
        if not looked_up and storage.kind != "position":
            size = nm_codec.table(storage).nbytes
        return name, 0 if (id(graph), name) in self.paid and not self.model.is_function_body(graph) else size


def _why_not_codes(site: WeightSite, encoding: Encoding) -> str | None:
    if encoding.codes.dtype not in (*_4_BIT, *_8_BIT):
        return f"has codes of type {encoding.codes.dtype.name}, which runtimes cannot move about"
    codes = encoding_nodes(site.value)[-1].inputs[0]
    if codes is not None and (len(codes.uses()) > 1 or codes.is_graph_output()):
        others = sorted(describe(use.node) for use in codes.uses())
        return f"shares its codes: {' and '.join(others) or 'they are a graph output'}"
    return None


def _compress(model: Model, site: WeightSite, pattern: Pattern, tables: _Charged) -> dict[str, object] | str:
    """Rewrite one weight; its figures, or why it is left alone."""
    storage = storage_of(pattern)
    if isinstance(storage, str) or site.graph is None:
        return storage if isinstance(storage, str) else "belongs to no graph"
    encoding = site.encoding
    kind = site.dtype if encoding is None else encoding.codes.dtype
    with site.matrix() if encoding is None else contextlib.nullcontext(_codes(site, encoding)) as matrix:
        stored = along_groups(site, matrix)
        outer, length, inner = stored.shape
        rows = outer * inner
        before = rows * length * kind.bitwidth // 8
        bits = storage.bits(rows, length, kind.bitwidth)
        looked_up = kind in _4_BIT and str(pattern) == "2:4" and bits >= 12 * _LOOKED_UP
        table, price = tables.price(site.graph, storage, kind, looked_up)
        after = -(-bits // 8)
        total = after + price + _GRAPH_BYTES + _shift_bytes(encoding)
        if total >= before:
            return (
                f"would not get smaller: {before} bytes dense, {total} as {pattern} with what decompresses it"
            )
        vectors = (
            stored.reshape(rows, length) if inner == 1 else stored.transpose(0, 2, 1).reshape(rows, length)
        )
        broken = nm_codec.overfull(vectors, None, pattern)
        if broken.any():
            return (
                f"breaks {pattern}: {int(broken.sum())} of {broken.size} groups have more than {pattern.n} "
                "non-zeros; prune it to the pattern first"
            )
        lost = nm_codec.lost_zeros(vectors, pattern)
        packed = nm_codec.encode(vectors, None, storage)
        del stored, vectors
    tables.paid.add((id(site.graph), table))
    parts = Parts(
        values=_values(model, packed.values, kind, looked_up),
        codes=_stored(model, packed.codes, storage.width),
        table=None if looked_up or storage.kind == "position" else nm_codec.table(storage),
        positions=storage.kind == "position",
        unit=storage.unit,
        dtype=kind,
        shape=site.shape if encoding is None else tuple(encoding.codes.shape.numpy()),
        along=(outer, length, inner),
        zero_points=None if encoding is None else _zero_points(site, encoding),
    )
    # 4-bit types came with version 10 of the file format.
    model.ir.ir_version = max(model.ir.ir_version, 10)
    _put(site, parts, tables, pattern)
    return {
        "pattern": str(pattern),
        "storage": str(storage),
        "bytes_before": before,
        "bytes_after": after,
        "bits_per_weight": round(8 * after / (rows * length), 4),
        "formula": f"{storage.kept} values of {kind.bitwidth} bits and {storage.codes * storage.width} bits of "
        f"positions per {storage.unit} weights",
        "lost_negative_zeros": lost,
    }


def _shift_bytes(encoding: Encoding | None) -> int:
    """What adding zero points takes in a file."""
    if encoding is None or encoding.zero_points is None:
        return 0
    length = encoding.codes.shape.numpy()[encoding.axis] if encoding.block_size else 0
    # Blocks that do not divide the axis are numbered, four bytes each.
    return _SHIFT_BYTES + (4 * length if encoding.block_size and length % encoding.block_size else 0)


def _codes(site: WeightSite, encoding: Encoding) -> np.ndarray:
    """The codes of an encoding as the stored matrix, zero where they stand for zero."""
    codes = code_values(encoding)
    if encoding.zero_points is not None:
        codes = codes ^ _spread(encoding.zero_points, codes.shape, encoding)
    return codes.reshape(site.matrix_shape)


def _spread(zeros: np.ndarray, shape: tuple[int, ...], encoding: Encoding) -> np.ndarray:
    """Zero points so that they broadcast over codes of ``shape``."""
    axis, block = encoding.axis, encoding.block_size
    if block:
        return np.repeat(zeros, block, axis=axis)[(*([slice(None)] * axis), slice(0, shape[axis]))]
    if zeros.ndim == 1:
        return zeros.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return zeros


def _zero_points(site: WeightSite, encoding: Encoding) -> tuple[ir.Value, int, int] | None:
    if encoding.zero_points is None:
        return None
    value = encoding_nodes(site.value)[-1].inputs[2]
    return None if value is None else (value, encoding.axis, encoding.block_size)


def _values(model: Model, values: np.ndarray, kind: ir.DataType, looked_up: bool) -> ir.TensorProtocol:
    if kind not in _4_BIT:
        return model.scratch.tensor("values", values, kind)
    packed = pack(values, kind)
    if looked_up:
        return model.scratch.tensor("values", packed, ir.DataType.UINT8)
    return model.scratch.packed("values", packed, kind, values.shape)


def _stored(model: Model, codes: np.ndarray, width: int) -> ir.TensorProtocol:
    if width == 8:
        return model.scratch.tensor("codes", codes, ir.DataType.UINT8)
    return model.scratch.packed("codes", pack(codes, ir.DataType.UINT4), ir.DataType.UINT4, codes.shape)


def _put(site: WeightSite, parts: Parts, tables: Tables, pattern: Pattern) -> None:
    """Let everyone who reads the weight, or its codes, read what decompresses them."""
    graph = site.graph
    assert graph is not None
    if site.encoding is None:
        old = site.value
        new = build(tables, parts, site.name, str(pattern), before=tables.first(graph), graph=graph)
        old.replace_all_uses_with(new)
    else:
        node = encoding_nodes(site.value)[-1]
        found = node.inputs[0]
        assert found is not None
        old = found
        new = build(tables, parts, site.name, str(pattern), before=node, graph=graph)
        node.replace_input_with(0, new)
    producer = old.producer()
    if producer is not None and producer.graph is not None:
        producer.graph.remove(producer, safe=True)
    elif old.is_initializer() and old.graph is not None:
        old.graph.initializers.pop(str(old.name))


def _sentence(figures: dict[str, object]) -> str:
    text = (
        f"{figures['pattern']}, {figures['formula']}: {figures['bits_per_weight']:.2f} bits per weight, "
        f"{figures['bytes_before']:,} → {figures['bytes_after']:,} bytes"
    )
    if figures["lost_negative_zeros"]:
        text += f"; {figures['lost_negative_zeros']} pruned -0.0 became 0.0"
    return text

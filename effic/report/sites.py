"""The weights of a model beside those of the original: how each is stored, by which pass, and how far off."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effic.decoded import DecodedWeight, decoded_weights, encoding_notes
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model, constant_tensor
from effic.ir.weights import KINDS, WeightSite, weight_sites
from effic.report.graph import node_name
from effic.report.rows import PassRow, RemarkRow, number
from effic.show import Shown, dtype_text

_DESCRIBED = re.compile(r"\w+ '(.*)'", re.S)
_KERNELS = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
_INTEGER_PRODUCTS = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
"""Operators that multiply by a weight of integers, and which of their inputs that is."""

# Elements of a weight whose difference is taken at once: 16 MB in float64.
_BLOCK = 1 << 21


@dataclass
class Site:
    """One weight, before and after.

    Attributes:
        name: of the weight, as the original calls it where that is known.
        kind: the operator that reads it.
        rows, columns: output and input channels.
        node_before, node_after: name of the first node that reads it, in each model.
        stored_before, stored: how it is stored, in words; None where it is not found.
        method: how it was compressed, as the pass calls it, or None.
        bits: bits of a code, or of a floating number.
        group: codes that share a scale; -1 for a whole channel or tensor; None without scales.
        bytes_before, bytes_after: as stored; None where not known.
        error_db: signal-to-noise ratio of the weight in decibels; None where not known or without end.
        error_from: ``pass`` (the pass measured it), ``weights`` (of the two files' weights), or empty.
        equal: whether the two files' weights are equal.
        done: what passes said they did, each a sentence.
        reason: why passes left it alone, or None.
    """

    name: str
    kind: str
    rows: int = 0
    columns: int = 0
    node_before: str | None = None
    node_after: str | None = None
    stored_before: str | None = None
    stored: str | None = None
    method: str | None = None
    bits: float | None = None
    group: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    error_db: float | None = None
    error_from: str = ""
    equal: bool = False
    done: list[str] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Stored:
    """A weight of one model: what :func:`effic.show.inspect_model` says of it, and who reads it."""

    name: str
    kind: str
    shape: tuple[int, int]
    nodes: list[str]
    storage: str
    bits: float | None
    group: int | None
    bytes: int
    why_not: str | None
    site: WeightSite | None


def stored_sites(model: Model, shown: Shown) -> list[Stored]:
    """The weights of a model in the order of the file, those in the forms of kernels last."""
    sites = {site.name: site for site in weight_sites(model)}
    kernels: dict[str | None, list[ir.Node]] = {}
    for node in model.nodes(*_KERNELS, domain="com.microsoft"):
        codes = node.inputs[_KERNELS[node.op_type]]
        if codes is not None:
            kernels.setdefault(codes.name, []).append(node)
    found: list[Stored] = []
    for row in shown.sites:
        if row.decoded:
            continue
        site = sites.pop(row.name, None) if row.kind in KINDS else None
        nodes = [node_name(use.node) for use in site.uses] if site is not None else []
        name, bits, group = row.name, row.bits, None
        if site is not None and site.encoding is not None:
            bits, group = float(site.encoding.bits), site.encoding.group_size
        elif site is not None:
            bits = float(site.dtype.bitwidth)
        elif row.name in kernels:
            node = kernels[row.name][0]
            name, nodes = (
                encoding_notes(node).get("weight") or row.name,
                [node_name(n) for n in kernels[row.name]],
            )
            bits, group = float(_integer(node, "bits", 4)), _integer(node, "block_size", 128)
        found.append(
            Stored(
                name, row.kind, row.shape_oi, nodes, row.storage, bits, group, row.bytes, row.why_not, site
            )
        )
    found += map(_decoded, decoded_weights(model))
    return _merged([*found, *_integer_products(model)])


def _decoded(weight: DecodedWeight) -> Stored:
    stored = "" if weight.codes is None else dtype_text(weight.codes.dtype)
    return Stored(
        weight.name,
        weight.site.kind,
        weight.site.shape_oi if weight.site.shape else (0, 0),
        [node_name(use.node) for use in weight.site.uses],
        f"{stored}, decoded when loaded" if stored else "computed when loaded",
        float(weight.bits or 0) or None,
        weight.group,
        weight.bytes,
        None,
        None,
    )


def _integer_products(model: Model) -> list[Stored]:
    """Weights of operators that multiply integers."""
    found = []
    for node in model.nodes(*_INTEGER_PRODUCTS, domain=None):
        index = _INTEGER_PRODUCTS[node.op_type]
        value = node.inputs[index] if index < len(node.inputs) else None
        tensor = constant_tensor(value)
        if value is None or tensor is None:
            continue
        shape = tensor.shape.numpy()
        # Products of matrices have them as [in, out], convolutions as [out, in, …].
        rows = shape[0] if "Conv" in node.op_type else shape[-1]
        parts = (constant_tensor(each) for each in node.inputs)
        found.append(
            Stored(
                encoding_notes(node).get("weight") or value.name or "?",
                node.op_type,
                (rows, tensor.size // max(1, rows)),
                [node_name(node)],
                dtype_text(tensor.dtype),
                float(tensor.dtype.bitwidth),
                None,
                sum(part.nbytes for part in parts if part is not None),
                None,
                None,
            )
        )
    return found


def _merged(found: list[Stored]) -> list[Stored]:
    """One row for the parts that lowering split a weight into, which it notes the weight's name at."""
    rows: dict[str, Stored] = {}
    for each in found:
        first = rows.setdefault(each.name, each)
        if first is not each:
            first.bytes += each.bytes
            first.nodes = list(dict.fromkeys([*first.nodes, *each.nodes]))
    return list(rows.values())


def site_rows(
    before: Sequence[Stored] | None,
    after: Sequence[Stored],
    passes: Sequence[PassRow],
    progress: Callable[[int, int], None] | None = None,
) -> list[Site]:
    """The weights of two models side by side, with what the passes said of each.

    A weight is known again by its name, or by the node that reads it where a pass made a new weight.

    Args:
        before: weights of the original, or None when there is none to look at.
        after: weights of the result.
        passes: what was done.
        progress: called with the number of weights compared, and how many there are.
    """
    rows: list[Site] = []
    pairs: list[tuple[Site, Stored, Stored]] = []
    by_name: dict[str, tuple[Site, Stored]] = {}
    by_node: dict[str, tuple[Site, Stored]] = {}
    for old in before or ():
        row = Site(old.name, old.kind, *old.shape, stored_before=old.storage, bytes_before=old.bytes)
        row.node_before = old.nodes[0] if old.nodes else None
        rows.append(row)
        by_name[old.name] = row, old
        for node in old.nodes:
            by_node.setdefault(node, (row, old))
    taken: set[int] = set()
    for new in after:
        found = by_name.get(new.name) or next((by_node[n] for n in new.nodes if n in by_node), None)
        if found is None or id(found[0]) in taken:
            row = Site(new.name, new.kind, *new.shape)
            rows.append(row)
        else:
            row, old = found
            if old.name == new.name:
                pairs.append((row, old, new))
        taken.add(id(row))
        row.node_after = new.nodes[0] if new.nodes else None
        row.stored, row.bytes_after, row.bits, row.group = new.storage, new.bytes, new.bits, new.group
        if not row.rows:
            row.rows, row.columns = new.shape
        if new.kind in KINDS:
            row.reason = new.why_not
        by_name.setdefault(new.name, (row, new))
        for node in new.nodes:
            by_node.setdefault(node, (row, new))
    _hear(passes, {k: v[0] for k, v in by_name.items()}, {k: v[0] for k, v in by_node.items()})
    for at, (row, old, new) in enumerate(pairs):
        if progress is not None:
            progress(at, len(pairs))
        if not row.error_from:
            _measure(row, old, new)
    return rows


def _hear(passes: Iterable[PassRow], names: dict[str, Site], nodes: dict[str, Site]) -> None:
    """Put what passes said where it belongs."""
    for item in passes:
        if item.rolled_back is not None:
            continue
        for remark in item.remarks:
            node = _DESCRIBED.fullmatch(remark.where)
            row = names.get(remark.where) or (nodes.get(node[1]) if node else None)
            if row is None:
                continue
            sentence = f"{item.name}: {remark.text}"
            if remark.kind == "missed" and row.method is None:
                row.reason = sentence  # until a later pass does what this one could not
            else:
                row.done.append(sentence)
                _note(row, remark)


def _note(row: Site, remark: RemarkRow) -> None:
    data = remark.data
    if not isinstance(data.get("method"), str):
        return
    row.method, row.reason = data["method"], None
    if row.bytes_before is None and (size := number(data.get("bytes_before"))) is not None:
        row.bytes_before = int(size)
    if row.bytes_after is None and (size := number(data.get("bytes_after"))) is not None:
        row.bytes_after = int(size)
    if (bits := number(data.get("bits"))) is not None:
        row.bits = bits
    if (group := number(data.get("group_size"))) is not None:
        row.group = int(group)
    if (error := number(data.get("sqnr_db"))) is not None:
        row.error_db, row.error_from = error, "pass"


def _measure(row: Site, old: Stored, new: Stored) -> None:
    """The signal-to-noise ratio of a weight that both models have under one name."""
    if old.site is None or new.site is None or old.shape != new.shape or old.site.groups != new.site.groups:
        return
    try:
        ratio = weight_sqnr(old.site, new.site)
    except UnsupportedError:  # a weight that is computed at run time cannot be read
        return
    row.error_from, row.equal = "weights", ratio == math.inf
    row.error_db = ratio if math.isfinite(ratio) else None


def weight_sqnr(old: WeightSite, new: WeightSite) -> float:
    """``10 log10 (sum of old² / sum of (old - new)²)`` of two weights of one shape; infinite when equal.

    Both are walked over in blocks of rows, straight from the file.

    Raises:
        UnsupportedError: a weight cannot be read.
    """
    signal = noise = 0.0
    with old.matrix() as first, new.matrix() as second:
        a = first if old.in_axis == 1 else first.T
        b = second if new.in_axis == 1 else second.T
        step = max(1, _BLOCK // max(1, a.shape[1]))
        for start in range(0, a.shape[0], step):
            x = np.asarray(a[start : start + step], np.float64)
            signal += float(np.square(x).sum())
            noise += float(np.square(x - np.asarray(b[start : start + step], np.float64)).sum())
        del a, b
    if noise == 0 or math.isnan(noise):
        return math.inf if noise == 0 else math.nan
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _integer(node: ir.Node, name: str, default: int) -> int:
    attr = node.attributes.get(name)
    return attr.as_int() if attr is not None and attr.type == ir.AttributeType.INT else default

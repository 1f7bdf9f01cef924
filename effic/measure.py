"""Figures of a model file that are the same at every run: what a budget can hold it to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import onnx_ir as ir

    from effic.ir.cost import ModelCost
    from effic.ir.model import Model
    from effic.measure_graph import Constants
    from effic.op_coverage import Operator

SMALL_TENSOR = 256
"""Bytes below which a tensor has no row of its own: a model has many, and none of them matters."""

Contributor = Literal["tensor", "node", "operator"]


class Metric(NamedTuple):
    """A figure: how it is called, whether it counts bytes, and what contributes to it."""

    title: str
    is_bytes: bool
    by: Contributor


METRICS: dict[str, Metric] = {
    "file_bytes": Metric("file bytes", True, "tensor"),
    "weight_bytes": Metric("weight bytes", True, "tensor"),
    "parameters": Metric("parameters", False, "node"),
    "macs": Metric("MACs", False, "node"),
    "nodes": Metric("nodes", False, "operator"),
    "float_weights": Metric("weights in floating point", False, "node"),
    "decoded_weights": Metric("weights decoded at run time", False, "tensor"),
    "peak_bytes": Metric("peak bytes", True, "tensor"),
}
COMPONENT_METRICS = ("weight_bytes", "parameters", "macs")
"""Metrics that can be taken of a part of a model."""


@dataclass(frozen=True)
class Part:
    """A constant or a node, with what a component's name pattern may match it by.

    Attributes:
        names: of the node and its constants, or of the constant and the nodes that read it in the end.
        label: for people.
        weight_bytes: of a constant.
        parameters, macs: of a node; ``macs`` None when unknown.
    """

    names: frozenset[str]
    label: str
    weight_bytes: int = 0
    parameters: int = 0
    macs: int | None = 0


@dataclass
class Measurement:
    """The figures of one model file, and what they are made of.

    Attributes:
        file_bytes: the file and the external data it names.
        weight_bytes: constants as stored.
        parameters: elements of the weights.
        macs: multiply-adds of one run, dynamic dimensions counted as 1; None when unknown.
        nodes: nodes of all graphs, Constant nodes left out.
        macs_unknown: nodes whose multiply-adds nobody can tell.
        tensors: bytes by tensor; the small ones share a row.
        macs_by_node: multiply-adds by node, zeros left out.
        parameters_by_node: parameters by the node that first reads them, zeros left out.
        ops: nodes by operator.
        float_weights: nodes that multiply by a weight stored in floating point; None: not looked at.
        decoded_weights: weights that are decoded at every run; None: not looked at.
        peak_bytes: weights and the largest set of live activations; None: not looked at, or unknown.
        rows: what the last three are made of, by metric.
        readers: for tensors with rows of their own, the node that reads each in the end (not kept in files).
        parts: constants and nodes by name, for components (not kept in files).
        operators: name and operator of every node (not kept in files).
        why_unknown: why ``peak_bytes`` is unknown (not kept in files).
    """

    file_bytes: int
    weight_bytes: int
    parameters: int
    macs: int | None
    nodes: int
    macs_unknown: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    macs_by_node: dict[str, int] = field(default_factory=dict)
    parameters_by_node: dict[str, int] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    float_weights: int | None = None
    decoded_weights: int | None = None
    peak_bytes: int | None = None
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict, compare=False)
    parts: tuple[Part, ...] = field(default=(), compare=False, repr=False)
    operators: tuple[tuple[str, Operator], ...] = field(default=(), compare=False, repr=False)
    why_unknown: str = field(default="", compare=False)

    def metric(self, name: str) -> int | None:
        """The figure called ``name`` (one of :data:`METRICS`), or None when it is unknown."""
        value: int | None = getattr(self, name)
        return value

    def why_not(self, name: str) -> str:
        """Why a figure is unknown, and what to do."""
        if name == "macs":
            count = self.macs_unknown
            return f"{count} of the nodes that multiply have unknown shapes; give the model static shapes"
        return self.why_unknown or "the record of it has no such figure; run 'effic gate --update'"

    def component(self, pattern: str, name: str) -> tuple[int | None, dict[str, int]]:
        """A figure of a part of the model, and what it is made of.

        Args:
            pattern: shell pattern over names of tensors and nodes.
            name: one of :data:`COMPONENT_METRICS`.

        Returns:
            The figure, None when nothing matches or it is unknown; contributions, largest first.
        """
        found = [part for part in self.parts if any(fnmatchcase(n, pattern) for n in part.names)]
        figures = [(part.label, getattr(part, name)) for part in found]
        rows = Counter[str]()
        for label, figure in figures:
            rows[label] += figure or 0
        known = bool(found) and all(figure is not None for _, figure in figures)
        return sum(rows.values()) if known else None, _largest_first(rows)

    def outside(self, allowed: Callable[[Operator], bool]) -> dict[str, int]:
        """Nodes whose operators are not allowed, each once (1)."""
        return {name: 1 for name, operator in self.operators if not allowed(operator)}

    def contributions(self, name: str) -> tuple[Contributor, dict[str, int]]:
        """What a figure is made of: the kind of contributor, and how much each contributes."""
        by = METRICS[name].by
        if name in self.rows or getattr(self, name) is None:
            return by, self.rows.get(name, {})
        if by == "tensor":
            rows = dict(self.tensors)
            # Names, attributes and metadata; shared external data can make the file the smaller one.
            if name == "file_bytes" and self.file_bytes > self.weight_bytes:
                rows["(graph and metadata)"] = self.file_bytes - self.weight_bytes
            return by, rows
        if by == "operator":
            return by, self.ops
        return by, self.macs_by_node if name == "macs" else self.parameters_by_node

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as the baseline file holds it."""
        return {
            **{name: self.metric(name) for name in METRICS},
            "macs_unknown": self.macs_unknown,
            "ops": self.ops,
            "tensors": self.tensors,
            "macs_by_node": self.macs_by_node,
            "parameters_by_node": self.parameters_by_node,
            **{f"{name}_by": rows for name, rows in self.rows.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Undo :meth:`to_dict`.

        Raises:
            ValueError, TypeError, KeyError: the data is something else.
        """
        macs = data["macs"]
        return cls(
            file_bytes=int(data["file_bytes"]),
            weight_bytes=int(data["weight_bytes"]),
            parameters=int(data["parameters"]),
            macs=None if macs is None else int(macs),
            nodes=int(data["nodes"]),
            macs_unknown=int(data["macs_unknown"]),
            tensors=_counts(data["tensors"]),
            macs_by_node=_counts(data["macs_by_node"]),
            parameters_by_node=_counts(data["parameters_by_node"]),
            ops=_counts(data["ops"]),
            float_weights=_count(data.get("float_weights")),
            decoded_weights=_count(data.get("decoded_weights")),
            peak_bytes=_count(data.get("peak_bytes")),
            rows={name: _counts(data[f"{name}_by"]) for name in _LATER if f"{name}_by" in data},
        )


_LATER = ("float_weights", "decoded_weights", "peak_bytes")
"""Metrics that :func:`measure_model` leaves out: they take longer."""


def measure(path: str | os.PathLike[str]) -> Measurement:
    """Measure a model file.

    Args:
        path: an ``.onnx`` file.

    Raises:
        UsageError: there is no such file.
        InvalidModelError: it is broken.
    """
    from effic.ir.cost import model_cost
    from effic.ir.onnx_format import read_onnx

    model = read_onnx(path)
    return measure_all(model, Path(path), model_cost(model))


def measure_all(model: Model, path: Path, cost: ModelCost) -> Measurement:
    """Every figure of a model that was read from ``path`` and is still as it was read."""
    from effic.measure_graph import Constants, decoded_weights, float_weights, peak_bytes

    found = measure_model(model, path, cost)
    constants = Constants(model)
    found.rows["float_weights"] = float_weights(model)
    found.rows["decoded_weights"] = decoded_weights(model)
    found.float_weights = len(found.rows["float_weights"])
    found.decoded_weights = len(found.rows["decoded_weights"])
    found.peak_bytes, rows, found.why_unknown = peak_bytes(constants, cost)
    if found.peak_bytes is not None:
        # Tensors that live at once are as many as the graph is wide; a baseline need not name the small ones.
        found.rows["peak_bytes"] = _largest_first(_grouped(rows.items()))
    found.parts, found.readers = _parts(constants, cost)
    found.operators = tuple(_operators(model))
    return found


def _grouped(sizes: Iterable[tuple[str, int]]) -> Counter[str]:
    """Bytes by tensor, the small ones in one row."""
    rows: Counter[str] = Counter()
    for name, nbytes in sizes:
        rows[name if nbytes >= SMALL_TENSOR else f"(tensors under {SMALL_TENSOR} B)"] += nbytes
    return rows


def _parts(constants: Constants, cost: ModelCost) -> tuple[tuple[Part, ...], dict[str, str]]:
    from effic.ir.model import describe

    readers, parts, of_node = dict[str, str](), list[Part](), dict[int, set[str]]()
    for value, tensor in constants.stored():
        name = value.name or "?"
        nodes = list(constants.readers(value))
        for node in nodes:
            of_node.setdefault(id(node), set()).add(name)
        if nodes and tensor.nbytes >= SMALL_TENSOR:
            readers[name] = describe(nodes[0])
        names = {name, *(node.name or "" for node in nodes)} - {""}
        parts.append(Part(frozenset(names), name, weight_bytes=tensor.nbytes))
    nodes = [node for graph in constants.model.graphs() for node in graph if node.op_type != "Constant"]
    # The first node that reads a constant counts its parameters: decoding counts for what it decodes for.
    for node, row in zip(nodes, cost.per_node, strict=True):
        ends = _ends(constants, node)
        names = {end.name or "" for end in ends} | {n for end in ends for n in of_node.get(id(end), ())}
        parts.append(Part(frozenset(names - {""}), row.name, parameters=row.parameters, macs=row.macs))
    return tuple(parts), readers


def _ends(constants: Constants, node: ir.Node) -> list[ir.Node]:
    """A node, or for one that computes from constants alone those that read its result."""
    if not constants.is_derived(node):
        return [node]
    return [end for output in node.outputs for end in constants.readers(output)]


def _operators(model: Model) -> Iterator[tuple[str, Operator]]:
    from effic.ir.model import describe
    from effic.op_coverage import Operator

    imports = {id(f.graph): f.opset_imports for f in model.ir.functions.values()}
    for graph in model.graphs():
        versions = imports.get(id(graph), model.ir.opset_imports)
        for node in graph:
            if node.op_type != "Constant" and node.op_identifier() not in model.ir.functions:
                version = versions.get(node.domain, 0)
                yield describe(node), Operator(node.op_type, node.domain, version)


def measure_model(model: Model, path: Path, cost: ModelCost) -> Measurement:
    """The figures that are quick to take of a model that was read from ``path`` and is still as it was read."""
    tensors = _grouped(tensor_bytes(model))
    macs: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for node in cost.per_node:
        macs[node.name] += node.macs or 0
        parameters[node.name] += node.parameters
    return Measurement(
        file_bytes=file_bytes(model, path),
        weight_bytes=cost.weight_bytes,
        parameters=cost.parameters,
        macs=None if cost.macs_unknown else cost.macs,
        nodes=cost.nodes,
        macs_unknown=cost.macs_unknown,
        tensors=_largest_first(tensors),
        macs_by_node=_largest_first(macs),
        parameters_by_node=_largest_first(parameters),
        ops=_largest_first(Counter(cost.ops)),
    )


def _count(figure: Any) -> int | None:
    return None if figure is None else int(figure)


def _counts(rows: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): int(count) for name, count in rows.items()}


def _largest_first(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.most_common() if count}


def tensor_bytes(model: Model) -> Iterator[tuple[str, int]]:
    """Name and stored bytes of every constant: initializers and tensors of Constant nodes."""
    from effic.ir.model import constant_tensor

    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value.nbytes
    for node in model.nodes("Constant"):
        tensor = constant_tensor(node.outputs[0])
        if tensor is not None:
            yield node.outputs[0].name or "?", tensor.nbytes


def file_bytes(model: Model, path: Path) -> int:
    """Bytes of a model's file and of every external data file it names, each once."""
    files = {path.resolve()} | {file.resolve() for file in external_files(model)}
    return sum(file.stat().st_size for file in files)


def external_files(model: Model) -> set[Path]:
    """The external data files of a model as it was read."""
    return {Path(t.base_dir) / t.location for t in _external_tensors(model)}


def _external_tensors(model: Model) -> Iterable[Any]:
    import onnx_ir as ir

    from effic.ir.tensors import ScratchTensor

    tensors: list[Any] = []
    for graph in model.graphs():
        tensors += [value.const_value for value in graph.initializers.values()]
        for node in graph:
            tensors += [
                attr.value
                for attr in node.attributes.values()
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref()
            ]
    return [t for t in tensors if isinstance(t, ir.ExternalTensor) and not isinstance(t, ScratchTensor)]

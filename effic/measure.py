"""Figures of a model file that are the same at every run: what a budget can hold it to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from effic.ir.cost import ModelCost
    from effic.ir.model import Model

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
}


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

    def metric(self, name: str) -> int | None:
        """The figure called ``name`` (one of :data:`METRICS`), or None when it is unknown."""
        value: int | None = getattr(self, name)
        return value

    def why_not(self, name: str) -> str:
        """Why a figure is unknown, and what to do."""
        if name == "macs":
            count = self.macs_unknown
            return f"{count} of the nodes that multiply have unknown shapes; give the model static shapes"
        return "the record of it has no such figure; run 'effic gate --update'"

    def contributions(self, name: str) -> tuple[Contributor, dict[str, int]]:
        """What a figure is made of: the kind of contributor, and how much each contributes."""
        by = METRICS[name].by
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
        )


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
    return measure_model(model, Path(path), model_cost(model))


def measure_model(model: Model, path: Path, cost: ModelCost) -> Measurement:
    """Measure a model that was read from ``path`` and is still as it was read."""
    tensors: Counter[str] = Counter()
    for name, nbytes in tensor_bytes(model):
        tensors[name if nbytes >= SMALL_TENSOR else f"(tensors under {SMALL_TENSOR} B)"] += nbytes
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

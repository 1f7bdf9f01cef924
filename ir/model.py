"""Model: the onnx_ir model, where it came from, and the record of what was done to it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from effic.ir.tensors import Scratch

RECORD_KEY = "effic.record"
"""Key of the model's metadata under which the record of passes is stored as JSON."""

OPTIONAL_KEY = "effic.optional_inputs"
"""Key of the model's metadata with the names (a JSON list) of the inputs that are optional on purpose.

ONNX says that an input with an initializer is optional, but old exporters listed every weight among the
inputs; files do not tell the two apart otherwise."""

ONNX_DOMAINS = ("", "ai.onnx")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        front_end: ``"onnx"``, ``"torch"`` or ``"memory"``.
        path: the file it was read from, or None.
        sha256: hex digest of that file (the ``.onnx`` alone, without external data), or None.
        notes: what the reader changed or wants known, each a sentence.
    """

    front_end: Literal["onnx", "torch", "memory"] = "memory"
    path: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class PassRecord:
    """One pass that was applied: its text form, effic's version, what changed, and on what data.

    ``data`` is the sha256 of the calibration data for a pass that used some.
    """

    text: str
    version: str
    passed: int
    missed: int
    bytes_before: int
    bytes_after: int
    data: str | None = None


class Model:
    """A neural network on its way through effic.

    The graph itself is the public ``onnx_ir`` model in :attr:`ir`; passes rewrite it in place.

    Attributes:
        ir: the onnx_ir model.
        origin: where it came from.
        record: passes applied so far, oldest first (read from and written to the file's metadata).
        scratch: where passes put large new tensors (:meth:`add_initializer` does it for you).
    """

    def __init__(self, model: ir.Model, origin: Origin | None = None) -> None:
        self.ir = model
        self.origin = origin or Origin()
        self.scratch = Scratch()
        self.record: list[PassRecord] = _read_record(model.metadata_props.get(RECORD_KEY))

    # -- walking ---------------------------------------------------------------------------------

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.ir.graph

    def graphs(self) -> Iterator[ir.Graph]:
        """Every graph: the main one, the subgraphs of If/Loop/Scan, the bodies of functions."""
        yield self.ir.graph
        yield from self.ir.graph.subgraphs()
        for function in self.ir.functions.values():
            yield function.graph
            yield from function.subgraphs()

    def nodes(self, *op_types: str, domain: str | None = "") -> Iterator[ir.Node]:
        """Every node of the given operators in every graph, functions included.

        The list is taken before the first node is handed out, so that the caller may remove and
        insert nodes; nodes removed meanwhile are left out.

        Args:
            op_types: operator names; none means all operators.
            domain: operator domain; ``""`` is standard ONNX, ``None`` any domain.
        """
        wanted = set(op_types)
        found = [
            node
            for graph in self.graphs()
            for node in graph
            if (not wanted or node.op_type in wanted) and (domain is None or node.domain == domain)
        ]
        for node in found:
            if node.graph is not None:
                yield node

    @property
    def opset(self) -> int:
        """Version of the standard operator set (0 when the model imports none)."""
        return self.ir.opset_imports.get("", 0)

    # -- building --------------------------------------------------------------------------------

    def unique_name(self, base: str) -> str:
        """``base``, or ``base_1``, ``base_2`` … : a value name no graph of the model uses yet."""
        taken = self._names()
        name = base
        while name in taken:
            # Counted on per base: thousands of weights may derive their name from one.
            self._suffixes[base] = self._suffixes.get(base, 0) + 1
            name = f"{base}_{self._suffixes[base]}"
        taken.add(name)
        return name

    def _names(self) -> set[str]:
        # Built once per pass (the runner calls forget_names between passes): names only ever
        # grow while a pass runs, so a stale entry costs a suffix, never a clash.
        if not hasattr(self, "_taken"):
            self._taken: set[str] = set()
            self._suffixes: dict[str, int] = {}
            for graph in self.graphs():
                self._taken.update(v.name for v in graph.inputs if v.name)
                self._taken.update(graph.initializers)
                for node in graph:
                    self._taken.update(v.name for v in node.outputs if v.name)
        return self._taken

    def forget_names(self) -> None:
        """Drop the cache behind :meth:`unique_name`, after nodes were named by other means."""
        if hasattr(self, "_taken"):
            del self._taken

    def add_initializer(
        self,
        graph: ir.Graph,
        name: str,
        tensor: np.ndarray | ir.TensorProtocol,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A new constant in ``graph``, under ``name`` or the next free name.

        A function body cannot hold initializers in ONNX: there a Constant node is made instead, at
        the front of the body. Large arrays are spilled to disk.

        Returns:
            The value to feed to nodes, with type and shape set.
        """
        name = self.unique_name(name)
        if isinstance(tensor, (np.ndarray, np.generic)):
            # Arithmetic on an array of rank 0 makes a NumPy scalar of it.
            tensor = self.scratch.tensor(name, np.asarray(tensor), dtype)
        tensor.name = name
        if self.is_function_body(graph):
            node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
            value = node.outputs[0]
            value.name = name
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(list(tensor.shape))  # type: ignore[arg-type]
            value.const_value = tensor
            if len(graph):
                graph.insert_before(graph[0], node)
            else:
                graph.append(node)
            return value
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(list(tensor.shape)),  # type: ignore[arg-type]
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def is_function_body(self, graph: ir.Graph) -> bool:
        """Whether ``graph`` is the body of a model-local function."""
        return any(function.graph is graph for function in self.ir.functions.values())

    def replace_value(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that reads ``old`` read ``new``, graph outputs included.

        A graph output keeps its name, type and place. Where ``new`` cannot carry the output's name
        (it is a graph input, an initializer, an output already, or lives in an outer graph), an
        Identity is inserted before the output.
        """
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            return
        graph = old.graph
        assert graph is not None
        movable = (
            new.producer() is not None
            and new.graph is graph
            and not new.is_graph_output()
            and not new.is_graph_input()
        )
        name = old.name
        if movable:
            # What the output declares to callers stays, even where more or less is known of ``new``.
            new.type, new.shape = old.type or new.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name = None
            new.name = name
            return
        identity = ir.Node("", "Identity", [new], num_outputs=1)
        out = identity.outputs[0]
        out.type, out.shape = old.type or new.type, old.shape
        graph.append(identity)
        for node, index in tuple(old.uses()):
            node.replace_input_with(index, new)
        for i, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[i] = out
        old.name = None
        out.name = name

    def clone(self) -> Model:
        """An independent copy of the graph; tensors are shared (they are never changed in place)."""
        other = Model(self.ir.clone(), self.origin)
        other.scratch = self.scratch
        other.record = [dataclasses.replace(r) for r in self.record]
        return other

    # -- record and file -------------------------------------------------------------------------

    def write_record(self) -> None:
        """Put the record of passes into the onnx metadata, where ``save`` and readers find it."""
        if self.record:
            rows = [dataclasses.asdict(r) for r in self.record]
            self.ir.metadata_props[RECORD_KEY] = json.dumps(rows, separators=(",", ":"))

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the model as ONNX; see :func:`effic.ir.onnx_format.write_onnx` for the options."""
        from effic.ir.onnx_format import write_onnx

        write_onnx(self, path, **options)


def optional_inputs(model: ir.Model) -> set[str]:
    """Names of the inputs that are optional on purpose, see :data:`OPTIONAL_KEY`."""
    try:
        found = json.loads(model.metadata_props.get(OPTIONAL_KEY, "[]"))
    except (ValueError, RecursionError):
        return set()
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant behind a value: an initializer's or a Constant node's tensor, or None.

    Only initializers that no caller can override count; reading demotes weights that old exporters
    listed among the graph inputs, so an initializer that is still an input is the user's.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ONNX_DOMAINS:
        return None
    for key in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        attr = node.attributes.get(key)
        if attr is None or attr.is_ref():
            continue
        if key == "value":
            # Not as_tensor(): its check of the tensor protocol costs more than all the rest here.
            tensor: ir.TensorProtocol = attr.value
            return tensor
        dtype = np.float32 if "float" in key else np.int64
        return ir.Tensor(np.asarray(attr.value, dtype=dtype), name=value.name)
    return None


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The constant behind a value as an array of its own, or None (for small constants)."""
    tensor = constant_tensor(value)
    return None if tensor is None else np.array(tensor.numpy())


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, or None when several do or it is a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def describe(node: ir.Node) -> str:
    """A node as people are told about it: its operator and its name (or first output)."""
    name = node.name or (node.outputs[0].name if node.outputs else None) or "?"
    return f"{node.op_type} '{name}'"


def noted_text(found: object) -> str | None:
    """A text that somebody noted in metadata, or None where it is none, or none that a file can hold.

    (JSON can write half of a surrogate pair.)
    """
    if not isinstance(found, str) or not found:
        return None
    try:
        found.encode()
    except UnicodeEncodeError:
        return None
    return found


def _read_record(text: str | None) -> list[PassRecord]:
    if not text:
        return []
    try:
        rows = [PassRecord(**row) for row in json.loads(text)]
        return rows if all(map(_is_record, rows)) else []
    except (ValueError, TypeError, RecursionError):
        # Someone else's metadata under our key: not ours to trust, and not worth failing for.
        return []


def _is_record(row: PassRecord) -> bool:
    texts = (row.text, row.version) if row.data is None else (row.text, row.version, row.data)
    counts = (row.passed, row.missed, row.bytes_before, row.bytes_after)
    return all(noted_text(one) is not None for one in texts) and all(
        type(one) is int and abs(one) < 1 << 63 for one in counts
    )

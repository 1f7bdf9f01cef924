"""Check a parsed ModelProto before anything is built from it.

One walk over the graph, its subgraphs and the functions. It reads names, types and sizes, never a
payload, and allocates nothing by a size the file declares. The first fault ends it with an
:class:`~effic.ir.errors.InvalidModelError` of one sentence.

Two harmless habits of exporters are put right on the way: the domain ``ai.onnx`` is written ``""``,
and a negative dimension of a declared shape (meant as "unknown") is made unknown.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

import onnx
import onnx_ir as ir

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.external_files import DataFiles, ExternalDataError

_ATTRIBUTE = onnx.AttributeProto
_TENSOR = onnx.TensorProto
_DATA_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
# The field of a TensorProto that holds elements of a type when raw_data does not (onnx.proto).
_FIELD_OF_TYPE: dict[int, str] = {
    _TENSOR.FLOAT: "float_data",
    _TENSOR.COMPLEX64: "float_data",
    _TENSOR.DOUBLE: "double_data",
    _TENSOR.COMPLEX128: "double_data",
    _TENSOR.INT64: "int64_data",
    _TENSOR.UINT32: "uint64_data",
    _TENSOR.UINT64: "uint64_data",
    _TENSOR.STRING: "string_data",
}
_KNOWN_TYPES = {int(t) for t in ir.DataType if t != ir.DataType.UNDEFINED}
_STANDARD = ("", "ai.onnx")
_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single
_ONNX = f"onnx {onnx.__version__}"
_UPGRADE = "upgrade the package 'onnx', or export the model again"
# numpy's limit, and the largest number of bytes an array may be declared with.
_MAX_RANK, _MAX_BYTES = 64, 1 << 62


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a model file may be before it is refused.

    Attributes:
        nodes: nodes in all graphs together, functions counted at each call.
        depth: subgraphs inside subgraphs.
        functions: model-local functions.
        structure_bytes: bytes of the file that are not long tensor payloads; they are parsed in memory.
    """

    nodes: int = 1_000_000
    # protobuf's own limit of 100 messages ends at about 32 subgraphs; exporters rarely pass 4.
    depth: int = 24
    functions: int = 20_000
    structure_bytes: int = 1 << 30


@dataclasses.dataclass(frozen=True)
class Found:
    """What the checks found and allowed.

    Attributes:
        notes: what was put right, each a sentence.
        sorted: whether every node comes after the nodes it reads.
    """

    notes: list[str]
    sorted: bool


def check_model(proto: onnx.ModelProto, name: str, files: DataFiles, limits: Limits) -> Found:
    """Check ``proto`` and put harmless habits right in it.

    Args:
        proto: the parsed file.
        name: the file's name, for the error texts.
        files: where external data may lie.
        limits: how large the model may be.

    Raises:
        InvalidModelError: what is wrong, where, and what to do.
    """
    checker = _Checker(name, files, limits)
    return Found(checker.model(proto), checker.sorted)


def printable(text: str) -> str:
    """``text`` on one line, short, and without characters that would steer a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"


def refuse_name(path: str | os.PathLike[str]) -> None:
    """Refuse a path that ONNX, whose texts are UTF-8, cannot name.

    Raises:
        UsageError: it holds other bytes.
    """
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        shown = printable(os.path.abspath(path))
        raise UsageError(f"the path {shown} is not valid UTF-8, as ONNX needs it; rename it.") from error


class _Checker:
    def __init__(self, name: str, files: DataFiles, limits: Limits) -> None:
        self.name = name
        self.files = files
        self.limits = limits
        self.nodes = 0
        self.opsets: Mapping[str, int] = {}
        # Functions of the model that take the place of standard operators.
        self.overridden: set[tuple[str, str]] = set()
        # Attributes the function that is being checked declares; None outside functions.
        self.declared: set[str] | None = None
        # Per enclosing graph, the values made before the node that is being checked.
        self.visible: list[set[str]] = []
        self.negative_dims = 0
        self.sorted = True

    def fail(self, text: str, advice: str = "export the model again") -> NoReturn:
        raise InvalidModelError(f"{self.name}: {printable(text)}; {advice}.")

    def text(self, value: object, what: str) -> str:
        # protobuf hands out bytes where a string is no UTF-8.
        if not isinstance(value, str):
            self.fail(f"{what} is not valid UTF-8")
        return value

    # -- model -----------------------------------------------------------------------------------

    def model(self, proto: onnx.ModelProto) -> list[str]:
        if not proto.HasField("graph"):
            self.fail("the file holds no graph", "is this an ONNX model? Export or download it again")
        if not 1 <= proto.ir_version <= onnx.IR_VERSION:
            self.fail(
                f"its IR version is {proto.ir_version}, and {_ONNX} knows 1 to {onnx.IR_VERSION}",
                _UPGRADE,
            )
        for field in ("producer_name", "producer_version", "domain", "doc_string"):
            self.text(getattr(proto, field), f"the model's {field}")
        self.metadata(proto.metadata_props, "the model")
        self.opsets = self.opset_imports(proto.opset_import, "the model")
        self.overridden = {(f.name, f.overload) for f in proto.functions if f.domain in _STANDARD}
        self.functions(proto)
        self.nodes = 0
        self.graph(proto.graph, [], 0)
        self.expansion(proto)
        notes = []
        if self.negative_dims:
            notes.append(f"{self.negative_dims} negative dimensions in declared shapes were read as unknown.")
        if proto.training_info:
            notes.append("The model's training_info was left out.")
        return notes

    def metadata(self, props: Iterable[onnx.StringStringEntryProto], owner: str) -> None:
        for prop in props:
            self.text(prop.key, f"a metadata key of {owner}")
            self.text(prop.value, f"metadata '{prop.key}' of {owner}")

    def opset_imports(self, imports: Iterable[onnx.OperatorSetIdProto], owner: str) -> dict[str, int]:
        found: dict[str, int] = {}
        newest = onnx.defs.onnx_opset_version()
        for entry in imports:
            domain = self.text(entry.domain, f"an opset domain of {owner}")
            if domain in _STANDARD:
                entry.domain = domain = ""
                if not 1 <= entry.version <= newest:
                    self.fail(
                        f"{owner} imports opset {entry.version}, and {_ONNX} knows 1 to {newest}",
                        _UPGRADE,
                    )
            if found.setdefault(domain, entry.version) != entry.version:
                self.fail(f"{owner} imports two versions of the domain '{domain or 'ai.onnx'}'")
        if not found:
            self.fail(f"{owner} imports no operator set")
        return found

    # -- functions -------------------------------------------------------------------------------

    def functions(self, proto: onnx.ModelProto) -> None:
        if len(proto.functions) > self.limits.functions:
            self.fail(f"it has {len(proto.functions)} functions, more than {self.limits.functions}")
        model_opsets = self.opsets
        seen: set[tuple[str, str, str]] = set()
        for function in proto.functions:
            name = self.text(function.name, "a function's name")
            where = f"function '{name}'"
            for field in ("domain", "overload", "doc_string"):
                self.text(getattr(function, field), f"the {field} of {where}")
            self.metadata(function.metadata_props, where)
            if function.domain == "ai.onnx":
                function.domain = ""
            key = (function.domain, name, function.overload)
            if key in seen:
                self.fail(f"two functions are called '{key[0]}.{name}'")
            seen.add(key)
            self.opsets = self.opset_imports(function.opset_import, where)
            self.declared = {self.text(a, f"an attribute of {where}") for a in function.attribute}
            self.declared.update(a.name for a in function.attribute_proto)
            defined: set[str] = set()
            for value in function.input:
                self.define(value, defined, f"an input of {where}")
            self.attributes(function.attribute_proto, where, [defined], 0)
            self.value_infos(function.value_info, where)
            self.body(function.node, [defined], where, 0)
            for value in function.output:
                if value not in defined:
                    self.fail(f"{where} returns '{value}', which nothing in it makes")
        self.opsets, self.declared = model_opsets, None

    def expansion(self, proto: onnx.ModelProto) -> None:
        """Refuse functions that call themselves, and calls that would unfold beyond the node limit."""
        bodies = {(f.domain, f.name, f.overload): f for f in proto.functions}
        if not bodies:
            return
        calls = {key: list(_calls(function.node, bodies)) for key, function in bodies.items()}
        cost: dict[tuple[str, str, str], int] = {}
        for root in bodies:
            # Depth first without recursion: the functions on the way down, each with its calls to go.
            way = {root: iter(calls[root])} if root not in cost else {}
            while way:
                key = next(reversed(way))
                callee = next((c for c in way[key] if c not in cost), None)
                if callee is None:
                    unfolded = len(bodies[key].node) + sum(cost[c] for c in calls[key])
                    cost[key] = min(unfolded, self.limits.nodes + 1)
                    del way[key]
                elif callee in way:
                    self.fail(f"function '{callee[1]}' calls itself, directly or through others")
                else:
                    way[callee] = iter(calls[callee])
        total = self.nodes + sum(cost[key] for key in _calls(proto.graph.node, bodies))
        if total > self.limits.nodes:
            self.fail(f"its functions unfold to more than {self.limits.nodes} nodes")

    # -- graphs ----------------------------------------------------------------------------------

    def graph(self, proto: onnx.GraphProto, scopes: list[set[str]], depth: int) -> set[str]:
        """Check a graph; returns the outer values it reads."""
        where = "the graph" if depth == 0 else f"subgraph '{self.text(proto.name, 'a graph name')}'"
        if depth > self.limits.depth:
            self.fail(f"subgraphs are nested more than {self.limits.depth} deep")
        self.text(proto.name, "the graph's name")
        self.text(proto.doc_string, f"the doc string of {where}")
        self.metadata(proto.metadata_props, where)
        if proto.sparse_initializer:
            name = proto.sparse_initializer[0].values.name
            self.fail(
                f"initializer '{name}' is stored as a sparse tensor, which effic does not read",
                "store it dense",
            )
        defined: set[str] = set()
        for info in proto.input:
            self.define(info.name, defined, f"an input of {where}")
        self.value_infos(proto.input, where)
        self.value_infos(proto.value_info, where)
        inputs = {info.name: info for info in proto.input}
        initializers: set[str] = set()
        for tensor in proto.initializer:
            name = self.define(tensor.name, initializers, f"an initializer of {where}")
            self.tensor(tensor, f"initializer '{name}'")
            if name in inputs:
                self.same_shape(tensor, inputs[name])
        defined |= initializers
        reads = self.body(proto.node, [*scopes, defined], where, depth)
        self.value_infos(proto.output, where)
        for info in proto.output:
            if info.name not in defined:
                self.fail(f"{where} returns '{info.name}', which nothing in it makes")
        for annotation in proto.quantization_annotation:
            self.text(annotation.tensor_name, f"a quantization annotation of {where}")
            self.metadata(annotation.quant_parameter_tensor_names, "a quantization annotation")
        return reads

    def define(self, name: object, defined: set[str], what: str, *, values: bool = True) -> str:
        name = self.text(name, f"the name of {what}")
        if not name:
            self.fail(f"{what} has no name")
        if name in defined:
            self.fail(f"{what} is called '{name}', a name that is already taken")
        if values and any(name in names for names in self.visible):
            self.fail(f"{what} is called '{name}', like a value of an enclosing graph")
        defined.add(name)
        return name

    def body(
        self, nodes: Iterable[onnx.NodeProto], scopes: list[set[str]], where: str, depth: int
    ) -> set[str]:
        """Check the nodes of one graph; adds their outputs to the last scope, returns outer reads."""
        nodes = list(nodes)
        self.nodes += len(nodes)
        if self.nodes > self.limits.nodes:
            self.fail(f"it has more than {self.limits.nodes} nodes")
        defined = scopes[-1]
        made = set(defined)
        for node in nodes:
            op = self.text(node.op_type, "an operator's name")
            for name in node.output:
                if name:
                    self.define(name, defined, f"an output of a node of type {op}")
        reads: list[set[str]] = []
        self.visible.append(made)
        for node in nodes:
            reads.append(self.node(node, scopes, depth))
            made.update(node.output)
        self.visible.pop()
        self.order(nodes, reads, where)
        return set().union(*reads) - defined

    def node(self, node: onnx.NodeProto, scopes: list[set[str]], depth: int) -> set[str]:
        """Check a node; returns every value it reads, those of its subgraphs included."""
        op = node.op_type
        if not op:
            self.fail("a node has no operator")
        name = self.text(node.name, f"the name of a node of type {op}")
        where = f"{op} '{name or (node.output[0] if node.output else '')}'"
        for field in ("domain", "overload", "doc_string"):
            self.text(getattr(node, field), f"the {field} of {where}")
        self.metadata(node.metadata_props, where)
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.domain == "" and "" not in self.opsets:
            self.fail(f"{where} is a standard operator, but no version of the standard set is imported")
        reads: set[str] = set()
        for value in node.input:
            if value == "":
                continue
            self.text(value, f"an input of {where}")
            if not any(value in scope for scope in reversed(scopes)):
                self.fail(f"{where} reads '{value}', which nothing makes")
            reads.add(value)
        if node.domain == "" and (node.op_type, node.overload) not in self.overridden:
            self.operator(node, where)
        return reads | self.attributes(node.attribute, where, scopes, depth)

    def operator(self, node: onnx.NodeProto, where: str) -> None:
        """Refuse a node of the standard set with too few inputs or too many, or an attribute of another type."""
        schema = schema_of(node.op_type, self.opsets[""])
        if schema is None:
            return  # Who runs or rewrites it will say so.
        for index, wanted in enumerate(schema.inputs[: schema.min_input]):
            if index >= len(node.input) or (not node.input[index] and wanted.option == _SINGLE):
                self.fail(f"{where} lacks its input '{wanted.name}'")
        if len(node.input) > schema.max_input:
            self.fail(f"{where} has {len(node.input)} inputs, at most {schema.max_input} are allowed")
        if len(node.output) < schema.min_output:
            self.fail(f"{where} has fewer than {schema.min_output} outputs")
        for attribute in node.attribute:
            known = schema.attributes.get(attribute.name)
            if known is None or attribute.ref_attr_name or attribute.type == _ATTRIBUTE.UNDEFINED:
                continue
            wanted_type, kind = (
                str(known.type).rpartition(".")[2],
                _ATTRIBUTE.AttributeType.Name(attribute.type),
            )
            if kind != wanted_type:
                self.fail(f"attribute '{attribute.name}' of {where} is {kind}, not {wanted_type}")

    def order(self, nodes: list[onnx.NodeProto], reads: list[set[str]], where: str) -> None:
        """Refuse cycles. Nodes that are merely out of order are sorted later."""
        made_by = {name: i for i, node in enumerate(nodes) for name in node.output if name}
        waits = [{made_by[name] for name in names if name in made_by} for names in reads]
        if all(not needs or max(needs) < i for i, needs in enumerate(waits)):
            return
        self.sorted = False
        readers: dict[int, list[int]] = {}
        for i, needs in enumerate(waits):
            for need in needs:
                readers.setdefault(need, []).append(i)
        left = [len(needs) for needs in waits]
        ready = [i for i, count in enumerate(left) if count == 0]
        done = 0
        while ready:
            done += 1
            for reader in readers.get(ready.pop(), ()):
                left[reader] -= 1
                if left[reader] == 0:
                    ready.append(reader)
        if done < len(nodes):
            node = nodes[next(i for i, count in enumerate(left) if count)]
            name = node.name or (node.output[0] if node.output else "")
            self.fail(f"the nodes of {where} form a cycle that {node.op_type} '{name}' is on or behind")

    # -- attributes ------------------------------------------------------------------------------

    def attributes(
        self, attributes: Iterable[onnx.AttributeProto], where: str, scopes: list[set[str]], depth: int
    ) -> set[str]:
        seen: set[str] = set()
        reads: set[str] = set()
        for attribute in attributes:
            name = self.define(attribute.name, seen, f"an attribute of {where}", values=False)
            here = f"attribute '{name}' of {where}"
            if attribute.ref_attr_name:
                if self.declared is None:
                    self.fail(f"{here} refers to a function's attribute, but is in no function")
                if attribute.ref_attr_name not in self.declared:
                    self.fail(f"{here} refers to an attribute its function does not declare")
                continue
            kind = attribute.type
            if kind == _ATTRIBUTE.UNDEFINED:
                self.fail(f"{here} has no type, or one onnx {onnx.__version__} does not know")
            if kind in (_ATTRIBUTE.SPARSE_TENSOR, _ATTRIBUTE.SPARSE_TENSORS):
                self.fail(f"{here} is a sparse tensor, which effic does not read", "store it dense")
            for string in attribute.strings:
                # A single string may be any bytes (custom operators use that); a list may not.
                try:
                    string.decode()
                except UnicodeDecodeError:
                    self.fail(f"{here} holds a string that is not valid UTF-8")
            if kind == _ATTRIBUTE.TENSOR:
                self.tensor(attribute.t, here)
            for tensor in attribute.tensors:
                self.tensor(tensor, here)
            if kind == _ATTRIBUTE.GRAPH:
                reads |= self.graph(attribute.g, scopes, depth + 1)
            for graph in attribute.graphs:
                reads |= self.graph(graph, scopes, depth + 1)
            if kind == _ATTRIBUTE.TYPE_PROTO:
                self.type(attribute.tp, here)
            for tp in attribute.type_protos:
                self.type(tp, here)
        return reads

    # -- types and tensors -----------------------------------------------------------------------

    def value_infos(self, infos: Iterable[onnx.ValueInfoProto], where: str) -> None:
        for info in infos:
            self.text(info.name, f"the name of a value of {where}")
            self.text(info.doc_string, f"the doc string of '{info.name}'")
            self.metadata(info.metadata_props, f"'{info.name}'")
            self.type(info.type, f"'{info.name}'")

    def type(self, proto: onnx.TypeProto, where: str) -> None:
        self.text(proto.denotation, f"the denotation of {where}")
        kind = proto.WhichOneof("value")
        if kind is None:
            return
        if kind in ("sequence_type", "optional_type"):
            self.type(getattr(proto, kind).elem_type, where)
        elif kind in ("tensor_type", "sparse_tensor_type"):
            tensor = getattr(proto, kind)
            if tensor.elem_type and tensor.elem_type not in _KNOWN_TYPES:
                self.fail(f"{where} is of element type number {tensor.elem_type}, which does not exist")
            for dim in tensor.shape.dim:
                self.text(dim.dim_param, f"a dimension of {where}")
                self.text(dim.denotation, f"a dimension of {where}")
                if dim.dim_value < 0:
                    dim.ClearField("dim_value")
                    self.negative_dims += 1
        else:
            self.fail(f"{where} is of a {kind.replace('_', ' ')}, which effic does not read")

    def same_shape(self, tensor: onnx.TensorProto, info: onnx.ValueInfoProto) -> None:
        declared = info.type.tensor_type
        if declared.elem_type and declared.elem_type != tensor.data_type:
            self.fail(f"input '{info.name}' is declared with another type than its initializer")
        if not declared.HasField("shape"):
            return
        dims = [d.dim_value if d.HasField("dim_value") else None for d in declared.shape.dim]
        if len(dims) != len(tensor.dims) or any(
            d is not None and d != t for d, t in zip(dims, tensor.dims, strict=True)
        ):
            self.fail(f"input '{info.name}' is declared with another shape than its initializer")

    def tensor(self, tensor: onnx.TensorProto, where: str) -> None:
        self.text(tensor.name, f"the name of {where}")
        self.text(tensor.doc_string, f"the doc string of {where}")
        if tensor.data_type not in _KNOWN_TYPES:
            self.fail(f"{where} is of element type number {tensor.data_type}, which does not exist")
        if any(d < 0 for d in tensor.dims):
            self.fail(f"{where} has the negative dimension {min(tensor.dims)}")
        if len(tensor.dims) > _MAX_RANK or math.prod(d for d in tensor.dims if d) >= _MAX_BYTES:
            self.fail(f"{where} is declared with a shape no machine can hold")
        if tensor.HasField("segment"):
            self.fail(f"{where} is stored in segments, which effic does not read")
        dtype = ir.DataType(tensor.data_type)
        shape = "[" + ",".join(map(str, tensor.dims)) + "]"
        elements = math.prod(tensor.dims)
        expected = elements if dtype == ir.DataType.STRING else -(-elements * dtype.bitwidth // 8)
        fields = [
            f for f in _DATA_FIELDS if (tensor.HasField(f) if f == "raw_data" else len(getattr(tensor, f)))
        ]
        if tensor.data_location == _TENSOR.EXTERNAL:
            if fields:
                self.fail(f"{where} has its values in the file and in external data at once")
            if dtype == ir.DataType.STRING:
                self.fail(f"{where} holds strings in external data, which ONNX does not allow")
            self.external(tensor, expected, f"{where} of shape {shape} ({dtype.name})")
            return
        if len(fields) > 1:
            self.fail(f"{where} has its values twice, in {fields[0]} and {fields[1]}")
        field = fields[0] if fields else "raw_data"
        if field == "raw_data":
            if dtype == ir.DataType.STRING:
                unit, got = "strings", 0
                if fields:
                    self.fail(f"{where} holds strings as raw bytes, which ONNX does not allow")
            else:
                unit, got = "bytes", len(tensor.raw_data)
        else:
            right = _FIELD_OF_TYPE.get(tensor.data_type, "int32_data")
            if field != right:
                self.fail(f"{where} of type {dtype.name} has its values in {field}, not {right}")
            unit, got = "values", len(getattr(tensor, field))
            expected = elements
            if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
                expected = 2 * elements
            elif dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
                # Packed in int32_data as in raw_data, one byte to an entry.
                expected = -(-elements * dtype.bitwidth // 8)
        if got != expected:
            self.fail(f"{where} of shape {shape} ({dtype.name}) needs {expected} {unit} but holds {got}")

    def external(self, tensor: onnx.TensorProto, expected: int, where: str) -> None:
        entries: dict[str, str] = {}
        for entry in tensor.external_data:
            key = self.text(entry.key, f"an external data key of {where}")
            if key in entries:
                self.fail(f"{where} gives the {key} of its external data twice")
            entries[key] = self.text(entry.value, f"the external data of {where}")
        numbers: dict[str, int | None] = {}
        for key in ("offset", "length"):
            text = entries.get(key)
            if text is not None and not re.fullmatch(r"[0-9]{1,19}", text):
                self.fail(f"{where} has the external data {key} {text[:40]!r}, which is no size")
            numbers[key] = None if text is None else int(text)
        length = numbers["length"]
        if length is not None and length != expected and entries.get("location") == self.files.marker:
            self.fail(f"{where} needs {expected} bytes but holds {length}")
        if length is not None and length != expected:
            self.fail(f"{where} needs {expected} bytes but its external data has {length}")
        try:
            location = self.files.check(entries.get("location", ""), numbers["offset"] or 0, expected)
        except ExternalDataError as error:
            self.fail(
                f"{where} has external data {error}",
                "copy the data file to where the model expects it, or export again",
            )
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


@functools.cache
def schema_of(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """What an operator of the standard set takes at an opset, or None when there is no such operator."""
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _calls(
    nodes: Iterable[onnx.NodeProto], bodies: Mapping[tuple[str, str, str], onnx.FunctionProto]
) -> Iterable[tuple[str, str, str]]:
    """Keys of the functions the nodes call, subgraphs included, once per call."""
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        if key in bodies:
            yield key
        for attribute in node.attribute:
            if attribute.type == _ATTRIBUTE.GRAPH:
                yield from _calls(attribute.g.node, bodies)
            for graph in attribute.graphs:
                yield from _calls(graph.node, bodies)

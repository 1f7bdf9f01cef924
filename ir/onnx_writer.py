"""Write ``.onnx`` files: streaming, atomic, the same bytes for the same model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import google.protobuf.message
import onnx
import onnx_ir as ir

from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.file_map import FileMap
from effic.ir.mapped import MappedTensor
from effic.ir.model import Model
from effic.ir.onnx_checks import refuse_name
from effic.ir.protobuf_scan import field_header, skeleton
from effic.ir.tensors import drop_pages
from effic.ir.whole_files import Before, WholeFiles

# Tensors smaller than this stay in the .onnx file when the rest is external: shapes, axes and scales
# are read by shape inference, and a location costs about a hundred bytes itself.
SMALL_BYTES = 1024
# Constants of nodes are folded and matched on more often, and leave the file only when they are weights.
SMALL_ATTRIBUTE_BYTES = 1 << 16
# A protobuf message cannot be larger (its sizes are signed 32-bit numbers).
PROTOBUF_BYTES = (1 << 31) - 1
# Where a payload starts in the data file: vector loads like 64, memory maps whole pages.
ALIGN_BYTES = 64
PAGE_BYTES, PAGE_ALIGN_FROM = 4096, 1 << 16

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9

Progress = Callable[[int, int], None]


def write_onnx(
    model: Model,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    external: bool | None = None,
    external_threshold: int = 100 << 20,
    progress: Progress | None = None,
    before_commit: Before | None = None,
) -> None:
    """Write a model, one tensor in memory at a time, all or nothing.

    The new files are written under temporary names and renamed when they are complete, data first.
    When the data file's name is taken (a model written over an older one), the new data gets a name
    of its own, so that at every moment the ``.onnx`` file refers to the data it was written with;
    the older data file is removed last, unless another model beside it reads it. A process that is
    killed leaves the old model or the new one, whole, and perhaps files that nothing refers to: see
    :class:`effic.ir.whole_files.WholeFiles`.

    Args:
        model: stays usable, also when it was read from ``path`` itself.
        path: the ``.onnx`` file; external data goes to ``<path>.data`` beside it.
        force: overwrite an existing file.
        external: put weights into a data file; None decides by ``external_threshold``.
        external_threshold: bytes of weights above which they are external.
        progress: called with (bytes written, bytes in total).
        before_commit: called with the new files' names and stamps when they are complete, before they take them.

    Raises:
        UsageError: ``path`` exists and ``force`` is not given, or its folder cannot be written.
        UnsupportedError: a single file was asked for, and protobuf cannot hold it (2 GiB).
    """
    path = os.fspath(path)
    refuse_name(path)
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; name a file to write.")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists; pass --force (force=True) to overwrite it.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"the folder {os.path.dirname(path)} does not exist; make it first.")
    model.write_record()
    folder, name = os.path.split(path)
    replaces = os.path.lexists(path)
    stale = _data_files(folder, name) if replaces else []
    if external is None:
        external = sum(p.nbytes for p in _payloads(model.ir)) > external_threshold
    try:
        with WholeFiles() as files:
            write = _write_external if external else _write_single
            write(model.ir, files, folder, name, progress or (lambda done, total: None))
            _keep_readable(model.ir, [path, *stale])
            files.commit(before_commit)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error
    for old in stale:
        with contextlib.suppress(OSError):
            os.unlink(old)


def to_proto(model: Model) -> onnx.ModelProto:
    """The model as one protobuf message with every weight in it (for models that fit in memory).

    Raises:
        UnsupportedError: the message would be larger than protobuf allows (2 GiB).
    """
    payloads = _payloads(model.ir)
    total = sum(p.nbytes for p in payloads)
    if total > PROTOBUF_BYTES:
        raise _too_large(total)
    with _swapped([(p, _inline(p.tensor)) for p in payloads if isinstance(p.tensor, ir.ExternalTensor)]):
        return _serialize(model.ir)


def model_bytes(model: Model) -> int:
    """Bytes the model takes when stored: weights and structure, wherever they lie."""
    large = [p for p in _payloads(model.ir) if p.streamable and p.nbytes >= SMALL_BYTES]
    with _swapped([(p, p.placeholder("", 0)) for p in large]):
        structure = int(_serialize(model.ir).ByteSize())
    return structure + sum(p.nbytes for p in large)


def file_bytes_of(model: Model, external: bool | None = None, threshold: int = 100 << 20) -> int:
    """Bytes of the files that :func:`write_onnx` would write.

    Args:
        model: the model.
        external: as there.
        threshold: ``external_threshold`` there.
    """
    payloads = _payloads(model.ir)
    if external is None:
        external = sum(p.nbytes for p in payloads) > threshold
    padding = 0
    for payload in payloads if external else []:
        if payload.streamable and payload.nbytes >= PAGE_ALIGN_FROM:
            padding += -payload.nbytes % PAGE_BYTES
    return model_bytes(model) + padding


# -- the two layouts -------------------------------------------------------------------------------


def _write_external(model: ir.Model, files: WholeFiles, folder: str, name: str, progress: Progress) -> None:
    data_name = f"{name}.data"
    number = 0
    while os.path.lexists(os.path.join(folder, data_name)):
        number += 1
        data_name = f"{name}.{number}.data"
    swaps: list[tuple[_Payload, ir.TensorProtocol]] = []
    layout: list[tuple[int, _Payload]] = []
    at = 0
    for payload in _payloads(model):
        if payload.streamable and payload.nbytes >= (SMALL_ATTRIBUTE_BYTES if payload.node else SMALL_BYTES):
            step = PAGE_BYTES if payload.nbytes >= PAGE_ALIGN_FROM else ALIGN_BYTES
            at = -(-at // step) * step
            swaps.append((payload, payload.placeholder(data_name, at)))
            layout.append((at, payload))
            at += payload.nbytes
        elif isinstance(payload.tensor, ir.ExternalTensor):
            swaps.append((payload, _inline(payload.tensor)))
    with _swapped(swaps):
        structure = _to_bytes(_serialize(model))
    total = at + len(structure)
    if layout:
        data = files.create(folder, data_name)
        for offset, payload in layout:
            data.write(b"\0" * (offset - data.tell()))
            _stream(payload.tensor, data)
            progress(data.tell(), total)
    files.create(folder, name).write(structure)
    progress(total, total)


def _write_single(model: ir.Model, files: WholeFiles, folder: str, name: str, progress: Progress) -> None:
    payloads = _payloads(model)
    total = sum(p.nbytes for p in payloads)
    if total > PROTOBUF_BYTES:
        raise _too_large(total)
    swaps: list[tuple[_Payload, ir.TensorProtocol]] = []
    streamed: dict[str, ir.TensorProtocol] = {}
    for payload in payloads:
        # Only the main graph's initializers can be appended; the rest goes through the proto.
        if payload.in_main and payload.streamable and payload.nbytes >= SMALL_BYTES:
            swaps.append((payload, payload.placeholder("", 0)))
            streamed[payload.name] = payload.tensor
        elif isinstance(payload.tensor, ir.ExternalTensor):
            swaps.append((payload, _inline(payload.tensor)))
    with _swapped(swaps):
        proto = _serialize(model)
    # Initializers are appended to the graph's other fields, one by one: protobuf does not care about
    # the order of different fields.
    entries: list[tuple[bytes, ir.TensorProtocol | None]] = []
    length = 0
    for tensor in proto.graph.initializer:
        payload_tensor = streamed.get(tensor.name)
        fields, payload_bytes = b"", 0
        if payload_tensor is not None:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            payload_bytes = payload_tensor.nbytes
            fields = field_header(_RAW_DATA, payload_bytes)
        fields = tensor.SerializeToString() + fields
        entry = field_header(_INITIALIZER, len(fields) + payload_bytes) + fields
        entries.append((entry, payload_tensor))
        length += len(entry) + payload_bytes
    del proto.graph.initializer[:]
    body = _to_bytes(proto.graph)
    proto.ClearField("graph")
    head = _to_bytes(proto) + field_header(_GRAPH, len(body) + length)
    size = len(head) + len(body) + length
    if size > PROTOBUF_BYTES:
        raise _too_large(size)
    file = files.create(folder, name)
    file.write(head + body)
    for entry, payload_tensor in entries:
        file.write(entry)
        if payload_tensor is not None:
            _stream(payload_tensor, file)
            progress(file.tell(), size)
    progress(size, size)


def _too_large(size: int) -> UnsupportedError:
    return UnsupportedError(
        f"{size} bytes are more than one protobuf file can hold (2 GiB); write with external data."
    )


# -- tensors ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Payload:
    """A tensor of the model and the place it is held in: an initializer, or an attribute of a node."""

    tensor: ir.TensorProtocol
    name: str
    nbytes: int
    in_main: bool = False
    value: ir.Value | None = None
    node: ir.Node | None = None
    movable: bool = True

    @property
    def streamable(self) -> bool:
        """Whether the tensor may lie in a data file (strings may not)."""
        return self.movable and self.tensor.dtype != ir.DataType.STRING

    def put(self, tensor: ir.TensorProtocol) -> None:
        """Hold ``tensor`` in this place."""
        if self.value is not None:
            self.value.const_value = tensor
        elif self.node is not None:
            doc = self.node.attributes[self.name].doc_string
            self.node.attributes.add(ir.AttrTensor(self.name, tensor, doc))

    def placeholder(self, location: str, offset: int) -> ir.ExternalTensor:
        """What stands for the tensor in the proto."""
        return ir.ExternalTensor(
            location,
            offset,
            self.nbytes,
            self.tensor.dtype,
            shape=ir.Shape(self.tensor.shape.numpy()),
            name=(self.tensor.name if self.node else self.name) or "",
            doc_string=self.tensor.doc_string,
            metadata_props=dict(self.tensor.metadata_props),
        )


def _payloads(model: ir.Model) -> list[_Payload]:
    """Every initializer and tensor attribute, in the model's order."""
    found: list[_Payload] = []
    for graph in [model.graph, *model.graph.subgraphs()]:
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                nbytes = _nbytes(value.const_value)
                main = graph is model.graph
                found.append(_Payload(value.const_value, name, nbytes, in_main=main, value=value))
    # Function bodies keep their constants inline: runtimes inline them, away from their file.
    owners: list[tuple[ir.Graph | ir.Function, bool]] = [(model.graph, True)]
    owners += [(function, False) for function in model.functions.values()]
    for owner, movable in owners:
        for node in owner.all_nodes():
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensor = attribute.as_tensor()
                    found.append(_Payload(tensor, name, _nbytes(tensor), node=node, movable=movable))
    return found


def _nbytes(tensor: ir.TensorProtocol) -> int:
    if tensor.dtype == ir.DataType.STRING:
        return sum(len(text) for text in tensor.string_data()) if isinstance(tensor, ir.StringTensor) else 0
    return tensor.nbytes


def _stream(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    before = file.tell()
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    if isinstance(tensor, ir.ExternalTensor):
        drop_pages(tensor)
    written = file.tell() - before
    if written != tensor.nbytes:
        raise UnsupportedError(
            f"tensor '{tensor.name}' gave {written} bytes where its type says {tensor.nbytes}."
        )


@contextlib.contextmanager
def _swapped(swaps: Sequence[tuple[_Payload, ir.TensorProtocol]]) -> Iterator[None]:
    """The model with other tensors in it while it is serialized."""
    try:
        for payload, stand_in in swaps:
            payload.put(stand_in)
        yield
    finally:
        for payload, _ in swaps:
            payload.put(payload.tensor)


def _inline(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor as one that onnx_ir writes inline (of an external one it writes the reference)."""
    return ir.LazyTensor(
        lambda: tensor,
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _serialize(model: ir.Model) -> onnx.ModelProto:
    proto = ir.serde.serialize_model(model)
    # onnx_ir describes every initializer in value_info too; the tensor itself says the same.
    names = {tensor.name for tensor in proto.graph.initializer}
    kept = [v for v in proto.graph.value_info if v.name not in names or v.metadata_props or v.doc_string]
    if len(kept) < len(proto.graph.value_info):
        copies = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in kept]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(copies)
    return proto


def _to_bytes(proto: onnx.ModelProto | onnx.GraphProto) -> bytes:
    try:
        return bytes(proto.SerializeToString())
    except (ValueError, google.protobuf.message.EncodeError) as error:
        raise UnsupportedError(
            "the model's structure is more than protobuf allows (2 GiB); "
            "turn its large Constant nodes into initializers."
        ) from error


# -- files -----------------------------------------------------------------------------------------


def _data_files(folder: str, name: str) -> list[str]:
    """The data files an earlier model of this name left, as far as no other model beside it reads them.

    A model that was renamed still reads the data file it was written with.
    """
    pattern = re.compile(re.escape(name) + r"(\.[0-9]+)?\.data")
    names = sorted(os.listdir(folder or "."))
    found = [n for n in names if pattern.fullmatch(n)]
    for other in names:
        if found and other.endswith(".onnx") and other != name:
            structure = _structure(os.path.join(folder, other))
            found = [n for n in found if structure is not None and n.encode() not in structure]
    return [os.path.join(folder, n) for n in found]


def _structure(path: str) -> bytes | None:
    """A model file's bytes without its weights, or None where they cannot be told apart."""
    try:
        return skeleton(FileMap(path).map, "weights")
    except (OSError, ValueError):
        return None


def _keep_readable(model: ir.Model, doomed: list[str]) -> None:
    """Open the files that tensors of the model will still be read from after they are replaced."""
    maps: dict[str, FileMap] = {}
    gone = {os.path.realpath(path) for path in doomed}
    for payload in _payloads(model):
        tensor = payload.tensor
        if not isinstance(tensor, ir.ExternalTensor) or isinstance(tensor, MappedTensor) or tensor.size == 0:
            continue
        path = os.path.realpath(tensor.path)
        if path in gone:
            if path not in maps:
                maps[path] = FileMap(path)
            payload.put(MappedTensor.standing_for(tensor, maps[path]))

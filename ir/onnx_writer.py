"""Write ``.onnx`` files: streaming, atomic, the same bytes for the same model."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import IO

import google.protobuf.message
import onnx
import onnx_ir as ir

from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.mapped import FileMap, MappedTensor
from effic.ir.model import Model
from effic.ir.protobuf_scan import field_header
from effic.ir.tensors import drop_pages

# Tensors smaller than this stay in the .onnx file when the rest is external: shapes, axes and scales
# are read by shape inference, and a location costs about a hundred bytes itself.
SMALL_BYTES = 1024
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
) -> None:
    """Write a model, one tensor in memory at a time, all or nothing.

    The new files are written under temporary names and renamed when they are complete, data first.
    When the data file's name is taken (a model written over an older one), the new data gets a name
    of its own, so that at every moment the ``.onnx`` file refers to the data it was written with;
    the older data file is removed last if the older model used it.

    Args:
        model: stays usable, also when it was read from ``path`` itself.
        path: the ``.onnx`` file; external data goes to ``<path>.data`` beside it.
        force: overwrite an existing file.
        external: put weights into a data file; None decides by ``external_threshold``.
        external_threshold: bytes of weights above which they are external.
        progress: called with (bytes written, bytes in total).

    Raises:
        UsageError: ``path`` exists and ``force`` is not given, or its folder cannot be written.
        UnsupportedError: a single file was asked for, and protobuf cannot hold it (2 GiB).
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; name a file to write.")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists; pass --force (force=True) to overwrite it.")
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} does not exist; make it first.")
    model.write_record()
    values = _initializers(model.ir)
    total = sum(_nbytes(v.const_value) for v in values)
    if external is None:
        external = total > external_threshold
    try:
        if external:
            _write_external(model.ir, path, values, progress)
        else:
            _write_single(model.ir, path, values, progress)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error


def to_proto(model: Model) -> onnx.ModelProto:
    """The model as one protobuf message with every weight in it (for models that fit in memory).

    Raises:
        UnsupportedError: the message would be larger than protobuf allows (2 GiB).
    """
    total = sum(_nbytes(v.const_value) for v in _initializers(model.ir))
    if total > PROTOBUF_BYTES:
        raise UnsupportedError(f"{total} bytes of weights do not fit in one protobuf message (2 GiB).")
    with _prepared(model.ir, {}):
        return _serialize(model.ir)


def model_bytes(model: Model) -> int:
    """Bytes the model takes when stored: weights and structure, wherever they lie."""
    values = [v for v in _initializers(model.ir) if _nbytes(v.const_value) >= SMALL_BYTES]
    with _prepared(model.ir, {v: _placeholder(v, "", 0) for v in values if _streamable(v)}):
        structure = _serialize(model.ir).ByteSize()
    return structure + sum(_nbytes(v.const_value) for v in values if _streamable(v))


# -- the two layouts -------------------------------------------------------------------------------


def _write_external(model: ir.Model, path: str, values: list[ir.Value], progress: Progress | None) -> None:
    folder, name = os.path.split(path)
    replaces = os.path.lexists(path)
    stale = _data_files(folder, name)
    data_name = f"{name}.data"
    number = 0
    while os.path.lexists(os.path.join(folder, data_name)):
        number += 1
        data_name = f"{name}.{number}.data"
    stand_ins: dict[ir.Value, ir.TensorProtocol] = {}
    at = 0
    for value in values:
        size = _nbytes(value.const_value)
        if size >= SMALL_BYTES and _streamable(value):
            step = PAGE_BYTES if size >= PAGE_ALIGN_FROM else ALIGN_BYTES
            at = -(-at // step) * step
            stand_ins[value] = _placeholder(value, data_name, at)
            at += size
    with _prepared(model, stand_ins):
        structure = _to_bytes(_serialize(model))
    with _Files() as files:
        if stand_ins:
            data = files.create(folder, data_name)
            for value, stand_in in stand_ins.items():
                assert isinstance(stand_in, ir.ExternalTensor)
                data.write(b"\0" * ((stand_in.offset or 0) - data.tell()))
                _stream(value.const_value, data)
                if progress is not None:
                    progress(data.tell(), at + len(structure))
        files.create(folder, name).write(structure)
        _keep_readable(model, [path, *stale])
        files.commit()
    if progress is not None:
        progress(at + len(structure), at + len(structure))
    if replaces:
        _remove(stale)


def _write_single(model: ir.Model, path: str, values: list[ir.Value], progress: Progress | None) -> None:
    folder, name = os.path.split(path)
    replaces = os.path.lexists(path)
    stale = _data_files(folder, name)
    streamed = [v for v in model.graph.initializers.values() if _nbytes(v.const_value) >= SMALL_BYTES]
    stand_ins = {v: _placeholder(v, "", 0) for v in streamed if _streamable(v)}
    total = sum(_nbytes(v.const_value) for v in values)
    if total > PROTOBUF_BYTES:
        raise _too_large(total)
    with _prepared(model, stand_ins):
        proto = _serialize(model)
    tensors = list(proto.graph.initializer)
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    del graph.initializer[:]
    proto.ClearField("graph")
    head, body = _to_bytes(proto), _to_bytes(graph)
    # Payloads are appended to the graph's own fields, in the order of the initializers: protobuf
    # does not care about the order of different fields.
    entries: list[tuple[bytes, ir.TensorProtocol | None]] = []
    length = len(body)
    for tensor, value in zip(tensors, model.graph.initializers.values(), strict=True):
        payload = value.const_value if value in stand_ins else None
        if payload is not None:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            raw = field_header(_RAW_DATA, payload.nbytes)
            fields = tensor.SerializeToString() + raw
            entry = field_header(_INITIALIZER, len(fields) + payload.nbytes) + fields
            length += len(entry) + payload.nbytes
        else:
            fields = tensor.SerializeToString()
            entry = field_header(_INITIALIZER, len(fields)) + fields
            length += len(entry)
        entries.append((entry, payload))
    start = head + field_header(_GRAPH, length) + body
    size = len(start) - len(body) + length
    if size > PROTOBUF_BYTES:
        raise _too_large(size)
    with _Files() as files:
        file = files.create(folder, name)
        file.write(start)
        for entry, payload in entries:
            file.write(entry)
            if payload is not None:
                _stream(payload, file)
                if progress is not None:
                    progress(file.tell(), size)
        _keep_readable(model, [path, *stale])
        files.commit()
    if progress is not None:
        progress(size, size)
    if replaces:
        _remove(stale)


def _too_large(size: int) -> UnsupportedError:
    return UnsupportedError(
        f"a single file of {size} bytes is more than protobuf allows (2 GiB); write with external data."
    )


# -- tensors ---------------------------------------------------------------------------------------


def _initializers(model: ir.Model) -> list[ir.Value]:
    """Initializers of the main graph and its subgraphs, in order."""
    values = list(model.graph.initializers.values())
    for graph in model.graph.subgraphs():
        values.extend(graph.initializers.values())
    return values


def _nbytes(tensor: ir.TensorProtocol | None) -> int:
    if tensor is None:
        return 0
    if tensor.dtype == ir.DataType.STRING:
        return sum(len(text) for text in tensor.string_data()) if isinstance(tensor, ir.StringTensor) else 0
    return tensor.nbytes


def _streamable(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype != ir.DataType.STRING


def _placeholder(value: ir.Value, location: str, offset: int) -> ir.ExternalTensor:
    tensor = value.const_value
    assert tensor is not None
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=value.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _stream(tensor: ir.TensorProtocol | None, file: IO[bytes]) -> None:
    assert tensor is not None
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
def _prepared(model: ir.Model, stand_ins: dict[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """The model with other tensors in it while it is serialized.

    ``stand_ins`` replaces initializers; every other tensor whose bytes lie in a file is replaced by one
    that is written inline (onnx_ir would write a reference to that file).
    """
    values: list[tuple[ir.Value, ir.TensorProtocol | None]] = []
    attributes: list[tuple[ir.Node, ir.Attr]] = []
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    try:
        for graph in graphs:
            for value in graph.initializers.values():
                tensor = value.const_value
                other = stand_ins.get(value) or (
                    _inline(tensor) if isinstance(tensor, ir.ExternalTensor) else None
                )
                if other is not None:
                    values.append((value, tensor))
                    value.const_value = other
            for node in graph:
                for attribute in list(node.attributes.values()):
                    other_attribute = _inline_attribute(attribute)
                    if other_attribute is not None:
                        attributes.append((node, attribute))
                        node.attributes.add(other_attribute)
        yield
    finally:
        for value, tensor in values:
            value.const_value = tensor
        for node, attribute in attributes:
            node.attributes.add(attribute)


def _inline(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: tensor,
        tensor.dtype,
        ir.Shape(tensor.shape),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _inline_attribute(attribute: ir.Attr) -> ir.Attr | None:
    if attribute.is_ref():
        return None
    if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
        return ir.AttrTensor(attribute.name, _inline(attribute.value), attribute.doc_string)
    if attribute.type == ir.AttributeType.TENSORS and any(
        isinstance(t, ir.ExternalTensor) for t in attribute.value
    ):
        tensors = [_inline(t) if isinstance(t, ir.ExternalTensor) else t for t in attribute.value]
        return ir.AttrTensors(attribute.name, tensors, attribute.doc_string)
    return None


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
        return proto.SerializeToString()
    except (ValueError, google.protobuf.message.EncodeError) as error:
        raise UnsupportedError(
            "the model's structure is more than protobuf allows (2 GiB); "
            "turn its large Constant nodes into initializers."
        ) from error


# -- files -----------------------------------------------------------------------------------------


class _Files:
    """Files that appear under their names together, or not at all."""

    def __init__(self) -> None:
        self._open: list[tuple[IO[bytes], str, str]] = []

    def __enter__(self) -> _Files:
        return self

    def create(self, folder: str, name: str) -> IO[bytes]:
        """A temporary file that :meth:`commit` renames to ``name``."""
        target = os.path.join(folder, name)
        # Not tempfile: that makes files only their owner may read, whatever the umask says.
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115 (closed in __exit__)
        self._open.append((file, temporary, target))
        return file

    def commit(self) -> None:
        """Rename the files to their names, in the order they were created."""
        for file, temporary, target in self._open:
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        while self._open:
            _, temporary, target = self._open[0]
            os.replace(temporary, target)
            self._open.pop(0)

    def __exit__(self, *_: object) -> None:
        for file, temporary, _ in self._open:
            with contextlib.suppress(OSError):
                # Closing flushes, and fails again when the disk is full.
                file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _data_files(folder: str, name: str) -> list[str]:
    """The data files an earlier model of this name may have left."""
    pattern = re.compile(re.escape(name) + r"(\.[0-9]+)?\.data")
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder or ".")) if pattern.fullmatch(n)]


def _keep_readable(model: ir.Model, doomed: list[str]) -> None:
    """Open the files that tensors of the model will still be read from after they are replaced."""
    maps: dict[str, FileMap] = {}
    gone = {os.path.realpath(path) for path in doomed}
    for value in _initializers(model):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or isinstance(tensor, MappedTensor) or tensor.size == 0:
            continue
        path = os.path.realpath(tensor.path)
        if path in gone:
            if path not in maps:
                maps[path] = FileMap(path)
            value.const_value = MappedTensor.standing_for(tensor, maps[path])


def _remove(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)

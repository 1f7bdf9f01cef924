"""Read ``.onnx`` files: streaming, confined to the model's folder, and suspicious of every byte.

Weights are not loaded. Their payloads stay in the file (inside the ``.onnx`` or in external data)
behind a memory map; see :mod:`effic.ir.protobuf_scan` and :mod:`effic.ir.mapped`. What is parsed is
checked by :mod:`effic.ir.onnx_checks` before anything is built from it, so that a broken or hostile
file ends in one :class:`~effic.ir.errors.InvalidModelError` and nothing else.

:func:`write_onnx` and :func:`raise_opset` live in files of their own and are offered here too.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator

import google.protobuf.message
import onnx
import onnx_ir as ir

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.external_files import DataFiles, ExternalDataError
from effic.ir.file_map import FileMap
from effic.ir.model import Model, Origin, optional_inputs
from effic.ir.onnx_checks import Limits, check_model, printable, refuse_name
from effic.ir.onnx_writer import model_bytes, to_proto, write_onnx
from effic.ir.opset import raise_opset
from effic.ir.protobuf_scan import ScanError, skeleton

__all__ = ["Limits", "model_bytes", "raise_opset", "read_onnx", "to_proto", "write_onnx"]

# Beginnings of files people hand over by mistake, and what to tell them.
_OTHER_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"PK\x03\x04",
        "a zip archive (a .pt, .pt2 or .npz file?); make ONNX of torch models with `effic capture`",
    ),
    (0, b"\x80\x02", "a Python pickle (an old .pt file?), which is never opened; export it to ONNX first"),
    (0, b"\x80\x04", "a Python pickle, which is never opened; export the model to ONNX first"),
    (0, b"\x80\x05", "a Python pickle, which is never opened; export the model to ONNX first"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model; run 'git lfs pull'"),
    (0, b"GGUF", "a GGUF file; effic reads ONNX"),
    (0, b"\x89HDF", "an HDF5 file; effic reads ONNX"),
    (4, b"ORTM", "an ORT-format model; convert from the original .onnx file instead"),
    (4, b"TFL3", "a TensorFlow Lite model; effic reads ONNX"),
    (0, b"<", "a text or web page; download the model itself"),
    (0, b"{", "JSON text; effic reads binary ONNX"),
)


def read_onnx(path: str | os.PathLike[str], *, limits: Limits = Limits()) -> Model:  # noqa: B008 (frozen)
    """Read an ONNX model.

    Weights listed among the graph inputs (the habit of exporters before IR version 4) become plain
    initializers, and nodes that are out of order are sorted; ``origin.notes`` says so.

    Args:
        path: the ``.onnx`` file. External data must lie in its folder or below.
        limits: how large and how deep a model may be.

    Returns:
        The model; its large weights are memory-mapped.

    Raises:
        UsageError: there is no such file, it may not be read, or its path is no UTF-8.
        InvalidModelError: the file is no ONNX model, broken, hostile, or beyond the limits.
    """
    path = os.fspath(path)
    refuse_name(path)
    # The marker cannot be guessed, so no file can pass its own external data off as inline bytes.
    files = DataFiles(_open(path), f"inline-{secrets.token_hex(16)}")
    proto = _parse(path, files, limits)
    found = check_model(proto, os.path.basename(path), files, limits)
    try:
        model = ir.serde.deserialize_model(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidModelError(f"{path} is no valid ONNX model: {_innermost(error)}.") from error
    _map_weights(model, path, files)
    notes = [*found.notes, *_demote_weights(model)]
    if not found.sorted:
        notes.append(_sort(model))
    # The walk over the file touched a page beside every weight, and the kernel mapped their neighbours.
    files.model.drop_pages()
    return Model(model, FileOrigin(files.model, tuple(notes)))


class _Digest:
    """Computes ``sha256`` when it is first asked for: hashing takes longer than all other reading."""

    def __get__(self, origin: FileOrigin | None, owner: type[Origin]) -> str | None:
        if origin is None:
            return None
        if "digest" not in origin.__dict__:
            origin.__dict__["digest"] = origin.__dict__["file"].sha256()
        return str(origin.__dict__["digest"])

    def __set__(self, origin: FileOrigin, value: str | None) -> None:
        """Origin's constructor sets every field; the value it has is not known yet."""


class FileOrigin(Origin):
    """The origin of a model that was read from an ONNX file.

    The file stays open, so ``sha256`` is that of the bytes that were read, whatever becomes of the
    path.
    """

    sha256 = _Digest()

    def __init__(self, file: FileMap, notes: tuple[str, ...]) -> None:
        super().__init__("onnx", file.path, None, notes)
        self.__dict__["file"] = file


def _open(path: str) -> FileMap:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path} is a folder; name the .onnx file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelError(f"{path} is no regular file; copy the model to one.")
    if status.st_size == 0:
        raise InvalidModelError(f"{path} is empty; write or download it again.")
    try:
        return FileMap(path)
    except OSError as error:
        raise UsageError(f"cannot read {path!r}: {error.strerror or error}.") from error


def _parse(path: str, files: DataFiles, limits: Limits) -> onnx.ModelProto:
    data = files.model.map
    try:
        short = skeleton(data, files.marker)
        if len(short) > limits.structure_bytes:
            raise InvalidModelError(
                f"{path} holds {len(short)} bytes besides its weights, more than {limits.structure_bytes}; "
                "if you trust it, raise Limits.structure_bytes."
            )
        proto = onnx.ModelProto()
        proto.ParseFromString(short)
        return proto
    except (ScanError, google.protobuf.message.DecodeError) as error:
        for offset, magic, meaning in _OTHER_FORMATS:
            if data[offset : offset + len(magic)] == magic:
                raise InvalidModelError(f"{path} is {meaning}.") from error
        if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:256]):
            raise InvalidModelError(f"{path} is a text file; effic reads binary ONNX.") from error
        reason = (
            str(error) if isinstance(error, ScanError) else "its protobuf is damaged or nested too deeply"
        )
        raise InvalidModelError(f"{path} is no ONNX model: {reason}; download or export it again.") from error


def _innermost(error: BaseException) -> str:
    """The first line of the cause behind onnx_ir's chain of "Error calling …"."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return printable(lines[0].rstrip(".")) if lines else type(error).__name__


def _map_weights(model: ir.Model, path: str, files: DataFiles) -> None:
    """Replace onnx_ir's external tensors by tensors of the maps that are already open."""
    try:
        for graph in _all_graphs(model):
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = files.map(value.const_value)
                elif isinstance(value.const_value, ir.serde.TensorProtoTensor):
                    # onnx_ir has copied the metadata, and would write both copies.
                    value.const_value.raw.ClearField("metadata_props")
            for node in graph:
                for attribute in list(node.attributes.values()):
                    if attribute.is_ref():
                        continue
                    if attribute.type == ir.AttributeType.TENSOR:
                        if isinstance(attribute.value, ir.ExternalTensor):
                            tensor = files.map(attribute.value)
                            node.attributes.add(ir.AttrTensor(attribute.name, tensor, attribute.doc_string))
                    elif attribute.type == ir.AttributeType.TENSORS and any(
                        isinstance(t, ir.ExternalTensor) for t in attribute.value
                    ):
                        tensors = [
                            files.map(t) if isinstance(t, ir.ExternalTensor) else t for t in attribute.value
                        ]
                        node.attributes.add(ir.AttrTensors(attribute.name, tensors, attribute.doc_string))
    except (ExternalDataError, OSError) as error:
        raise InvalidModelError(
            f"{path} has external data that changed while it was read: {error}."
        ) from error


def _all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def _demote_weights(model: ir.Model) -> Iterator[str]:
    """Take initializers off the list of graph inputs."""
    graph = model.graph
    meant = optional_inputs(model)
    listed = [value for value in graph.inputs if value.is_initializer() and value.name not in meant]
    kept = [value for value in graph.inputs if not value.is_initializer() or value.name in meant]
    # Before IR version 4 every initializer had to be an input. Since then an input with an
    # initializer is an optional input; a model that has no other inputs means it so.
    old = (model.ir_version or 0) < 4
    model.ir_version = max(model.ir_version or 0, 4)
    if not listed or not (kept or old):
        return
    graph.inputs.clear()
    graph.inputs.extend(kept)
    for value in listed:
        tensor = value.const_value
        if tensor is not None:
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    yield f"{len(listed)} weights listed among the graph inputs were made plain initializers."


def _sort(model: ir.Model) -> str:
    """Put nodes in topological order (the checks have refused cycles)."""
    model.graph.sort()
    for function in model.functions.values():
        function.sort()
    return "Nodes that came before the nodes they read were sorted."

"""Read and write ``.safetensors`` files: mapped, nothing executed, every byte of the header distrusted.

A file is the length of a JSON header (8 bytes, little-endian), the header, and the tensors end to end.
The header gives each tensor's dtype, shape and place; the tensors must fill the rest of the file without
gap or overlap, which is the format's own rule and tells a truncated file from a whole one.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.file_map import FileMap
from effic.ir.whole_files import WholeFiles

if TYPE_CHECKING:
    import onnx_ir as ir

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip

# About a hundred and fifty thousand tensors; a larger header is somebody's joke.
HEADER_BYTES = 32 << 20


class TensorFile(NamedTuple):
    """What a file holds: read-only views of its map by name, and its metadata."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    map: FileMap


def read_safetensors(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors of a file, mapped: only what is looked at is read.

    Raises:
        UsageError: there is no such file, or it may not be read.
        InvalidModelError: it is no safetensors file, or it is cut short or damaged.
    """
    path = os.fspath(path)
    try:
        file = FileMap(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is empty or no regular file"
        raise UsageError(f"cannot read {path}: {reason}.") from error
    if file.size < 8:
        raise InvalidModelError(f"{path} is no safetensors file: it has {file.size} bytes.")
    (length,) = struct.unpack("<Q", file.map[:8])
    if length > min(file.size - 8, HEADER_BYTES):
        raise InvalidModelError(
            f"{path} is no safetensors file, or is cut short: its header would have {length} bytes."
        )
    try:
        header = json.loads(file.map[8 : 8 + length], object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0] or "it is nested too deeply"
        raise InvalidModelError(
            f"{path} is no safetensors file: its header is damaged ({reason})."
        ) from error
    if not isinstance(header, dict):
        raise InvalidModelError(f"{path} is no safetensors file: its header is no table of tensors.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidModelError(f"{path} is damaged: its metadata are no texts.")
    start = 8 + length
    places: list[tuple[int, int, str]] = []
    tensors: dict[str, np.ndarray] = {}
    for name, row in header.items():
        first, last = _place(path, name, row)
        if start + last > file.size:
            raise InvalidModelError(
                f"{path} is cut short: the tensor {name!r:.200} ends after the file does."
            )
        places.append((first, last, name))
        dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
        if first == last:
            tensors[name] = np.zeros(shape, dtype)
        else:
            flat = np.frombuffer(file.map, dtype.newbyteorder("<"), math.prod(shape), start + first)
            tensors[name] = flat.reshape(shape)
    at = 0
    for first, last, name in sorted(places):
        if first != at:
            raise InvalidModelError(
                f"{path} is damaged: the tensor {name!r:.200} begins at byte {first}, not {at}."
            )
        at = last
    if start + at != file.size:
        raise InvalidModelError(f"{path} is damaged: {file.size - start - at} bytes belong to no tensor.")
    return TensorFile(tensors, metadata, file)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name is there twice")
    return table


def _place(path: str, name: str, row: Any) -> tuple[int, int]:
    """First and last byte of a tensor among the payloads."""
    dtype = row.get("dtype") if isinstance(row, dict) else None
    shape, offsets = (row.get("shape"), row.get("data_offsets")) if isinstance(dtype, str) else (None, None)
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise InvalidModelError(f"{path} is damaged: the tensor {name!r:.200} has no dtype, shape and place.")
    if dtype not in DTYPES:
        raise InvalidModelError(
            f"{path} holds the tensor {name!r:.200} of type {dtype!r:.80}, which is not known here."
        )
    possible = all(type(v) is int and 0 <= v < 1 << 63 for v in (*shape, *offsets)) and len(shape) <= 32
    # Of a tensor without elements too: arrays of other sizes beside the zero are as impossible.
    if not possible or math.prod(v for v in shape if v) >= 1 << 56:
        raise InvalidModelError(
            f"{path} is damaged: the tensor {name!r:.200} has an impossible shape or place."
        )
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InvalidModelError(f"{path} is damaged: the tensor {name!r:.200} does not fill its place.")
    return offsets[0], offsets[1]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray | ir.TensorProtocol],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays as a safetensors file, all or nothing; an existing file is replaced.

    Args:
        path: the file.
        tensors: arrays or onnx_ir tensors by name, of the dtypes in :data:`DTYPES`. Tensors are streamed.
        metadata: texts by name.

    Raises:
        UsageError: the file cannot be written.
    """
    path = os.fspath(path)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": codes[_dtype(array)],
            "shape": _shape(array),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    folder, name = os.path.split(path)
    try:
        with WholeFiles() as files:
            file = files.create(folder, name)
            file.write(struct.pack("<Q", len(text)) + text)
            for array in tensors.values():
                if not isinstance(array, np.ndarray):
                    _stream(array, file)
                    continue
                # memoryview knows no bf16: the bytes are written, whatever they mean.
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            files.commit()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error


def _stream(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    # Only who has such tensors has onnx_ir: an artifact's parameters are read without it.
    import onnx_ir as ir

    from effic.ir.tensors import drop_pages

    if isinstance(tensor, ir.ExternalTensor):
        tensor.tofile(file)
        drop_pages(tensor)
    else:
        file.write(tensor.tobytes())


def _shape(tensor: np.ndarray | ir.TensorProtocol) -> list[int]:
    return list(tensor.shape if isinstance(tensor, np.ndarray) else tensor.shape.numpy())


def _dtype(tensor: np.ndarray | ir.TensorProtocol) -> np.dtype[Any]:
    return tensor.dtype if isinstance(tensor, np.ndarray) else tensor.dtype.numpy()

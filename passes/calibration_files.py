"""Arrays from ``.npy``, ``.npz`` and ``.safetensors`` files, mapped into memory and not loaded."""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from typing import IO

import ml_dtypes
import numpy as np

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.evaluate import first_line
from effic.ir.safetensors_format import read_safetensors

SUFFIXES = (".npz", ".npy", ".safetensors")

MOST_UNPACKED = 4 << 30
"""A compressed array has to be held in memory; a larger one is refused."""

_NPY_HEADER_BYTES = 1 << 16
# What NumPy, zip and JSON raise over files that are not what they say.
_BROKEN = (
    ValueError, TypeError, KeyError, EOFError, SyntaxError, OverflowError,
    RuntimeError,  # also too deep, of an unknown compression, and encrypted
    struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


def read_arrays(path: str, what: str = "the calibration data") -> dict[str, np.ndarray]:
    """The arrays of a file by name; the one of an ``.npy`` file is called ``""``.

    They are mapped where the file allows it (everything but compressed ``.npz``), so that only what
    is used is read. Nothing in the file is executed: no pickles.

    Args:
        path: the file.
        what: they are, in the messages of errors.

    Raises:
        UsageError: no such file, of another kind, broken, or with Python objects in it.
    """
    try:
        if path.endswith(".npy"):
            found = {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        elif path.endswith(".npz"):
            found = _read_npz(path, what)
        elif path.endswith(".safetensors"):
            found = _read_safetensors(path, what)
        else:
            raise UsageError(
                f"{what} {path} are of no known kind; give {', '.join(SUFFIXES)} or a folder of them"
            )
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except _BROKEN as error:
        reason = first_line(error)
        if "pickle" in reason or "Python objects" in reason:
            reason = "they hold Python objects, which are never loaded; save arrays of numbers"
        raise UsageError(f"cannot read {what} {path}: {reason}") from error
    for name, array in found.items():
        if array.dtype.kind not in "fiub" and array.dtype != ml_dtypes.bfloat16:
            raise UsageError(f"{what} {path}: array '{name}' holds {array.dtype}, not numbers")
    return found


def _read_npz(path: str, what: str) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                arrays[name] = _map_member(file, path, info)
                continue
            if info.file_size > MOST_UNPACKED:
                raise UsageError(
                    f"{what} {path}: array '{name}' is compressed and unpacks to "
                    f"{info.file_size / 1e9:.1f} GB; save it with np.savez, uncompressed"
                )
            with archive.open(info) as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _map_member(file: IO[bytes], path: str, info: zipfile.ZipInfo) -> np.ndarray:
    """An array that lies uncompressed in a zip archive, mapped from there."""
    # The local header repeats name and extra field, and theirs may have other lengths there.
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"the entry '{info.filename}' has no header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    file.seek(start)
    # Of this entry alone: a header that is cut short must not go on in the next.
    head = io.BytesIO(file.read(min(info.file_size, _NPY_HEADER_BYTES)))
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(head)
    if dtype.hasobject:
        raise ValueError(f"the array '{info.filename}' holds Python objects, which are never loaded")
    at = start + head.tell()
    size = math.prod(shape) * dtype.itemsize
    if at + size > start + info.file_size:
        raise ValueError(f"the array '{info.filename}' is cut short")
    if size == 0:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", at, shape, "F" if fortran else "C")


def _read_safetensors(path: str, what: str) -> dict[str, np.ndarray]:
    try:
        return read_safetensors(path).tensors
    except (InvalidModelError, UsageError) as error:
        raise UsageError(f"cannot read {what}: {error}") from error

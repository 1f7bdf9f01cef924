"""Weights without loading the model: borrow an array, give the pages back, spill results to disk.

A weight of a large model lives in a memory map of its file. Reading it fills the process's
resident memory with file pages; :func:`borrow` drops them again, so a pass that walks over every
weight peaks at a few tensors. What a pass computes goes to a :class:`Scratch` folder when it is
large, for the same reason.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

# Tensors smaller than this stay in memory: a file each would cost more than it saves.
SPILL_BYTES = 1 << 20


@contextlib.contextmanager
def borrow(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """The tensor's values as a read-only array, whose file pages are given back afterwards.

    Args:
        tensor: any onnx_ir tensor, memory-mapped or not.

    Yields:
        Array of the tensor's shape and dtype (ml_dtypes for bf16, fp8, int4 and the like). Do not
        keep a view of it after the ``with`` block; copy what is needed.
    """
    mapped = isinstance(tensor, ir.ExternalTensor)
    array = tensor.numpy()
    try:
        yield array
    finally:
        del array
        if mapped:
            assert isinstance(tensor, ir.ExternalTensor)
            drop_pages(tensor)


def drop_pages(tensor: ir.ExternalTensor) -> None:
    """Give the resident pages of a memory-mapped tensor back to the operating system."""
    if isinstance(tensor.raw, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tensor.raw.madvise(mmap.MADV_DONTNEED)
    # Sub-byte types are unpacked into an array of their own, which must go as well. A caller that
    # still holds a view keeps the map alive: then only the pages go.
    with contextlib.suppress(BufferError):
        tensor.release()


class Scratch:
    """A folder for large intermediate tensors, removed with its owner.

    Lies in the system's temporary folder (``TMPDIR`` moves it elsewhere).
    """

    def __init__(self) -> None:
        self._folder: str | None = None
        self._numbers = itertools.count()

    @property
    def folder(self) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="effic-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    @property
    def stored(self) -> int:
        """Bytes of the files in the folder now."""
        if self._folder is None:
            return 0
        with os.scandir(self._folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())

    def tensor(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """A tensor holding ``array``: in memory when small, on disk when large.

        Args:
            name: the tensor's name.
            array: values; for 2- and 4-bit types an array of the matching ml_dtypes type, or
                packed ``uint8`` handed to :meth:`packed`.
            dtype: element type, where it cannot be told from ``array``.
        """
        tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
        return self._spill(tensor)

    def packed(
        self, name: str, packed: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.TensorProtocol:
        """A sub-byte tensor from its packed bytes (low bits first, as ONNX stores them).

        Args:
            name: the tensor's name.
            packed: ``uint8`` array, ``ceil(prod(shape) * bits / 8)`` elements.
            dtype: INT4, UINT4, INT2 or UINT2.
            shape: the shape in elements.
        """
        tensor = ir.PackedTensor(packed.reshape(-1), dtype, shape=ir.Shape(shape), name=name)
        return self._spill(tensor)

    def streamed(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
    ) -> ir.TensorProtocol:
        """A tensor that is handed over in blocks, so that a large one is never in memory whole.

        Args:
            name: the tensor's name.
            dtype: element type, of a whole number of bytes.
            shape: the shape.
            blocks: consecutive parts of the tensor in C order, each valid until the next is asked for.
        """
        nbytes = math.prod(shape) * dtype.bitwidth // 8
        if nbytes < SPILL_BYTES:
            array = np.empty(math.prod(shape), dtype.numpy())
            at = 0
            for block in blocks:
                array[at : at + block.size] = block.reshape(-1)
                at += block.size
            return ir.Tensor(array.reshape(shape), dtype=dtype, name=name)
        location = f"{next(self._numbers)}.bin"
        with open(os.path.join(self.folder, location), "wb") as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        return self._spilled(location, name, nbytes, dtype, shape)

    def _spill(self, tensor: ir.Tensor[Any] | ir.PackedTensor[Any]) -> ir.TensorProtocol:
        if tensor.nbytes < SPILL_BYTES:
            return tensor
        location = f"{next(self._numbers)}.bin"
        with open(os.path.join(self.folder, location), "wb") as file:
            tensor.tofile(file)
        return self._spilled(location, tensor.name or "", tensor.nbytes, tensor.dtype, tensor.shape.numpy())

    def _spilled(
        self, location: str, name: str, nbytes: int, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.TensorProtocol:
        spilled = ScratchTensor(
            location, 0, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self.folder
        )
        spilled.scratch = self
        return spilled


class ScratchTensor(ir.ExternalTensor):
    """An external tensor that keeps its scratch folder alive."""

    __slots__ = ("scratch",)
    scratch: Scratch

    def tobytes(self) -> bytes:
        """The bytes as ONNX stores them, read without unpacking sub-byte types on the way."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.nbytes)

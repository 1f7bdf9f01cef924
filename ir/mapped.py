"""Weights that stay in the file they came from: one map per file, kept open while tensors need it."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.ir.file_map import COPY_BYTES, FileMap


class MappedTensor(ir.ExternalTensor):
    """A tensor whose bytes lie in a :class:`FileMap`."""

    __slots__ = ("_values", "file")

    def __init__(self, file: FileMap, offset: int, length: int, dtype: ir.DataType, **names: Any) -> None:
        """See :class:`onnx_ir.ExternalTensor`; ``offset`` and ``length`` are bytes in ``file``.

        The caller has checked that they lie in the file and agree with the shape.
        """
        super().__init__(os.path.abspath(file.path), offset, length, dtype, **names)
        self.file = file
        self._values: np.ndarray | None = None

    @classmethod
    def standing_for(cls, tensor: ir.ExternalTensor, file: FileMap) -> MappedTensor:
        """The tensor ``tensor`` describes, read through ``file``."""
        return cls(
            file,
            tensor.offset or 0,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )

    def numpy(self) -> np.ndarray:
        """The values: a read-only view of the map, or an unpacked copy for types under 8 bits."""
        if self._values is None:
            shape = self.shape.numpy()
            if self.dtype.bitwidth < 8:
                packed = np.frombuffer(self.file.map, np.uint8, self.nbytes, self.offset or 0)
                self._values = ir.PackedTensor(packed, self.dtype, shape=self.shape).numpy()
            else:
                dtype = np.dtype(self.dtype.numpy()).newbyteorder("<")
                self._values = np.frombuffer(self.file.map, dtype, self.size, self.offset or 0).reshape(shape)
            self.raw = self.file.map
        return self._values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.numpy() if dtype is None else self.numpy().astype(dtype)
        return values.copy() if copy else values

    def tobytes(self) -> bytes:
        """The tensor's bytes as ONNX stores them, copied."""
        start = self.offset or 0
        return self.file.map[start : start + self.nbytes]

    def tofile(self, file: Any) -> None:
        """Append the tensor's bytes to ``file``, inside the kernel where the system can do that."""
        start, left = self.offset or 0, self.nbytes
        file.flush()
        position = file.tell()
        # Any refusal (another kind of file or file system, no such call) leaves the rest to write().
        with contextlib.suppress(OSError, AttributeError):
            while left:
                done = os.copy_file_range(
                    self.file.fd, file.fileno(), left, offset_src=start, offset_dst=position
                )
                if not done:
                    break
                start, left, position = start + done, left - done, position + done
        file.seek(position)
        while left:
            chunk = self.file.map[start : start + min(left, COPY_BYTES)]
            file.write(chunk)
            start, left = start + len(chunk), left - len(chunk)

    def release(self) -> None:
        """Forget the array; the map, which other tensors share, stays open."""
        self._values = None
        self.raw = None

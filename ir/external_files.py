"""The files a model's external data may lie in: its own folder and below, nothing else."""

from __future__ import annotations

import os
import stat

import numpy as np
import onnx_ir as ir

from effic.ir.file_map import FileMap
from effic.ir.mapped import MappedTensor

# Each open file costs two descriptors, of which a process often has 1,024. Models saved with one
# file per tensor keep onnx_ir's tensors, which open their file when they are read.
MAX_OPEN = 64


class ExternalDataError(ValueError):
    """A location, offset or length that is not acceptable; the text follows "has external data"."""


class DataFiles:
    """Checks locations, and maps the files they name.

    Args:
        model: the map of the model file itself.
        marker: the location that stands for the model file itself (inline weights).
    """

    def __init__(self, model: FileMap, marker: str) -> None:
        self.model = model
        self.marker = marker
        self.folder = os.path.dirname(os.path.abspath(model.path))
        self._root = os.path.realpath(self.folder)
        self._sizes: dict[str, int] = {}
        self._maps: dict[str, FileMap] = {}
        self.own = os.path.abspath(model.path)

    def check(self, location: str, offset: int, length: int) -> str:
        """Check that ``length`` bytes at ``offset`` of ``location`` may be read; reads nothing.

        Returns:
            The location to use: as given, or the model file's absolute path for the marker.

        Raises:
            ExternalDataError: why not.
        """
        if location == self.marker:
            return self.own
        if location not in self._sizes:
            self._sizes[location] = self._size(location)
        if offset + length > self._sizes[location]:
            raise ExternalDataError(
                f"at bytes {offset} to {offset + length} of '{location}', which has {self._sizes[location]}"
            )
        return location

    def _size(self, location: str) -> int:
        if not location:
            raise ExternalDataError("without a location")
        if "\0" in location:
            raise ExternalDataError("whose location holds a NUL character")
        shown = f"'{location[:200]}'"
        parts = location.replace("\\", "/").split("/")
        if os.path.isabs(location) or parts[0] == "" or ".." in parts:
            raise ExternalDataError(f"at {shown}, which leaves the model's folder")
        try:
            path = os.path.realpath(os.path.join(self.folder, location))
            if os.path.commonpath([self._root, path]) != self._root:
                raise ExternalDataError(f"at {shown}, a link that leaves the model's folder")
            status = os.stat(path)
        except OSError as error:
            raise ExternalDataError(f"at {shown}, which cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise ExternalDataError(f"at {shown}, which is no regular file")
        if status.st_nlink > 1:
            # A hard link may be another user's file put in the model's folder.
            raise ExternalDataError(f"at {shown}, a file with several hard links")
        return status.st_size

    def map(self, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        """The tensor read through a shared map, or through its own when there are too many files.

        Raises:
            ExternalDataError: the file changed since it was checked.
            OSError: the file cannot be opened any more.
        """
        location = os.fspath(tensor.location)
        offset = tensor.offset or 0
        if location == self.own:
            return MappedTensor.standing_for(tensor, self.model)
        if tensor.size == 0:
            empty = np.zeros(tensor.shape.numpy(), tensor.dtype.numpy())
            return ir.Tensor(empty, dtype=tensor.dtype, name=tensor.name)
        if len(self._sizes) > MAX_OPEN:
            tensor.base_dir = self.folder
            return tensor
        if location not in self._maps:
            self._maps[location] = FileMap(os.path.realpath(os.path.join(self.folder, location)))
        file = self._maps[location]
        if offset + tensor.nbytes > file.size:
            raise ExternalDataError(f"in '{location}', which has become shorter")
        return MappedTensor.standing_for(tensor, file)

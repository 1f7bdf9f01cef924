"""A file mapped once, read-only."""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref

# Bytes copied at a time where the kernel cannot copy between files itself.
COPY_BYTES = 4 << 20


class FileMap:
    """A file opened and mapped once, read-only.

    Tensors hold the map, not the path: a file that is replaced or removed meanwhile (a model written
    over its own input) keeps serving the bytes it had when it was opened.

    Attributes:
        path: the path it was opened by.
        size: bytes in the file.
        map: the memory map.
    """

    def __init__(self, path: str) -> None:
        """Open and map ``path``.

        Raises:
            OSError: the file cannot be opened, is no regular file, or is empty.
        """
        # Not blocking: opening a named pipe must fail here, not wait for a writer.
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        self._close = weakref.finalize(self, os.close, self.fd)
        self.path = path
        status = os.fstat(self.fd)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        try:
            self.map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            self._close()
            raise OSError(f"{path} is empty") from error
        except OSError:
            self._close()
            raise

    def sha256(self) -> str:
        """Hex digest of the whole file."""
        digest = hashlib.sha256()
        # Read, not mapped: the pages of a map count as this process's memory.
        for start in range(0, self.size, COPY_BYTES):
            digest.update(os.pread(self.fd, COPY_BYTES, start))
        return digest.hexdigest()

    def drop_pages(self) -> None:
        """Give the resident pages of the map back to the operating system."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

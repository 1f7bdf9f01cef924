"""Files that appear under their names whole and together, or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import IO

fcntl: ModuleType | None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows: leftovers of killed runs stay there
    fcntl = None

Stamp = tuple[int, int]
"""A file's bytes and the time of its last change in nanoseconds. A rename keeps both, so that they tell the
file that somebody wrote from one that has taken its name since."""

Before = Callable[[Mapping[str, Stamp]], None]
"""Called with the stamps of the new files by their names, before they take them."""

_TEMPORARY = re.compile(r"\.effic-[0-9a-f]{16}\.tmp")


class WholeFiles:
    """A context manager that writes files under temporary names and renames them when all are complete.

    A process that is killed leaves its temporary files behind (``.effic-*.tmp``). Each is locked while
    its writer lives, so the next writer in the same folder can tell them from those of a run that is
    still going on, and removes them.
    """

    def __init__(self) -> None:
        self._open: list[tuple[IO[bytes], str, str]] = []
        self._locks: list[int] = []

    def __enter__(self) -> WholeFiles:
        return self

    def create(self, folder: str | os.PathLike[str], name: str) -> IO[bytes]:
        """A temporary file that :meth:`commit` renames to ``name``.

        Raises:
            OSError: it cannot be made, or the name is that of something else than a file.
        """
        folder = os.fspath(folder)
        if (why := why_no_file(os.path.join(folder, name))) is not None:
            raise OSError(errno.EINVAL, why, os.path.join(folder, name))
        if not self._open:
            _remove_leftovers(folder)
        while True:
            # Not tempfile: that makes files only their owner may read, whatever the umask says.
            temporary = os.path.join(folder, f".effic-{secrets.token_hex(8)}.tmp")
            file = open(temporary, "xb")  # noqa: SIM115 (closed in __exit__)
            self._open.append((file, temporary, os.path.join(folder, name)))
            if fcntl is None:
                return file
            # A duplicate holds the lock until the file has its name, though the file is closed before.
            self._locks.append(os.dup(file.fileno()))
            with contextlib.suppress(OSError):  # a file system without locks has no leftovers removed either
                fcntl.flock(self._locks[-1], fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file
            # Another run took it for a leftover, in the moment before it was locked.
            self._open.pop()[0].close()
            os.close(self._locks.pop())

    def commit(self, before: Before | None = None) -> None:
        """Rename the files to their names, in the order they were created.

        Args:
            before: called when all files are complete, before the first is renamed.

        Raises:
            OSError: a file cannot be completed or renamed.
        """
        for file, temporary, target in self._open:
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        if before is not None:
            found = {target: stamp(temporary) for _, temporary, target in self._open}
            before({target: one for target, one in found.items() if one is not None})
        while self._open:
            _, temporary, target = self._open[0]
            os.replace(temporary, target)
            self._open.pop(0)

    def __exit__(self, *exception: object) -> None:
        for file, temporary, _ in self._open:
            with contextlib.suppress(OSError):
                # Closing flushes, and fails again when the disk is full.
                file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        for lock in self._locks:
            os.close(lock)


def stamp(path: str | os.PathLike[str]) -> Stamp | None:
    """The stamp of a file or a folder; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def why_no_file(path: str | os.PathLike[str]) -> str | None:
    """Why no file may take this name, a phrase: a device would be replaced by it; None where one may."""
    if not os.path.exists(path) or os.path.isfile(path):
        return None
    return os.strerror(errno.EISDIR) if os.path.isdir(path) else "It is a device, and no file"


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write all of a file, or nothing of it.

    Raises:
        OSError: it cannot be written.
    """
    folder, name = os.path.split(os.fspath(path))
    with WholeFiles() as files:
        files.create(folder, name).write(data)
        files.commit()


def _remove_leftovers(folder: str) -> None:
    """Remove temporary files whose writer is no more."""
    if fcntl is None:
        return
    for name in os.listdir(folder or "."):
        if not _TEMPORARY.fullmatch(name):
            continue
        path = os.path.join(folder, name)
        # Not mine to open or to remove, a folder, locked, or gone in the meantime: let it be.
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(file)

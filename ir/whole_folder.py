"""A folder that appears under its name whole, or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil

from effic.ir.errors import UsageError
from effic.ir.whole_files import Before, fcntl, stamp

_TEMPORARY = re.compile(r"\.effic-[0-9a-f]{16}\.folder")


class WholeFolder:
    """A context manager around a new folder with a temporary name beside the one it will have.

    A process that is killed leaves its temporary folder behind (``.effic-*.folder``). It is locked while
    its writer lives, so the next writer in the same place can tell it from that of a run that is still going
    on, and removes it.

    Attributes:
        path: the temporary folder.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self._target = os.path.abspath(target)
        _remove_leftovers(os.path.dirname(self._target))
        self.path = _beside(self._target)
        self._lock = -1
        self._kept = False

    def __enter__(self) -> WholeFolder:
        while True:
            os.mkdir(self.path)
            if fcntl is None:
                return self
            # What another run takes for a leftover, in the moment before it is locked, is made again.
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY)
                with contextlib.suppress(
                    OSError
                ):  # a file system without locks has no leftovers removed either
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if os.fstat(self._lock).st_nlink:
                    return self
                os.close(self._lock)
            self.path = _beside(self._target)

    def commit(self, *, mark: str | None = None, force: bool = False, before: Before | None = None) -> None:
        """Give the folder its name.

        Args:
            mark: a file that an older folder of the name must hold to be replaced, so that none but
                our own is ever removed.
            force: replace an older folder. It is moved aside for the moment between two renames.
            before: called with the folder's name and stamp before the older one goes.

        Raises:
            UsageError: the name is taken, and not to be replaced.
            OSError: it cannot be renamed.
        """
        if (problem := why_not_replace(self._target, mark, force)) is not None:
            raise UsageError(problem)
        if before is not None and (found := stamp(self.path)) is not None:
            before({self._target: found})
        if os.path.lexists(self._target):
            aside = _beside(self._target)
            os.rename(self._target, aside)
            os.rename(self.path, self._target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(self.path, self._target)
        self._kept = True

    def __exit__(self, *exception: object) -> None:
        if not self._kept:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)


def why_not_replace(target: str | os.PathLike[str], mark: str | None, force: bool) -> str | None:
    """Why a folder may not take this name, a sentence; None where it may."""
    target = os.fspath(target)
    if not os.path.lexists(target):
        return None
    if not os.path.isdir(target) or os.path.islink(target):
        return f"the output {target} is a file, and a folder is to be written; name another"
    if mark is not None and not os.path.isfile(os.path.join(target, mark)):
        return f"the output {target} is a folder of something else (it has no {mark}); name another"
    return None if force else f"the output {target} exists; give --force to write over it"


def _beside(target: str) -> str:
    return os.path.join(os.path.dirname(target), f".effic-{secrets.token_hex(8)}.folder")


def _remove_leftovers(home: str) -> None:
    """Remove temporary folders whose writer is no more."""
    if fcntl is None or not os.path.isdir(home):
        return
    for name in os.listdir(home):
        if not _TEMPORARY.fullmatch(name):
            continue
        # Not mine, locked, or gone in the meantime: let it be.
        with contextlib.suppress(OSError):
            path = os.path.join(home, name)
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)

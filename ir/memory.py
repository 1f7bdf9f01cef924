"""How much memory the process uses and the machine has, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

CGROUPS = "/sys/fs/cgroup"

# The first version of control groups writes a number of this size for "no limit".
_NO_LIMIT = 1 << 60


def available_memory() -> int | None:
    """Memory a new allocation can have without swapping, or None where the system does not tell.

    The least of what the machine has free and what the process's control groups (of a container, say)
    leave it.
    """
    left = [_field("/proc/meminfo", "MemAvailable"), *map(_left_in_group, _groups())]
    return min((bytes_ for bytes_ in left if bytes_ is not None), default=None)


def resident_memory() -> int:
    """What of the process lies in memory now (0 where the system does not tell)."""
    return _field("/proc/self/status", "VmRSS") or 0


def reset_peak_memory() -> None:
    """Start :func:`peak_memory` anew, where the system can (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # proc(5): reset the peak resident set size


def peak_memory() -> int:
    """Largest resident set of the process since :func:`reset_peak_memory`."""
    peak = _field("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Give freed memory back to the system, where the C library keeps some (glibc).

    What a runtime session frees in many pieces stays with the process otherwise, and counts beside the next one's.
    """
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None  # another C library
    return found


def _groups() -> list[Path]:
    """Folders of the control groups that may limit the process's memory: its own and those around it."""
    try:
        rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text("ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return []
    found: list[Path] = []
    for row in rows:
        if len(row) != 3 or row[1] not in ("", "memory"):
            continue
        root = Path(CGROUPS, "memory") if row[1] else Path(CGROUPS)
        # In a container the path may be the host's: what is mounted at the root is its own group then.
        inside = PurePosixPath(row[2].lstrip("/"))
        found.extend(root / part for part in (inside, *inside.parents) if ".." not in part.parts)
    return list(dict.fromkeys(found))


def _left_in_group(folder: Path) -> int | None:
    """What a control group may still take, or None without a limit. File caches are given up for it."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, now = (folder / limit).read_text("ascii").strip(), int((folder / used).read_text("ascii"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        except (OSError, ValueError):
            continue
        if most.isdecimal() and int(most) < _NO_LIMIT:
            cache = sum(int(stat.get(name, 0)) for name in ("inactive_file", "active_file"))
            return max(0, int(most) - now + min(cache, now))
    return None


def _field(path: str, name: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None

"""How much memory the process uses and the machine has, in bytes."""

from __future__ import annotations

import contextlib
import sys


def available_memory() -> int | None:
    """Memory a new allocation can have without swapping, or None where the system does not tell."""
    return _field("/proc/meminfo", "MemAvailable")


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


def _field(path: str, name: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None

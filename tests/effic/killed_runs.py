"""A server of runs that are killed: it imports everything once, and forks for every run.

``python killed_runs.py FOLDER`` reads one JSON order a line, ``{"argv": […], "kill": …}``, and answers each
with one JSON line. ``kill`` is null (let it end), ``{"seconds": s}`` (SIGKILL after s), ``{"writing": s}``
(s after the first file of FOLDER was made) or ``{"event": n}`` (before the n-th time that
a file of FOLDER is made, renamed or removed).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.truncate", "os.link", "os.symlink", "os.mkdir", "os.rmdir"}


def changes_a_file(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is about to change which files there are in the current folder."""
    if event == "open":
        flags = arguments[2]
        if not isinstance(flags, int) or not flags & (os.O_CREAT | os.O_TRUNC):
            return False
    elif event not in CHANGES:
        return False
    path = arguments[0]
    if event == "os.remove" and ".effic-" in str(path):
        return False  # tidying up after an earlier kill, which would shift the numbers
    return isinstance(path, str) and os.path.dirname(os.path.abspath(path)) == os.getcwd()


def child(argv: list[str], kill: dict[str, Any] | None, told: int) -> None:
    """One run of the command line, in a process of its own; never returns."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes_a_file(event, arguments):
            seen += 1
            os.write(told, b".")
            if kill is not None and kill.get("event") == seen:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    from effic.cli.main import main

    sys.argv = ["effic", *argv]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(argv: list[str], kill: dict[str, Any] | None) -> dict[str, Any]:
    """Fork, kill as ordered, and say how it ended."""
    told, tell = os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        child(argv, kill, tell)
    os.close(tell)
    wait = None if kill is None else kill.get("seconds")
    writing, events = None, 0
    end = None if wait is None else began + wait
    while True:
        left = None if end is None else max(0.0, end - time.perf_counter())
        ready, _, _ = select.select([told], [], [], left)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            break
        news = os.read(told, 4096)
        if not news:
            break
        events += len(news)
        if writing is None:
            writing = time.perf_counter() - began
            if kill is not None and "writing" in kill:
                end = time.perf_counter() + kill["writing"]
    _, status = os.waitpid(pid, 0)
    os.close(told)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - began,
        "writing": writing,
        "events": events,
    }


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    import onnxruntime  # noqa: F401

    import effic.cli.optimize  # noqa: F401
    from effic.passes import PASSES, load_pass

    for name in PASSES:
        load_pass(name)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(run(order["argv"], order["kill"])), flush=True)

"""Work in a child process: what crashes there is one sentence here.

TVM and LLVM are native code that ends the process when something is wrong inside. The parent writes a request
into a folder, starts ``python -m effic.backends.tvm.in_child FOLDER``, hears the names of stages through a
pipe, and reads the result from the folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effic.ir import errors

REQUEST, RESULT, LOG = "request.json", "result.json", "log.txt"

Tell = Callable[[str, int, int], None]
"""Called with a stage's name, the number of what is done, and how many there are (0 where unknown)."""

_WAIT_SECONDS = 10.0
_LOG_BYTES = 1 << 16


def run_in_child(
    what: str,
    function: str,
    request: Mapping[str, Any],
    folder: str | os.PathLike[str],
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Run a function in a process of its own.

    Args:
        what: what it does, as sentences begin: ``"the build"``.
        function: ``module:function``, which takes the request and a :data:`Tell` and returns what JSON holds.
        request: what it gets, JSON-able.
        folder: a folder of the caller's for the request, the result and what the child prints.
        tell: hears of the stages.

    Returns:
        What the function returned.

    Raises:
        EfficError: as the function raised it.
        NotMeasuredError: the child crashed, was killed, or failed in a way nobody foresaw; the sentence
            names the stage.
    """
    home = Path(folder)
    (home / REQUEST).write_text(
        json.dumps({"function": function, "request": dict(request)}), encoding="utf-8"
    )
    stage = "starting"
    read, write = os.pipe()
    try:
        with open(home / LOG, "wb") as log:
            child = subprocess.Popen(
                # -P: a checkout's own folder effic/ would hide the installed package.
                [sys.executable, "-P", "-m", "effic.backends.tvm.in_child", os.fspath(home), str(write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
            )
    finally:
        os.close(write)
    try:
        with os.fdopen(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                stage, done, total = _stage(line, stage)
                if tell is not None:
                    tell(stage, done, total)
        code = child.wait()
    except BaseException:
        # Interrupted here, or by what ``tell`` raised: the child must not go on alone.
        _end(child)
        raise
    if code == 0:
        result: dict[str, Any] = json.loads((home / RESULT).read_text(encoding="utf-8"))
        if (failed := result.get("error")) is None:
            return result
        raise _error(failed)
    raise errors.NotMeasuredError(f"{what} for TVM {_ending(code, home / LOG)} while {stage}")


def _stage(line: str, before: str) -> tuple[str, int, int]:
    try:
        stage, done, total = json.loads(line)
        return str(stage), int(done), int(total)
    except (ValueError, TypeError):
        return before, 0, 0  # cut short by a crash


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _error(failed: Mapping[str, str]) -> errors.EfficError:
    """The child's error again, of the same class."""
    kind: type[errors.EfficError] = getattr(errors, failed["kind"], errors.EfficError)
    found = kind.__new__(kind)
    Exception.__init__(found, failed["text"])
    return found


def _ending(code: int, log: Path) -> str:
    """How a child ended that left no result, as a phrase."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), which most often means that memory ran out,"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"crashed ({name})"
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - _LOG_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"failed (exit code {code}: {last[:400]})"

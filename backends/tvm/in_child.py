"""The child process's side of :mod:`effic.backends.tvm.child`: run one function, leave a result."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effic.backends.tvm.child import REQUEST, RESULT, Tell
from effic.ir.errors import EfficError


def run(folder: str, pipe: int) -> None:
    """Run the function that a folder's request names, and write its result, or the sentence of its error.

    What is no :class:`EfficError` goes to the log as a traceback, whose last line the parent shows.
    """
    home = Path(folder)
    asked = json.loads((home / REQUEST).read_text(encoding="utf-8"))
    module, _, name = asked["function"].partition(":")

    def tell(stage: str, done: int = 0, total: int = 0) -> None:
        # A parent that is gone has closed its end: the write fails, and the child goes too.
        os.write(pipe, (json.dumps([stage, done, total]) + "\n").encode())

    job: Callable[[dict[str, Any], Tell], dict[str, Any]] = getattr(importlib.import_module(module), name)
    try:
        result = job(asked["request"], tell)
    except EfficError as error:
        result = {"error": {"kind": type(error).__name__, "text": str(error)}}
    (home / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    # TVM imports torch where it finds it, to share tensors with it: seconds and memory for nothing here.
    sys.modules["torch"] = None  # type: ignore[assignment]
    run(sys.argv[1], int(sys.argv[2]))

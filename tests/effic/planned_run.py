"""Run by the tests of plans in a process of its own: plan or run, and print what it takes.

    python planned_run.py plan|run '{"source": …, "passes": …, …}'

Prints a JSON object: ``base`` (resident set before), ``memory`` (largest resident set), ``temporary`` (most bytes of
temporary files at a time), ``file`` (bytes of the output's files), ``seconds`` and, for each pass, ``sites`` and
``missed``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from importlib import import_module
from typing import Any

from effic.ir.memory import peak_memory, reset_peak_memory, resident_memory


def folder_bytes(folder: str) -> int:
    """Bytes of all files in a folder that other threads write to."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(path, name))
            except OSError:
                continue
    return total


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Optimize, watching memory and the folder for temporary files."""
    peaks: list[int] = []

    def reset() -> None:
        # The runner starts the peak anew at every pass: all of them count here.
        peaks.append(peak_memory())
        reset_peak_memory()

    for name in ("effic.optimize", "effic.passes.pipeline"):
        import_module(name).reset_peak_memory = reset  # type: ignore[attr-defined]
    base = resident_memory()
    done, most = threading.Event(), [0]
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder

        def watch() -> None:
            while not done.wait(0.002):
                most[0] = max(most[0], folder_bytes(folder))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            report = import_module("effic.optimize").optimize(**options)
        finally:
            done.set()
            thread.join()
            tempfile.tempdir = None
    return {
        "base": base,
        "memory": max([*peaks, peak_memory()]),
        "temporary": most[0],
        "file": report.file_bytes[1],
        "seconds": report.seconds,
        "sites": [step.passed for step in report.steps],
        "missed": [step.missed for step in report.steps],
    }


def plan(options: dict[str, Any]) -> dict[str, Any]:
    """Plan the same."""
    planner = import_module("effic.plan")
    base = resident_memory()
    found = planner.plan(**options)
    return {
        "base": base,
        "memory": found.memory,
        "temporary": found.temporary,
        "file": found.file,
        "seconds": found.seconds["total"],
        "sites": [step.sites for step in found.steps],
        "missed": [step.left_alone for step in found.steps],
    }


if __name__ == "__main__":
    print(json.dumps({"plan": plan, "run": run}[sys.argv[1]](json.loads(sys.argv[2]))))

"""Whole processes measured from outside, interleaved, on one core; and what they ran on."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CORE = int(os.environ.get("EFFIC_BENCH_CORE", "0"))
"""The core that measured processes are pinned to."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished process: wall and CPU seconds, largest resident set in bytes."""

    wall: float
    cpu: float
    peak: int


def data_folder() -> Path | None:
    """The folder of real models and data (see tests/conftest.py), or None."""
    folder = Path(os.environ.get("EFFIC_DATA", ROOT.parent / "shared" / "data"))
    return folder if (folder / "load.py").is_file() else None


def machine(*packages: str) -> str:
    """A line about the machine and the versions of packages."""
    cpu = platform.processor() or "unknown CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    python = f"Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores; {python}; {'; '.join(found)}"


# A process inherits its parent's largest resident set across fork and exec: a small parent in
# between keeps the benchmark's own memory out of the figure.
_LAUNCHER = """
import json, os, subprocess, sys, time
core, log, *command = sys.argv[1:]
with open(log, "wb") as out:
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=out, stderr=out)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {int(core)})
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
process.returncode = os.waitstatus_to_exitcode(status)
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([process.returncode, wall, cpu, usage.ru_maxrss * 1024]))
"""


def run(code_or_command: str | Sequence[str], core: int = CORE) -> Run:
    """Run Python code or a command as a process of its own, pinned to one core.

    Raises:
        SystemExit: the process failed; its output is shown.
    """
    code = isinstance(code_or_command, str)
    command = [sys.executable, "-c", code_or_command] if code else list(code_or_command)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile() as log:
        out = subprocess.run(
            [sys.executable, "-S", "-c", _LAUNCHER, str(core), log.name, *command],
            env=env, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        status, wall, cpu, peak = json.loads(out)
        if status:
            raise SystemExit(f"{command} failed:\n{Path(log.name).read_text(errors='replace')[-3000:]}")
    return Run(wall, cpu, peak)


def interleaved(commands: Mapping[str, str | Sequence[str]], repeats: int = 5) -> dict[str, Run]:
    """Median of each figure over ``repeats`` rounds A B C A B C …, after one round not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            result = run(command)
            if number:
                runs[name].append(result)
    return {
        name: Run(
            statistics.median(r.wall for r in rows),
            statistics.median(r.cpu for r in rows),
            int(statistics.median(r.peak for r in rows)),
        )
        for name, rows in runs.items()
    }


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n## {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")

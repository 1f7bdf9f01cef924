"""What plans promise against what runs take: memory, temporary files, output and time, in processes of their own.

    python benchmarks/plan.py [GIGABYTES]

The bytes of a large synthetic decoder repeat, so that compressing file systems flatter it; times hold for a machine
that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from effic.models.large import llama_like_file

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "tests" / "effic" / "planned_run.py"
JOBS = (
    ("prune-magnitude,compress-nm", "each", False),
    ("quantize-rtn{bits=8}", "each", False),
    ("prune-magnitude", "each", False),
    ("quantize-easyquant", "off", False),
    ("quantize-gptq", "off", True),
    ("quantize-adadim", "off", True),
)


def child(what: str, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of one plan or run, and the seconds it took."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(CHILD), what, json.dumps(options)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "wall": time.perf_counter() - began}


def main(gigabytes: float = 0.4) -> None:
    """Plan and run each job, and print both."""
    with tempfile.TemporaryDirectory() as folder:
        path = llama_like_file(Path(folder, "m.onnx"), gigabytes, dim=1024, hidden=2752, heads=8, vocab=16000)
        ids = Path(folder, "ids.npy")
        np.save(ids, np.random.default_rng(0).integers(0, 16000, 4 * 128))
        print(f"{'passes':36} {'':8} {'memory':>9} {'temporary':>9} {'output':>9} {'run':>8} {'planning':>8}")
        for passes, check, calibrated in JOBS:
            options: dict[str, Any] = {"source": str(path), "passes": passes, "check": check}
            if calibrated:
                options |= {"calib": str(ids), "calib_window": 128}
            promised = child("plan", options)
            measured = child("run", {**options, "output": str(Path(folder, "out.onnx")), "force": True})
            for name, row in (("promised", promised), ("measured", measured)):
                figures = " ".join(f"{row[key] / 1e6:6.0f} MB" for key in ("memory", "temporary", "file"))
                spent = f"{promised['wall']:6.1f} s" if row is promised else ""
                print(
                    f"{passes if row is promised else '':36} {name:8} {figures} {row['seconds']:6.1f} s {spent}"
                )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))

"""Time of each pass on graphs of 1k, 4k and 16k nodes: the slope in a log-log fit is 1 when linear."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.harness import machine, table
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.models.large import chain
from effic.passes import PASSES, load_pass
from effic.passes.base import Remarks
from effic.passes.pipeline import fingerprint

SIZES = (1000, 4000, 16000)


def main() -> None:
    """Print the table."""
    rows = []
    jobs = {name: load_pass(name)().apply for name in PASSES}
    for name, job in jobs.items():
        seconds = []
        for size in SIZES:
            times = []
            for _ in range(3):
                model = Model(chain(size))
                began = time.process_time()
                job(model, Remarks())
                times.append(time.process_time() - began)
            seconds.append(min(times))
        rows.append(_row(name, seconds))
    for name, check in (("verify", verify), ("fingerprint", fingerprint)):
        seconds = []
        for size in SIZES:
            model = Model(chain(size))
            began = time.process_time()
            check(model)
            seconds.append(time.process_time() - began)
        rows.append(_row(f"({name})", seconds))
    print(machine("effic", "onnx-ir", "numpy"))
    table("CPU seconds against graph size", ("pass", *(f"{s} nodes" for s in SIZES), "slope"), rows)


def _row(name: str, seconds: list[float]) -> tuple[object, ...]:
    slope = np.polyfit(np.log(SIZES), np.log(np.maximum(seconds, 1e-4)), 1)[0]
    return (name, *(f"{s:.3f}" for s in seconds), f"{slope:.2f}")


if __name__ == "__main__":
    main()

"""What pruning a file of 100 M parameters takes: seconds and memory of each method, GPTQ's beside them.

    python -m benchmarks.prune_time [--only TEXT] [--repeats N] [--gigabytes G]

Whole processes on one core, page cache warm, imports included. Methods that look at data get four
samples of 128 tokens. "Pass" is the pass alone; "calibration" is the same walk over the data and the
model with nothing done to its weights, measured in a process of its own; the difference is the pruning.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import machine, run, table
from benchmarks.quantize_time import SAMPLES, TOKENS

VOCABULARY = 8000
# GPTQ encodes the head of the model as well, so it is pruned too.
PASSES = {
    "magnitude 2:4": ("prune-magnitude{head=true}", None),
    "magnitude 4:8": ("prune-magnitude{head=true,n=4,m=8}", None),
    "magnitude 50 %": ("prune-magnitude{head=true,density=0.5}", None),
    "Wanda 2:4": ("prune-wanda{head=true}", "sketch"),
    "Wanda 4:8": ("prune-wanda{head=true,n=4,m=8}", "sketch"),
    "SparseGPT 2:4": ("prune-sparsegpt{head=true}", "moment"),
    "SparseGPT 4:8": ("prune-sparsegpt{head=true,n=4,m=8}", "moment"),
    "SparseGPT 50 %": ("prune-sparsegpt{head=true,density=0.5}", "moment"),
    "GPTQ, 4 bits": ("quantize-gptq", "moment"),
}


@click.command()
@click.option("--only", default="", help="methods whose name contains this text")
@click.option("--repeats", default=3, show_default=True, help="runs of each method, interleaved")
@click.option("--gigabytes", default=0.4, show_default=True, help="size of the file")
@click.option("--job", hidden=True)
def command(only: str, repeats: int, gigabytes: float, job: str | None) -> None:
    """Print the table."""
    if job is not None:
        child(json.loads(job))
        return
    from effic.models.large import llama_like_file

    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy"))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        source = llama_like_file(
            folder / "model.onnx", gigabytes, dim=1024, hidden=2752, heads=16, vocab=VOCABULARY
        )
        size = sum(p.stat().st_size for p in folder.iterdir())
        rng = np.random.default_rng(0)
        np.savez(folder / "calib.npz", input_ids=rng.integers(0, VOCABULARY, (SAMPLES, TOKENS)))
        names = [name for name in PASSES if only in name]
        looks = {look for name in names if (look := PASSES[name][1]) is not None}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in [*looks, *names]}
        for number in range(repeats):
            for name, rows in found.items():
                rows.append(_measure(name, source, folder))
                print(f"{number + 1}/{repeats} {name}: {rows[-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    lines = []
    for name in names:
        row, look = medians[name], PASSES[name][1]
        before = 0.0 if look is None else medians[look]["pass"]
        lines.append([
            name, f"{row['wall']:.2f}", f"{row['pass']:.2f}", f"{before:.2f}" if look else "none",
            f"{(row['pass'] - before) / (size / 1e9):.2f}", f"{row['peak'] / 1e6:.0f} MB",
        ])  # fmt: skip
    table(
        f"Pruning {size / 1e9:.2f} GB fp32 (one core, medians of {repeats})",
        ("method", "wall s", "pass s", "calibration s", "s per GB beyond calibration", "peak"),
        lines,
    )
    if {"SparseGPT 2:4", "GPTQ, 4 bits"} <= medians.keys():
        ratio = medians["SparseGPT 2:4"]["pass"] / medians["GPTQ, 4 bits"]["pass"]
        print(f"\nSparseGPT 2:4 takes {ratio:.2f} of GPTQ's time.")


def _measure(name: str, source: Path, folder: Path) -> dict[str, float]:
    told = folder / "told.json"
    job = {"name": name, "source": str(source), "folder": str(folder), "told": str(told)}
    process = run([sys.executable, "-m", "benchmarks.prune_time", "--job", json.dumps(job)])
    for old in folder.glob("out.onnx*"):
        old.unlink()
    return {**json.loads(told.read_text()), "wall": process.wall, "peak": process.peak}


def child(job: dict[str, Any]) -> None:
    """One method, or one bare look at the data; leaves the seconds of the pass behind."""
    source, calib = job["source"], str(Path(job["folder"]) / "calib.npz")
    if job["name"] in PASSES:
        import effic

        passes, look = PASSES[job["name"]]
        given: dict[str, Any] = {} if look is None else {"calib": calib}
        report = effic.optimize(
            source, passes, output=Path(job["folder"]) / "out.onnx", target="portable", check="off", **given
        )
        seconds = sum(step.seconds for step in report.steps if step.name == passes.partition("{")[0])
    else:
        from effic.ir.onnx_format import read_onnx
        from effic.ir.weights import weight_sites
        from effic.passes.calibration import Calibration
        from effic.passes.sparsify.one_shot import SKETCH

        model = read_onnx(source)
        calibration = Calibration.load(calib, model)
        sites = [s for s in weight_sites(model, ("MatMul", "Gemm")) if not calibration.why_not(s)]
        sites = [s for s in sites if s.why_not is None]
        moment = job["name"] == "moment"
        began = time.perf_counter()
        for _ in calibration.walk(
            model, sites, second_moment=moment, sketch=0 if moment else SKETCH, propagate=True
        ):
            pass
        seconds = time.perf_counter() - began
    Path(job["told"]).write_text(json.dumps({"pass": seconds}))


def main() -> None:
    """The table, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()

"""What quantizing a 1.33 GB Llama-like file takes: seconds and memory, effic beside onnxruntime.

    python -m benchmarks.quantize_time [--only TEXT] [--peers/--no-peers] [--repeats N]

Whole processes on one core, page cache warm, imports included. Methods that look at data get four
samples of 128 tokens. onnxruntime's GPTQ takes minutes and runs once; its HQQ runs on a file of a sixth
of the size, and its figures per gigabyte are to be compared. "Forward passes" is ONNX Runtime loading
the float32 file and running the four samples, nothing else: the least that calibration can take.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from benchmarks.harness import Run, machine, run, table

SAMPLES, TOKENS, VOCABULARY, SMALL_VOCABULARY = 4, 128, 32000, 8000
FORWARD = """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession({source!r}, options, providers=['CPUExecutionProvider'])
for ids in numpy.load({data!r})['input_ids']:
    session.run(None, {{'input_ids': ids[None]}})
"""
PEER = """
import numpy
from pathlib import Path
from benchmarks import peers
feeds = [{{'input_ids': ids[None]}} for ids in numpy.load({data!r})['input_ids']]
peers.{call}
"""
HQQ = "hqq(Path({source!r}), Path({output!r}), bits=4, group=128)"
# Asymmetric it fails here: its writer takes an even number of groups only, and 5504 inputs are 43.
GPTQ = "gptq(Path({source!r}), Path({output!r}), bits=4, group=128, symmetric=True, feeds=feeds)"
PASSES = {
    "RTN": "quantize-rtn",
    "EasyQuant": "quantize-easyquant",
    "AdaDim-RTN": "quantize-adadim",
    "GPTQ": "quantize-gptq",
    "AdaDim-GPTQ": "quantize-adadim{base=gptq}",
    "AWQ": "quantize-awq",
}
NEEDS_DATA = ("AdaDim-RTN", "GPTQ", "AdaDim-GPTQ", "AWQ")


class Job(NamedTuple):
    """A process to time: its name, the command or code, the file it reads, how often it runs."""

    name: str
    command: str | list[str]
    source: Path
    repeats: int


@click.command()
@click.option("--only", default="", help="jobs whose name contains this text")
@click.option("--peers/--no-peers", default=True, show_default=True, help="also onnxruntime's methods")
@click.option("--repeats", default=3, show_default=True, help="runs of each of effic's methods")
@click.option("--gigabytes", default=1.35, show_default=True, help="size of the file")
def command(only: str, peers: bool, repeats: int, gigabytes: float) -> None:
    """Print the table."""
    from effic.models.large import llama_like_file

    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy", "torch"))
    base = run("import effic.optimize, onnx_ir, effic.passes.pipeline")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        big, small = folder / "big", folder / "small"
        big.mkdir()
        small.mkdir()
        source = llama_like_file(big / "model.onnx", gigabytes)
        reduced = llama_like_file(
            small / "model.onnx", 0.22, dim=1024, hidden=2752, heads=16, vocab=SMALL_VOCABULARY
        )
        lines = []
        for job in _jobs(source, reduced, folder, peers, repeats):
            if only in job.name:
                lines.append(_line(job, folder))
                print(f"{' | '.join(map(str, lines[-1]))}", file=sys.stderr, flush=True)
        size = _bytes(source)
    print(f"a process that only imports effic: {base.wall:.2f} s, {base.peak / 1e6:.0f} MB")
    table(
        f"4 bits, groups of 128, of {size / 1e9:.2f} GB fp32 (one core, medians of {repeats})",
        ("method", "file", "wall s", "CPU s", "s per GB", "peak", "peak / file", "result"),
        lines,
    )


def _jobs(source: Path, small: Path, folder: Path, peers: bool, repeats: int) -> Iterator[Job]:
    data, small_data, out = folder / "calib.npz", folder / "small.npz", folder / "out"
    out.mkdir()
    rng = np.random.default_rng(0)
    shape = (SAMPLES, TOKENS)
    np.savez(data, input_ids=rng.integers(0, VOCABULARY, shape))
    np.savez(small_data, input_ids=rng.integers(0, SMALL_VOCABULARY, shape))
    forward = FORWARD.format(source=str(source), data=str(data))
    yield Job("forward passes of the calibration", forward, source, repeats)
    for method, passes in PASSES.items():
        line = [sys.executable, "-m", "effic.cli.main", "optimize", str(source), "--passes", passes]
        line += ["--check", "off", "--force", "-o", str(out / "model.onnx")]
        line += ["--calib", str(data)] if method in NEEDS_DATA else []
        yield Job(f"effic {method}", line, source, repeats)
    if not peers:
        return
    for method, call, file, samples in (
        ("onnxruntime HQQ", HQQ, small, small_data), ("onnxruntime GPTQ", GPTQ, source, data)
    ):  # fmt: skip
        # Not the input's name: it looks for the data file to write beside the input.
        text = call.format(source=str(file), output=str(out / "quantized.onnx"))
        yield Job(method, PEER.format(data=str(samples), call=text), file, 1)


def _line(job: Job, folder: Path) -> tuple[object, ...]:
    _warm(job.source)
    runs = [_run(job, folder) for _ in range(job.repeats)]
    found = Run(
        statistics.median(r.wall for r in runs), statistics.median(r.cpu for r in runs),
        int(statistics.median(r.peak for r in runs)),
    )  # fmt: skip
    size = _bytes(job.source)
    written = sum(p.stat().st_size for p in (folder / "out").iterdir())
    return (
        job.name, f"{size / 1e9:.2f} GB", f"{found.wall:.2f}", f"{found.cpu:.2f}",
        f"{found.wall / (size / 1e9):.2f}", f"{found.peak / 1e6:.0f} MB", f"{found.peak / size:.2f}",
        f"{written / 1e6:.0f} MB" if written else "",
    )  # fmt: skip


def _run(job: Job, folder: Path) -> Run:
    for old in (folder / "out").iterdir():
        old.unlink()
    return run(job.command)


def _warm(source: Path) -> None:
    for path in source.parent.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _bytes(source: Path) -> int:
    return sum(p.stat().st_size for p in source.parent.glob(f"{source.name}*") if "augment" not in p.name)


def main() -> None:
    """The table, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()

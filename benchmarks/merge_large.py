"""Merging a LoRA adapter into a 1.33 GB Llama-like file, beside the time to copy that file.

Whole processes on one core; every matrix has an adapter of rank 16. The model is not run (``--check
off``), as a copy checks nothing either. The first copy reads and writes blocks, the second leaves the work
to the kernel (``shutil.copyfile``). "Without starting" is what the command's report says of itself: from
reading the model to the last byte, without the interpreter and its imports. Once everything stays in the
page cache, which is a copy of memory, and once it comes from the disk and ends there: the source is evicted
before each process, and flushing what it wrote counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Run, machine, run, table

RANK, REPEATS = 16, 5
MERGE, COPIED = "effic merge-lora", "copy, read and write"
COPY = """
import shutil
for path, target in {pairs!r}:
    with open(path, 'rb') as a, open(target, 'wb') as b:
        shutil.copyfileobj(a, b, 1 << 24)
"""
KERNEL_COPY = """
import shutil
for path, target in {pairs!r}:
    shutil.copyfile(path, target)
"""


def main() -> None:
    """Print the table."""
    from effic.models.large import llama_like_file

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        source, out = folder / "model.onnx", folder / "out"
        out.mkdir()
        llama_like_file(source)
        files = [p for p in sorted(folder.iterdir()) if p.is_file()]
        size = sum(p.stat().st_size for p in files)
        pairs = [(str(p), str(out / p.name)) for p in files]
        count = _adapter(source, folder / "adapter")
        report, output = folder / "report.json", out / "merged.onnx"
        commands: dict[str, str | list[str]] = {
            MERGE: [
                sys.executable, "-m", "effic.cli.main", "optimize", str(source), "--passes",
                f'merge-lora{{adapters=["{folder / "adapter"}"]}}', "--check", "off", "--target", "portable",
                "-o", str(output), "--report", str(report),
            ],
            COPIED: COPY.format(pairs=pairs),
            "copy, in the kernel": KERNEL_COPY.format(pairs=pairs),
            "nothing but effic's imports": "import effic.optimize, onnx, onnx_ir, effic.passes.pipeline",
        }  # fmt: skip
        print(machine("effic", "onnx", "onnx-ir", "numpy"))
        for disk in (False, True):
            began = os.getloadavg()[0]
            runs: dict[str, list[Run]] = {name: [] for name in commands}
            inside = []
            for number in range(REPEATS + 1):
                for name, command in commands.items():
                    result = _measured(command, files, out, disk)
                    if number:
                        runs[name].append(result)
                    if number and name == MERGE:
                        inside.append(json.loads(report.read_text())["seconds"])
            where = "from disk to disk" if disk else "within the page cache"
            title = f"{count} matrices of {size / 1e9:.2f} GB fp32 merged with rank {RANK}, {where}"
            table(
                f"{title} (one core, medians of {REPEATS}, load {began:.1f} to {os.getloadavg()[0]:.1f})",
                ("process", "wall s", "CPU s", "peak", "peak / model", "wall / copy"),
                _rows(runs, [] if disk else inside, size),
            )


def _measured(command: str | list[str], files: list[Path], out: Path, disk: bool) -> Run:
    """One process that writes new files; with ``disk``, from the disk and onto it."""
    for old in out.iterdir():
        # Taking old files away is no part of the work.
        old.unlink()
    for path in files if disk else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result = run(command)
    began = time.perf_counter()
    for path in out.iterdir() if disk else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return dataclasses.replace(result, wall=result.wall + time.perf_counter() - began)


def _rows(runs: dict[str, list[Run]], inside: list[float], size: int) -> list[tuple[str, ...]]:
    """Rows of the table."""
    copy = statistics.median(r.wall for r in runs[COPIED])
    rows = [
        (
            name,
            _spread([r.wall for r in found]),
            f"{statistics.median(r.cpu for r in found):.2f}",
            f"{statistics.median(r.peak for r in found) / 1e6:.0f} MB",
            f"{statistics.median(r.peak for r in found) / size:.2f}",
            f"{statistics.median(r.wall for r in found) / copy:.2f}",
        )
        for name, found in runs.items()
    ]
    if inside:
        ratio = f"{statistics.median(inside) / copy:.2f}"
        rows.insert(1, ("… without starting", _spread(inside), "", "", "", ratio))
    return rows


def _spread(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def _adapter(source: Path, folder: Path) -> int:
    """An adapter for every matrix of the file; returns how many there are."""
    from effic.ir.onnx_format import read_onnx
    from effic.ir.safetensors_format import write_safetensors
    from effic.ir.weights import weight_sites

    rng = np.random.default_rng(0)
    tensors = {}
    for site in weight_sites(read_onnx(source), ("MatMul", "Gemm")):
        if site.why_not is None and site.name.endswith(".weight"):
            out, inputs = site.shape_oi
            path = f"base_model.model.{site.name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((RANK, inputs), np.float32) * np.float32(
                0.01
            )
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * np.float32(0.01)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 16})
    )
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return len(tensors) // 2


if __name__ == "__main__":
    main()

"""Merging a LoRA adapter into a 1.33 GB Llama-like file, beside the time to copy that file.

Whole processes on one core, page cache warm; every matrix has an adapter of rank 16. The model is not
run (``--check off``), as a copy checks nothing either. The first copy reads and writes blocks, the
second leaves the work to the kernel (``shutil.copyfile``).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import interleaved, machine, table

RANK = 16
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
        commands: dict[str, str | list[str]] = {
            "effic merge-lora": [
                sys.executable, "-m", "effic.cli.main", "optimize", str(source), "--passes",
                f'merge-lora{{adapters=["{folder / "adapter"}"]}}', "--check", "off", "--target", "portable",
                "-o", str(out / "merged.onnx"), "--force",
            ],
            "copy, read and write": COPY.format(pairs=pairs),
            "copy, in the kernel": KERNEL_COPY.format(pairs=pairs),
            "nothing but effic's imports": "import effic.optimize, onnx, onnx_ir, effic.passes.pipeline",
        }  # fmt: skip
        runs = interleaved(commands, repeats=3)
        print(machine("effic", "onnx", "onnx-ir", "numpy"))
        table(
            f"{count} matrices of {size / 1e9:.2f} GB fp32 merged with rank {RANK} (one core, medians of 3)",
            ("process", "wall s", "CPU s", "peak", "peak / model", "wall / copy"),
            [
                (
                    name,
                    f"{r.wall:.2f}",
                    f"{r.cpu:.2f}",
                    f"{r.peak / 1e6:.0f} MB",
                    f"{r.peak / size:.2f}",
                    f"{r.wall / runs['copy, read and write'].wall:.2f}",
                )
                for name, r in runs.items()
            ],
        )


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

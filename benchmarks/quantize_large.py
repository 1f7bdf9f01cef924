"""Weight-only RTN 4-bit, group 128, of a 1.35 GB Llama-like file: effic beside onnxruntime's quantizer.

Whole processes on one core, page cache warm, the same result form (MatMulNBits). Neither runs the
model afterwards (effic: ``--check off``). The floor is a process that reads the file and writes as
many bytes as the result has.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.harness import interleaved, machine, table

PEER = """
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
config = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True)
quantizer = MatMulNBitsQuantizer(onnx.load({source!r}), algo_config=config)
quantizer.process()
quantizer.model.save_model_to_file({target!r}, True)
"""
FLOOR = """
import os
size = 1 << 24
left = {write}
with open({target!r}, 'wb') as out:
    for path in {paths!r}:
        with open(path, 'rb', buffering=0) as file:
            while block := file.read(size):
                out.write(block[:left]); left -= min(left, len(block))
"""


def main() -> None:
    """Print the table."""
    from effic.models.large import llama_like_file

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        source = folder / "model.onnx"
        llama_like_file(source)
        files = sorted(folder.iterdir())
        size = sum(p.stat().st_size for p in files)
        ours, theirs = folder / "effic", folder / "ort"
        ours.mkdir()
        theirs.mkdir()
        commands: dict[str, str | list[str]] = {
            "effic": [
                *_effic(), "optimize", str(source), "--passes", "quantize-rtn{bits=4,group_size=128}",
                "--check", "off", "-o", str(ours / "out.onnx"), "--force",
            ],
            "onnxruntime": PEER.format(source=str(source), target=str(theirs / "out.onnx")),
            "I/O floor": FLOOR.format(
                write=int(0.31 * size), target=str(folder / "floor.bin"), paths=[str(p) for p in files]
            ),
        }  # fmt: skip
        runs = interleaved(commands, repeats=3)
        bytes_out = {"effic": _bytes(ours), "onnxruntime": _bytes(theirs), "I/O floor": int(0.31 * size)}
        rows = [
            (
                name,
                f"{r.wall:.2f}",
                f"{r.cpu:.2f}",
                f"{r.wall / (size / 1e9):.2f}",
                f"{r.peak / 1e6:.0f} MB",
                f"{r.peak / size:.2f}",
                f"{bytes_out[name] / 1e6:.0f} MB",
                f"{runs['onnxruntime'].wall / r.wall:.1f} x",
            )
            for name, r in runs.items()
        ]
        print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy"))
        table(
            f"RTN 4-bit g128 of {size / 1e9:.2f} GB fp32 (one core, medians of 3)",
            (
                "tool",
                "wall s",
                "CPU s",
                "s per GB",
                "peak",
                "peak / model",
                "output",
                "faster than onnxruntime",
            ),
            rows,
        )
        shutil.rmtree(ours)


def _effic() -> list[str]:
    import sys

    return [sys.executable, "-m", "effic.cli.main"]


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


if __name__ == "__main__":
    main()

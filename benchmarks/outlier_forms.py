"""EasyQuant on ONNX Runtime: the forms in which exact outliers stand beside 4-bit codes, and fp32.

A chain of 2048 x 2048 MatMuls, larger than the caches, quantized by ``quantize-easyquant`` (4 bits, a
scale per channel) and lowered in every form of ``ort-cpu{outliers=…}``. One thread; all forms take
turns, and what is compared are neighbouring turns. Two kinds of weights: Gaussian, whose outliers lie
anywhere, and Gaussian with a few input channels eight times as large, whose outliers lie there.

    python -m benchmarks.outlier_forms [LAYERS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

import effic
from benchmarks.harness import machine, table
from effic.backends.ort.artifact import OrtArtifact
from effic.ir.model import Model

SIZE, LAYERS, LOUD_CHANNELS = 2048, 24, 16
ROWS = (1, 2, 16, 128)
FORMS = ("coo", "gather", "ell", "requantize", "fold")


def main() -> None:
    """Print the tables of docs/targets.md."""
    layers = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdecimal() else LAYERS
    print(machine("effic", "onnxruntime"))
    for kind in ("gaussian", "loud channels"):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            _chain(kind, Path(folder), layers)


def _chain(kind: str, folder: Path, layers: int) -> None:
    source = folder / "fp32.onnx"
    _write(kind, source, layers)
    files, share = {"fp32": source}, 0.0
    for form in FORMS:
        files[form] = folder / f"{form}.onnx"
        target = f"ort-cpu{{outliers={form}}}"
        report = effic.optimize(source, "quantize-easyquant", output=files[form], target=target, check="off")
        remarks = report.steps[0].remarks
        share = statistics.mean(r.data["outlier_fraction"] for r in remarks if r.kind == "passed")
    artifacts = {form: OrtArtifact.load(path) for form, path in files.items()}
    cells: dict[str, list[str]] = {form: [_megabytes(path)] for form, path in files.items()}
    for rows in ROWS:
        times = _turns(artifacts, rows)
        for form, taken in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["fp32"], taken, strict=True))
            cells[form].append(f"{1e6 * statistics.median(taken) / layers:.0f} µs ({ratio:.1f}x)")
    table(
        f"{layers} x {SIZE}², {kind}, {100 * share:.2f} % outliers: time per layer (speed beside fp32)",
        ("form", "file", *(f"{rows} row{'s' if rows > 1 else ''}" for rows in ROWS)),
        [(form, *row) for form, row in cells.items()],
    )


def _turns(artifacts: dict[str, OrtArtifact], rows: int) -> dict[str, list[float]]:
    """Seconds of a run of each model, in turns; the first turn is thrown away."""
    x = {"x": np.random.default_rng(1).standard_normal((rows, SIZE)).astype(np.float32)}
    repeats, batch = (12, 4) if rows < 16 else (5, 1)
    times: dict[str, list[float]] = {form: [] for form in artifacts}
    for _ in range(repeats + 1):
        for form, artifact in artifacts.items():
            times[form] += artifact.time(x, repeats=1, warmup=0, batch=batch)
    return {form: taken[1:] for form, taken in times.items()}


def _write(kind: str, path: Path, layers: int) -> None:
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y"]
    body = " ".join(f"{names[i + 1]} = MatMul({names[i]}, w{i})" for i in range(layers))
    inputs = ", ".join(f"float[{SIZE},{SIZE}] w{i}" for i in range(layers))
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[rows,{SIZE}] x, {inputs}) => (float[rows,{SIZE}] y) {{ {body} }}"
    )
    model = Model(ir.from_onnx_text(text))
    for value in model.graph.inputs[1:]:
        weight = rng.standard_normal((SIZE, SIZE)).astype(np.float32) / np.float32(np.sqrt(SIZE))
        if kind != "gaussian":
            weight[rng.choice(SIZE, LOUD_CHANNELS, replace=False)] *= 8
        value.const_value = ir.Tensor(weight, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    model.save(path, external=True)


def _megabytes(path: Path) -> str:
    files = [path, *path.parent.glob(f"{path.name}.*")]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"


if __name__ == "__main__":
    main()

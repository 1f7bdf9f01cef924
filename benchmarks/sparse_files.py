"""Sparse weights in files: bytes, time to load and memory, dense and as compress-nm stores them.

Four models: stories260k, all-MiniLM-L6-v2 and resnet20 from the data folder (left out where they cannot be
had), and a chain of MatMuls of 100 MB in fp32 and in fp16. Each is pruned by magnitude to 2:4 and written
dense and compressed; then the same in 4 bits (convolutions: 8). Time and memory are those of a process that
imports ONNX Runtime and opens the file, less those of one that imports it only. Whether a file gives the
outputs of its dense counterpart bit for bit is in the last column.

    python -m benchmarks.sparse_files [MODEL …]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import effic
from benchmarks.harness import data_folder, interleaved, machine, table
from benchmarks.subjects import make
from effic.backends.ort.artifact import OrtArtifact
from effic.ir.evaluate import Oracle, runnable_inputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx

LAYERS, SIZE = 24, 1024
MODELS = ("stories260k", "minilm", "resnet20", "chain fp32", "chain fp16")

PRUNE = "prune-magnitude"
IMPORT = "import onnxruntime"
OPEN = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
"""


class Form(NamedTuple):
    """A way to store a model: the passes, the target, and the form whose outputs it must have."""

    name: str
    passes: str
    target: str
    like: str | None = None


def main() -> None:
    """Print a table for each model."""
    print(machine("effic", "onnxruntime"))
    for name in [m for m in MODELS if m in sys.argv[1:]] or MODELS:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            source, calibration = _source(name, Path(folder))
            if isinstance(source, str):
                print(f"\n{name}: {source}")
                continue
            _measure(name, source, calibration, Path(folder))


def _source(name: str, folder: Path) -> tuple[Path | str, Path | None]:
    """The float file and the folder of calibration data, or why there is none."""
    if name.startswith("chain"):
        path = folder / "fp.onnx"
        _chain(path, np.float16 if name.endswith("16") else np.float32)
        return path, None
    if data_folder() is None:
        return "the data folder is absent; set EFFIC_DATA", None
    subject = make(name, folder)
    return (subject, None) if isinstance(subject, str) else (subject.fp32, subject.calibration)


def _forms(name: str) -> Iterator[Form]:
    yield Form("dense", "eliminate-dead-code", "portable")
    yield Form("2:4, zeros", PRUNE, "portable")
    yield Form("2:4, compressed", f"{PRUNE},compress-nm", "portable", "2:4, zeros")
    if name == "chain fp16":
        return
    bits, quantize = 4, f"quantize-rtn{{group_size={32 if name == 'stories260k' else 128}}}"
    if name == "resnet20":
        bits, quantize = 8, "quantize-int8"
    for target in ("portable", "ort-cpu"):
        yield Form(f"int{bits}, {target}", quantize, target)
        yield Form(f"2:4 int{bits}, {target}", f"{PRUNE},{quantize}", target)
        yield Form(
            f"2:4 int{bits}, compressed, {target}",
            f"{PRUNE},{quantize},compress-nm",
            target,
            f"2:4 int{bits}, {target}",
        )


def _measure(name: str, source: Path, calibration: Path | None, folder: Path) -> None:
    forms, files = list(_forms(name)), {}
    for number, form in enumerate(forms):
        files[form.name] = folder / f"form{number}.onnx"
        effic.optimize(
            source, form.passes, output=files[form.name], target=form.target, check="off",
            calib=str(calibration) if calibration and "int8" in form.passes else None,
        )  # fmt: skip
    codes = {form.name: OPEN.format(path=str(files[form.name])) for form in forms}
    runs = interleaved({"import": IMPORT, **codes}, repeats=3)
    model = read_onnx(source)
    inputs, _ = runnable_inputs(model, Oracle(model))
    outputs = {form.name: OrtArtifact.load(files[form.name]).run(inputs) for form in forms}
    dense = _bytes(files["dense"])
    rows = []
    for form in forms:
        size = _bytes(files[form.name])
        same = "" if form.like is None else _same(outputs[form.name], outputs[form.like])
        seconds = runs[form.name].cpu - runs["import"].cpu
        memory = (runs[form.name].peak - runs["import"].peak) / 1e6
        cells = f"{size:,}", f"{dense / size:.2f}x", f"{1e3 * seconds:.0f} ms", f"{memory:.0f} MB", same
        rows.append((form.name, *cells))
    table(name, ("form", "file bytes", "smaller", "load, CPU", "peak memory", "same outputs"), rows)


def _same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> str:
    return "yes" if all(np.array_equal(got[key], want[key]) for key in want) else "NO"


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.parent.glob(f"{path.name}.*")))


def _chain(path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    kind = "float16" if dtype is np.float16 else "float"
    names = ["x", *(f"h{i}" for i in range(1, LAYERS)), "y"]
    body = " ".join(f"{names[i + 1]} = MatMul({names[i]}, w{i})" for i in range(LAYERS))
    inputs = ", ".join(f"{kind}[{SIZE},{SIZE}] w{i}" for i in range(LAYERS))
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g ({kind}[rows,{SIZE}] x, {inputs}) => ({kind}[rows,{SIZE}] y) {{ {body} }}"
    )
    model = Model(ir.from_onnx_text(text))
    for value in model.graph.inputs[1:]:
        weight = (rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)).astype(dtype)
        value.const_value = ir.Tensor(weight, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    model.save(path, external=True)


if __name__ == "__main__":
    main()

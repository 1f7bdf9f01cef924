"""What the forms of per-input-channel groups cost, for chains of K x K matrices with 4-bit codes.

Three tables: how speed falls with the number of groups, beside what the lowering expects it to be (the
constants of ``backends/ort/input_groups.py`` were fitted to this); the forms side by side on a chain
of 24 matrices, which is larger than any cache; and the kernels' own error. Times are processor time of
one thread (so that other work on the machine shows less), the models in turns, the least of each.

    python -m benchmarks.input_group_forms [layers]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.harness import machine
from effic.backends import get_backend
from effic.backends.ort.artifact import OrtArtifact
from effic.backends.ort.input_groups import read_groups, speed
from effic.backends.ort.lower_input_groups import LowerInputGroups
from effic.ir.encodings import Encoding, build, code_tensor, decode
from effic.ir.model import Model
from effic.passes.base import Remarks
from effic.passes.quantize.dynamic_int8 import quantize_dynamic

WIDTH = 2048
ROWS = (1, 16, 128)
GROUPS = (1, 4, 8, 16, 32, 64)
SWEEP_LAYERS = 6
CHAIN_LAYERS = 24
FORMS = (("split", 4), ("split", 0), ("prefill", 4))


def main(layers: int | None = None) -> None:
    """Print the tables of docs/targets.md."""
    layers = layers or (int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdecimal() else CHAIN_LAYERS)
    print(machine("onnxruntime", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        _sweep(Path(folder))
        _forms(Path(folder), layers)
        _errors(Path(folder))


def _sweep(folder: Path) -> None:
    heads = [f"{_label(form, level)}, {rows} rows" for form, level in FORMS for rows in ROWS]
    print(f"\nTimes the speed of fp32, measured (expected); {SWEEP_LAYERS} matrices {WIDTH} x {WIDTH}\n")
    print("| groups (of) | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    plain = _saved(folder, "fp32", _plain(SWEEP_LAYERS))
    for count in GROUPS:
        encoding = _encoding(WIDTH // count)
        groups = read_groups(encoding, 0)
        assert groups is not None
        files = {"fp32": plain}
        for form, level in FORMS:
            model = _chain(SWEEP_LAYERS, encoding)
            LowerInputGroups(form=form, accuracy_level=level, always=True).apply(model, Remarks())  # type: ignore[arg-type]
            files[_label(form, level)] = _saved(folder, f"{form}{level}", model)
        cells = {}
        for rows in ROWS:
            times = _measure(files, rows)
            for form, level in FORMS:
                gain = times["fp32"] / times[_label(form, level)]
                expected = speed(groups, form, level, rows)  # type: ignore[arg-type]
                cells[form, level, rows] = f"{gain:.1f} ({expected:.1f})"
        line = [cells[form, level, rows] for form, level in FORMS for rows in ROWS]
        print(f"| {count} ({groups.size}) | " + " | ".join(line) + " |", flush=True)


def _forms(folder: Path, layers: int) -> None:
    print(f"\nA chain of {layers} matrices {WIDTH} x {WIDTH}, groups of 128: ms (times the speed of fp32)\n")
    print("| form | file | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 2) + "|")
    files = {"fp32": _saved(folder, "fp32", _plain(layers))}
    per_output = _encoding(128, axis=0)
    for name, encoding, target in (
        ("per output channel", per_output, "ort-cpu"),
        ("per input channel, split", _encoding(128), "ort-cpu"),
        ("per input channel, split, level 0", _encoding(128), "ort-cpu{accuracy_level=0}"),
        ("per input channel, prefill", _encoding(128), "ort-cpu{ic=prefill}"),
        ("one group per input channel", _encoding(WIDTH), "ort-cpu"),
    ):
        model = _chain(layers, encoding)
        get_backend(target).lower(model, Remarks())
        files[name] = _saved(folder, name.replace(" ", "-").replace(",", ""), model)
    model = _plain(layers)
    quantize_dynamic(model, Remarks())
    get_backend("ort-cpu").lower(model, Remarks())
    files["8 bits, dynamic"] = _saved(folder, "dynamic", model)
    times = {rows: _measure(files, rows) for rows in ROWS}
    for name, path in files.items():
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        cells = [
            f"{times[rows][name] * 1e3:.1f} ({times[rows]['fp32'] / times[rows][name]:.1f}x)" for rows in ROWS
        ]
        print(f"| {name} | {size / 1e6:.0f} MB | " + " | ".join(cells) + " |", flush=True)


def _errors(folder: Path) -> None:
    """‖y - y0‖ / ‖y0‖ where y0 is the exact product with the decoded weight."""
    print(f"\nError of the kernels, one matrix {WIDTH} x {WIDTH}, 16 rows, standard normal\n")
    print("| form | error | one input channel x 100 | one row x 100, error of the others |")
    print("|---|---|---|---|")
    x = np.random.default_rng(1).standard_normal((16, WIDTH)).astype(np.float32)
    channel, row = x.copy(), x.copy()
    channel[:, 7] *= 100
    row[3] *= 100
    for name, encoding, target in (
        ("per output channel", _encoding(128, axis=0), "ort-cpu"),
        ("split", _encoding(128), "ort-cpu"),
        ("split, level 0", _encoding(128), "ort-cpu{accuracy_level=0}"),
        ("prefill", _encoding(128), "ort-cpu{ic=prefill}"),
        ("exact", _encoding(128), "ort-cpu{ic=exact}"),
    ):
        model = _chain(1, encoding)
        get_backend(target).lower(model, Remarks())
        artifact = OrtArtifact.load(_saved(folder, "error", model))
        weight, cells = decode(encoding).astype(np.float64), []
        for given, rows in ((x, slice(None)), (channel, slice(None)), (row, [0, 1, 2, *range(4, 16)])):
            got, want = artifact.run({"x": given})["y"][rows], (given.astype(np.float64) @ weight)[rows]
            cells.append(f"{np.linalg.norm(got - want) / np.linalg.norm(want):.1e}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def _label(form: str, level: int) -> str:
    return form if level == 4 else f"{form}, level {level}"


def _measure(files: Mapping[str, Path], rows: int, rounds: int = 9) -> dict[str, float]:
    """Least processor time of a run, in seconds."""
    x = {"x": np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)}
    opened = {name: OrtArtifact.load(path) for name, path in files.items()}
    best = dict.fromkeys(files, float("inf"))
    for artifact in opened.values():
        artifact.run(x)
    for _ in range(rounds):
        for name, artifact in opened.items():
            began = time.thread_time()
            artifact.run(x)
            best[name] = min(best[name], time.thread_time() - began)
    return best


def _encoding(group: int, axis: int = 1) -> Encoding:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (WIDTH, WIDTH)).astype(np.int8)
    shape = tuple(-(-WIDTH // group) if i == axis else WIDTH for i in range(2))
    # Products of random codes keep the size of what goes in.
    scales = ((rng.random(shape) + 0.5) / (4.6 * np.sqrt(WIDTH))).astype(np.float32)
    return Encoding(
        code_tensor(codes, ir.DataType.INT4), scales, None, axis, group, 4, codes.shape, weight="w"
    )


def _plain(layers: int) -> Model:
    rng = np.random.default_rng(0)
    model = _graph(layers)
    for layer, node in enumerate(list(model.nodes("MatMul"))):
        array = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(np.sqrt(WIDTH))
        node.replace_input_with(1, model.add_initializer(model.graph, f"w{layer}", array))
    return model


def _chain(layers: int, encoding: Encoding) -> Model:
    model = _graph(layers)
    for layer, node in enumerate(list(model.nodes("MatMul"))):
        node.replace_input_with(1, build(model, model.graph, encoding, f"w{layer}"))
    return model


def _graph(layers: int) -> Model:
    body = " ".join(
        f"{'y' if i == layers - 1 else f'h{i}'} = MatMul({'x' if i == 0 else f'h{i - 1}'}, none)"
        for i in range(layers)
    )
    model = Model(
        ir.from_onnx_text(
            '<ir_version: 13, opset_import: ["" : 25]>\n'
            f"g (float[M,{WIDTH}] x, float[{WIDTH},{WIDTH}] none) => (float[M,{WIDTH}] y) {{ {body} }}"
        )
    )
    model.graph.inputs.pop()
    return model


def _saved(folder: Path, name: str, model: Model) -> Path:
    path = folder / f"{name}.onnx"
    model.save(path, force=True, external=True)
    return path


if __name__ == "__main__":
    main()

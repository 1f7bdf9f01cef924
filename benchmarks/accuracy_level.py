"""What accuracy level 4 costs and brings beside level 0, for a matrix with 2048 input channels.

Error: ‖y - y0‖ / ‖y0‖ where y0 is the exact product with the *decoded* weight (float64), so that only
the kernel's own rounding counts and not that of the quantization. Speed: one thread, the two
lowered models and the uncompressed one timed in turns.

    python -m benchmarks.accuracy_level
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.harness import machine
from effic.backends import get_backend
from effic.backends.ort.artifact import OrtArtifact
from effic.bench import bench
from effic.ir.encodings import Encoding, build, code_tensor, decode
from effic.ir.model import Model
from effic.passes.base import Remarks

INPUTS = OUTPUTS = 2048
ROWS = (1, 16, 128)


def main() -> None:
    """Print the tables of docs/targets.md."""
    print(machine("onnxruntime", "numpy"))
    print(f"\ny = x @ W, W [{INPUTS}, {OUTPUTS}], symmetric codes, x standard normal (16 rows)\n")
    print("| bits | group | error at level 0 | error at level 4 | level 4, one activation channel ×100 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for bits, group in ((4, 32), (4, 128), (4, -1), (8, 128), (2, 128)):
            _errors(Path(folder), bits, group)
        print("\n| rows of x | fp32 | 4 bits, group 128, level 0 | level 4 |")
        print("|---|---|---|---|")
        _speeds(Path(folder))


def _errors(folder: Path, bits: int, group: int) -> None:
    encoding = _encoding(bits, group)
    weight = decode(encoding).astype(np.float64)
    x = np.random.default_rng(1).standard_normal((16, INPUTS)).astype(np.float32)
    spiked = x.copy()
    spiked[:, 7] *= 100
    errors = []
    for level, given in ((0, x), (4, x), (4, spiked)):
        got = OrtArtifact.load(_write(folder, encoding, level)).run({"x": given})["y"]
        want = given.astype(np.float64) @ weight
        errors.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    name = "channel" if group < 0 else str(group)
    print(f"| {bits} | {name} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")


def _speeds(folder: Path) -> None:
    encoding = _encoding(4, 128)
    plain = Model(ir.from_onnx_text(_text("w")))
    value = plain.graph.inputs.pop()
    value.const_value = ir.Tensor(decode(encoding), name="w")
    plain.graph.register_initializer(value)
    plain.save(folder / "plain.onnx", force=True)
    for rows in ROWS:
        x = {"x": np.random.default_rng(2).standard_normal((rows, INPUTS)).astype(np.float32)}
        cells, base = [], 0.0
        for level in (0, 4):
            result = bench(folder / "plain.onnx", _write(folder, encoding, level), x, repeats=40)
            base = base or result.a.median_ms
            assert result.b is not None
            cells.append(
                f"{result.b.median_ms:.3f} ms ({result.speedup:.1f}x, "
                f"{result.speedup_low:.1f} to {result.speedup_high:.1f})"
            )
        print(f"| {rows} | {base:.3f} ms | " + " | ".join(cells) + " |")


def _encoding(bits: int, group: int) -> Encoding:
    rng = np.random.default_rng(0)
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (INPUTS, OUTPUTS)).astype(np.int8)
    kind = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}[bits]
    shape = (OUTPUTS,) if group < 0 else (INPUTS // group, OUTPUTS)
    scales = (rng.random(shape) + 0.5).astype(np.float32) / half
    axis, block = (1, 0) if group < 0 else (0, group)
    return Encoding(code_tensor(codes, kind), scales, None, axis, block, bits, (INPUTS, OUTPUTS), weight="w")


def _text(weight: str) -> str:
    return (
        '<ir_version: 13, opset_import: ["" : 25]>\n'
        f"g (float[M,{INPUTS}] x, float[{INPUTS},{OUTPUTS}] {weight}) => (float[M,{OUTPUTS}] y) "
        f"{{ y = MatMul(x, {weight}) }}"
    )


def _write(folder: Path, encoding: Encoding, level: int) -> Path:
    model = Model(ir.from_onnx_text(_text("given")))
    given = model.graph.inputs.pop()
    given.replace_all_uses_with(build(model, model.graph, encoding, "w"))
    get_backend(f"ort-cpu{{accuracy_level={level}}}").lower(model, Remarks())
    path = folder / f"level{level}.onnx"
    model.save(path, force=True)
    return path


if __name__ == "__main__":
    main()

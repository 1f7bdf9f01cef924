"""What quantized weights bring in time: a chain of 24 MatMuls of 2048 x 2048, larger than the cache.

    python -m benchmarks.speed [--repeats N] [--only TEXT]

Each form of the weights is timed in turns with the float32 chain, one thread; a cell holds the median
of the ratios of neighbouring turns and its quartiles. Scales are per group of 128 unless said otherwise.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import effic
from benchmarks.harness import machine, table

LAYERS, SIZE = 24, 2048
ROWS = (1, 16, 128)
FORMS: tuple[tuple[str, str, str], ...] = (
    ("per output channel, level 4", "quantize-rtn", "ort-cpu"),
    ("per output channel, level 0", "quantize-rtn", "ort-cpu{accuracy_level=0}"),
    ("per input channel, split", "quantize-rtn{axis=ic}", "ort-cpu{ic=split}"),
    ("per input channel, prefill", "quantize-rtn{axis=ic}", "ort-cpu{ic=prefill}"),
    ("per input channel, exact", "quantize-rtn{axis=ic}", "ort-cpu{ic=exact}"),
    ("a scale per input channel", "quantize-rtn{axis=ic,group_size=-1}", "ort-cpu"),
    ("EasyQuant", "quantize-easyquant", "ort-cpu"),
    ("dynamic int8", "quantize-int8{mode=dynamic}", "ort-cpu"),
)


def chain(path: Path, tails: float | None = None) -> Path:
    """Write the float32 chain; ``tails`` draws the weights from Student's t with so many degrees."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(SIZE)
    weights = []
    for i in range(LAYERS):
        drawn = rng.standard_t(tails, (SIZE, SIZE)) if tails else rng.standard_normal((SIZE, SIZE))
        weights.append(numpy_helper.from_array((drawn / drawn.std() * scale).astype(np.float32), f"w{i}"))
    names = ["x", *(f"h{i}" for i in range(1, LAYERS)), "y"]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"matmul{i}")
        for i in range(LAYERS)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


@click.command()
@click.option("--repeats", default=20, show_default=True, help="turns of each pair")
@click.option("--only", default="", help="forms whose name contains this text")
def command(repeats: int, only: str) -> None:
    """Print the table."""
    print(machine("effic", "onnxruntime", "numpy"))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        plain = chain(folder / "plain.onnx")
        lines = []
        for form, passes, target in FORMS:
            if only not in form:
                continue
            out = folder / "form.onnx"
            for old in folder.glob("form.onnx*"):
                old.unlink()
            effic.optimize(plain, passes, output=out, target=target, check="off", external=True)
            size = sum(p.stat().st_size for p in folder.glob("form.onnx*"))
            lines.append(
                [form, f"`{passes}`, `{target}`", f"{size / 1e6:.0f} MB", *_cells(plain, out, repeats)]
            )
    size = LAYERS * SIZE * SIZE * 4
    table(
        f"{LAYERS} x {SIZE}^2 ({size / 1e6:.0f} MB in fp32): times faster than fp32",
        ("weights in 4 bits", "how", "file", *(f"{r} rows" for r in ROWS)),
        lines,
    )


def _cells(plain: Path, quantized: Path, repeats: int) -> list[str]:
    cells = []
    for rows in ROWS:
        x = np.random.default_rng(1).standard_normal((rows, SIZE)).astype(np.float32)
        timed = effic.bench(plain, quantized, {"x": x}, repeats=repeats)
        assert timed.b is not None
        cells.append(
            f"{timed.speedup:.1f} ({timed.speedup_low:.1f} to {timed.speedup_high:.1f}), "
            f"{timed.b.median_ms:.1f} ms"
        )
    return cells


def main() -> None:
    """The table, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()

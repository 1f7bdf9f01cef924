"""``decode=load`` beside ``decode=call``: twelve 2048 x 2048 matrices in per-input-channel groups, 4 bits.

Each form runs in a process of its own, one thread, one row: seconds to load, resident memory after
loading and after a call, milliseconds of a call (median of 20).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import effic
from benchmarks.harness import machine, table

LAYERS, SIZE = 12, 2048
CHILD = """
import json, sys, time
import numpy as np, onnxruntime as ort
def resident():
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmRSS'))
options = ort.SessionOptions()
options.intra_op_num_threads = 1
base = resident()
began = time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])
load, loaded = time.perf_counter() - began, resident() - base
x = {'x': np.random.default_rng(0).standard_normal((1, 2048), np.float32)}
session.run(None, x)
after, times = resident() - base, []
for _ in range(20):
    began = time.perf_counter()
    session.run(None, x)
    times.append(time.perf_counter() - began)
print(json.dumps([load, loaded, after, sorted(times)[10]]))
"""


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        source = Path(name) / "chain.onnx"
        onnx.save(_chain(), source)
        rows = []
        for decode in ("load", "call"):
            out = Path(name) / f"{decode}.onnx"
            target = f"ort-cpu{{ic=exact,decode={decode}}}"
            effic.optimize(source, "quantize-rtn{axis=ic}", output=out, target=target, check="off")
            text = subprocess.run(
                [sys.executable, "-c", CHILD, str(out)], capture_output=True, text=True, check=True
            ).stdout
            load, loaded, after, call = json.loads(text)
            rows.append((
                f"`decode={decode}`", f"{out.stat().st_size / 1e6:.0f} MB", f"{load:.2f} s",
                f"{loaded / 1e6:.0f} MB", f"{after / 1e6:.0f} MB", f"{1e3 * call:.0f} ms",
            ))  # fmt: skip
    print(machine("effic", "onnxruntime"))
    table(
        f"{LAYERS} x {SIZE}^2, int4, per input channel ({LAYERS * SIZE * SIZE * 4 / 1e6:.0f} MB in fp32)",
        ("form", "file", "load", "resident after loading", "after a call", "one call"),
        rows,
    )


def _chain() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(SIZE)
    weights = [
        numpy_helper.from_array((rng.standard_normal((SIZE, SIZE)) * scale).astype(np.float32), f"w{i}")
        for i in range(LAYERS)
    ]
    names = ["x", *(f"h{i}" for i in range(1, LAYERS)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", io[:1], io[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


if __name__ == "__main__":
    main()

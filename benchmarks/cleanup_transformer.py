"""Cleanup of a 175 MB torchscript-exported transformer: effic beside onnxslim and onnxsim.

Whole processes on one core. effic runs the preset ``cleanup``, once without running the model (as
the peers do) and once with the check after every pass, which the peers do not offer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from benchmarks.harness import interleaved, machine, run, table
from effic.ir.evaluate import run_session, start_session

BASE = "import effic.optimize, onnx_ir, effic.passes.pipeline"


def main() -> None:
    """Print the table."""
    from benchmarks.make_transformer import transformer_torchscript

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        source = folder / "model.onnx"
        transformer_torchscript(source)
        size = source.stat().st_size
        effic = [sys.executable, "-m", "effic.cli.main", "optimize", str(source), "--preset", "cleanup"]
        effic += ["--target", "portable", "--force"]
        commands: dict[str, str | list[str]] = {
            "effic --check off": [*effic, "--check", "off", "-o", str(folder / "effic.onnx")],
            "effic --check each": [*effic, "-o", str(folder / "checked.onnx")],
            "onnxslim": [sys.executable, "-m", "onnxslim", str(source), str(folder / "onnxslim.onnx")],
            "onnxsim": [sys.executable, "-m", "onnxsim", str(source), str(folder / "onnxsim.onnx")],
        }
        files = {
            "effic --check off": "effic", "effic --check each": "checked", "onnxslim": "onnxslim",
            "onnxsim": "onnxsim",
        }  # fmt: skip
        runs = interleaved(commands, repeats=3)
        base = run(BASE)
        reference, rows = None, []
        before = len(onnx.load(source, load_external_data=False).graph.node)
        session = start_session(str(source))
        inputs = _inputs(session)
        reference = run_session(session, inputs)
        for tool, r in runs.items():
            path = folder / f"{files[tool]}.onnx"
            got = run_session(start_session(str(path)), inputs)
            error = max(
                float(np.max(np.abs(a - b)) / np.max(np.abs(a)))
                for a, b in zip(reference.values(), got.values(), strict=True)
            )
            nodes = sum(n.op_type != "Constant" for n in onnx.load(path, load_external_data=False).graph.node)
            beyond = (r.peak - base.peak) / size
            rows.append((
                tool, f"{r.wall:.2f}", f"{r.cpu:.2f}", f"{r.peak / 1e6:.0f} MB", f"{beyond:.2f}",
                nodes, f"{error:.0e}",
            ))  # fmt: skip
        print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "onnxslim", "onnxsim", "torch"))
        print(f"the process's base (effic's imports): {base.cpu:.2f} s CPU, {base.peak / 1e6:.0f} MB")
        table(
            f"Cleanup of {size / 1e6:.0f} MB, {before} nodes (one core, medians of 3)",
            ("tool", "wall s", "CPU s", "peak", "(peak - base) / model", "nodes", "max rel. output change"),
            rows,
        )


def _inputs(session) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    made = {}
    for item in session.get_inputs():
        shape = [d if isinstance(d, int) else (2 if i == 0 else 16) for i, d in enumerate(item.shape)]
        if "int" in item.type:
            made[item.name] = rng.integers(0, 100, shape).astype(np.int64)
        else:
            made[item.name] = rng.standard_normal(shape).astype(np.float32)
    return made


if __name__ == "__main__":
    main()
